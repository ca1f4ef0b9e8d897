"""Which files, by their names, belong to a checkpoint."""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from ..masks import MASK_FILE
from ..report import REPORT_FILE
from .card import CARD_FILE, PICTURE_FILE
from .standalone import MODULE

# What tokenizers of transformers save beside JSON.
VOCABULARIES = (
    "vocab*.txt",
    "merges.txt",
    "dict.txt",
    "bpe.codes",
    "tokenizer.model*",
    "sentencepiece*.model",
    "spiece.model",
    "spm*.model",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "*.jinja",
)
_ALWAYS = ("config.json", "generation_config.json", f"{MODULE}.py", MASK_FILE, REPORT_FILE, PICTURE_FILE)
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.*.safetensors", "model.safetensors.index*.json")
_PROCESSING = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "tekken.json",
    "normalizer.json",
    "emoji.json",
    "word_shape.json",
    "word_pronunciation.json",
    "byte_maps.json",
    "chat_template.json",
    "processor_config.json",
    "*preprocessor_config.json",
    "audio_tokenizer_config.json",
)
_CODE = ("modeling_*.py", "configuration_*.py", "tokenization_*.py", "*processing_*.py", "feature_extraction_*.py")
_TEMPLATES = "additional_chat_templates"  # the folder of transformers for a tokenizer that has several
_PUBLISHED = (*_ALWAYS, *_WEIGHTS, *_PROCESSING, *VOCABULARIES, *_CODE, CARD_FILE, "LICENSE*", "NOTICE*")


def of_a_model(variant: str | None = None) -> Callable[[str], bool]:
    """Whether a file, by its name, belongs to the model in a folder, and goes when another one takes its place.

    Args:
        variant (`str`, *optional*): Of the weights: files of other variants stay.

    Returns:
        `Callable[[str], bool]`: Takes the name of a file, without folders.
    """
    middle = f"\\.{re.escape(variant)}" if variant else ""
    weights = re.compile(rf"model{middle}(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index{middle}\.json")
    return lambda name: bool(weights.fullmatch(name)) or name in _ALWAYS or name.startswith("pytorch_model")


def published(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """What a push takes of a folder, by name, and the names of what it leaves.

    It takes the files that hf_prune and transformers write for a model, its tokenizer or processor, license texts and
    the card; nothing else, nothing hidden, and no link that leaves the folder.

    Args:
        folder (`Path`): The folder.

    Returns:
        `dict[str, Path]` and `list[str]`: By the name in the repository the file that it takes; and, sorted, the names
        of files and folders that it leaves.
    """
    root, taken, left = folder.resolve(), dict[str, Path](), []
    for path in sorted(folder.iterdir()):
        if path.name == _TEMPLATES and path.is_dir():
            taken |= {f"{_TEMPLATES}/{file.name}": file for file in sorted(path.glob("*.jinja"))}
        elif path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in _PUBLISHED):
            taken[path.name] = path
        else:
            left.append(path.name)
    outside = [name for name, path in taken.items() if not path.resolve().is_relative_to(root)]
    return {name: path for name, path in taken.items() if name not in outside}, sorted([*left, *outside])
