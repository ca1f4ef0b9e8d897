"""What the commands share: find a model, load it, and say how it loads."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, PreTrainedModel

from ..compression import is_compressed
from ..errors import ConfigError, PruningError
from ..layout import KEY
from ..offload import default_device

TASKS = {
    "base": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "multiple-choice": "AutoModelForMultipleChoice",
    "question-answering": "AutoModelForQuestionAnswering",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "token-classification": "AutoModelForTokenClassification",
}


@contextmanager
def trying(what: str) -> Iterator[None]:
    """Say what failed. The libraries that load models and data raise anything, from OSError to SafetensorError.

    Args:
        what (`str`): For the message: `"load the model 'bert'"`.

    Raises:
        PruningError: The context raised; errors of hf_prune pass as they are.
    """
    try:
        yield
    except PruningError:
        raise
    except Exception as error:
        raise PruningError(f"Can't {what}: {error}") from error


def resolve(model: str) -> str:
    """The folder of a model, or its id on the Hub.

    Raises:
        ConfigError: It is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        # A mistyped path would be looked up on the Hub, which answers with the grammar of its ids.
        raise ConfigError(f"There is no folder {model!r}, and a model of the Hub can't have that name.")
    return model


def check_device(device: str | None) -> str:
    """The device to run on, once it is proven to be there: before anything is downloaded.

    Raises:
        ConfigError: It is not.
    """
    device = device or default_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"Can't run on the device {device!r}: {error}") from error
    return device


def load_model(model: str, task: str = "auto", *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """Load a model for a task, or as the class that its config names.

    Args:
        model (`str`): A folder, or an id on the Hub.
        task (`str`, *optional*, defaults to `"auto"`): A key of `TASKS`, or `"auto"`, the class that the config names.
        dtype (`str`, *optional*, defaults to `"auto"`): As `from_pretrained` takes it.
        device (`str`, *optional*, defaults to `"cpu"`): Where it goes.

    Returns:
        `PreTrainedModel`: In evaluation mode. Pickled weights are refused.

    Raises:
        ConfigError: The config names no class of transformers, and no task is given.
        PruningError: It can't be loaded.
    """
    with trying(f"load the model {model!r}"):
        config = AutoConfig.from_pretrained(model)
        if task == "auto":
            name = (config.architectures or ["no class"])[0]
            if not hasattr(transformers, name):
                raise ConfigError(
                    f"The config of {model!r} names {name}, which transformers does not have: say what the model is "
                    f"for with --task, one of {', '.join(TASKS)}."
                )
        else:
            name = TASKS[task]
        cls = getattr(transformers, name)
        loaded: PreTrainedModel = cls.from_pretrained(model, dtype=dtype, use_safetensors=True)  # no pickle
        return loaded.to(device)


def load_processor(model: str) -> Any:
    """The tokenizer (or processor) beside a model; `None`, with a warning, where there is none."""
    try:
        processor = AutoProcessor.from_pretrained(model)
        # Without files to read, transformers makes a tokenizer that knows its special tokens alone, perhaps with "▁",
        # and turns every word into the same unknown one.
        if not hasattr(processor, "get_vocab") or {*processor.get_vocab()} - {*processor.all_special_tokens, "▁"}:
            return processor
        reason = "it has no vocabulary"
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
    print(f"hf-prune: warning: no tokenizer or processor loads from {model!r}: {reason}", file=sys.stderr)
    return None


def how_it_loads(config: PreTrainedConfig, folder: str | Path) -> dict[str, bool]:
    """Whether a checkpoint needs `import hf_prune`, and whether it brings the code along for where that is missing.

    Args:
        config (`PreTrainedConfig`): Its config.
        folder (`str` or path): Where it is. A model of the Hub is taken for one without compressed weights.

    Returns:
        `dict[str, bool]`: `needs_hf_prune` and `standalone`.
    """
    shapes = getattr(config, KEY, None) is not None
    needs = shapes or is_compressed(Path(folder))
    return {"needs_hf_prune": needs, "standalone": shapes and bool(getattr(config, "auto_map", None))}


def loading_sentence(loads: dict[str, bool]) -> str:
    """[`how_it_loads`] in words."""
    if not loads["needs_hf_prune"]:
        return "This checkpoint loads with plain transformers."
    if not loads["standalone"]:
        return "This checkpoint loads with from_pretrained after `import hf_prune`."
    return (
        "This checkpoint loads with from_pretrained after `import hf_prune`; where that is not installed, with an "
        "auto class and trust_remote_code=True."
    )
