"""Folders of tiny checkpoints and tokenizers, what one holds, and file systems that fail."""

import errno
import os
from pathlib import Path

import torch
import transformers as T
from safetensors.torch import load_file
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast

# What `save_tiny` gives a model to read
WORDS = "the a film plot actor was is good bad very not dull bright long and but".split()
TEXTS = [" ".join(WORDS[(i * k) % 16] for k in range(1, 5 + i % 4)) for i in range(1, 25)]


def save_tiny(folder: Path, family: str = "bert", tokenizer: bool = True, **options) -> str:
    """Save a model of a family, with a tokenizer of the words or without one. Returns the folder as text."""
    tiny_model(family, **options).save_pretrained(folder)
    if tokenizer:
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        (folder / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
        BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return str(folder)


def tokenizer(extra=()):
    """A tokenizer of eight words and more."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "very", "film", *extra]
    raw = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")


def snapshot(folder):
    """Every file below a folder with what it holds; links as they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def weights(folder):
    """The tensors of the model in a folder, by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        if file.name != "pruning_mask.safetensors":
            found |= load_file(file)
    return found


def holds(folder, model):
    """The folder loads, and holds the weights of a model."""
    again = type(model).from_pretrained(folder).state_dict()
    mine = model.state_dict()
    return again.keys() == mine.keys() and all(torch.equal(again[key], mine[key]) for key in mine)


def raising(error):
    """A function that raises an error, whatever it is given."""

    def function(*args, **options):
        raise error

    return function


ENOSPC = OSError(errno.ENOSPC, "No space left on device")
