"""The data that a command reads."""

import argparse
import csv
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import ConfigError, PruningError
from .arguments import count
from .loading import trying

_FILES: dict[str, dict[str, Any]] = {
    ".jsonl": {"path": "json"},
    ".json": {"path": "json"},
    ".csv": {"path": "csv"},
    # Quotation marks are text in a .tsv: as quotes, an odd one would swallow the lines up to the next.
    ".tsv": {"path": "csv", "delimiter": "\t", "quoting": csv.QUOTE_NONE},
}


def add_data(parser: argparse.ArgumentParser, title: str, *, required: bool = False, batch_size: bool = True) -> None:
    """Where the data come from, and how they are read.

    Args:
        parser (`argparse.ArgumentParser`): The parser of the command.
        title (`str`): Of the group of arguments in its help.
        required (`bool`, *optional*, defaults to `False`): Whether the command needs data.
        batch_size (`bool`, *optional*, defaults to `True`): Whether it takes `--batch-size`.
    """
    data = parser.add_argument_group(title)
    data.add_argument(
        "--dataset",
        required=required,
        metavar="FILE_OR_ID",
        help="a .txt file (one example a line), a .jsonl, .json, .csv or .tsv file, or a dataset of the Hub",
    )
    data.add_argument("--dataset-config", metavar="NAME", help="configuration of a dataset of the Hub; default: none")
    data.add_argument("--split", metavar="NAME", help="split of a dataset of the Hub; default: train")
    data.add_argument(
        "--text-column", metavar="NAME", help="the column with the text; default: the only column of strings"
    )
    data.add_argument(
        "--max-samples",
        type=count,
        default=2048,
        metavar="N",
        help="read the first N examples, at least 1; shuffle data that are sorted by class; default: %(default)s",
    )
    if batch_size:
        data.add_argument(
            "--batch-size",
            type=count,
            default=32,
            metavar="N",
            help="examples in a batch, at least 1; default: %(default)s",
        )
    data.add_argument(
        "--max-length",
        type=count,
        metavar="TOKENS",
        help="cut longer texts to this many tokens, at least 1; default: what tokenizer and model take",
    )


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """How examples are read, as keyword arguments of what reads them."""
    return {name: getattr(args, name) for name in ("text_column", "max_samples", "max_length")}


def read_examples(args: argparse.Namespace) -> Any:
    """The examples that `--dataset` names.

    Raises:
        ConfigError: There is no such file, or it is of no known kind.
        PruningError: It can't be read.
    """
    path = Path(args.dataset).expanduser()
    is_file = path.suffix in (".txt", *_FILES)
    if is_file and not path.is_file():
        raise ConfigError(f"There is no file {args.dataset!r}.")
    if path.is_file() and not is_file:
        raise ConfigError(f"Can't read {args.dataset!r}: data files end in .txt, {', '.join(_FILES)}.")
    if is_file and (args.split or args.dataset_config):
        args.error("--split and --dataset-config are for datasets of the Hub, --dataset is a file")
    with trying(f"read the data {args.dataset!r}"):
        if path.suffix == ".txt":
            with path.open(encoding="utf-8") as lines:
                return list(islice(filter(None, map(str.strip, lines)), args.max_samples))
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise PruningError("All but .txt needs the datasets package: pip install datasets") from error
        if is_file:
            return load_dataset(**_FILES[path.suffix], data_files=str(path), split="train")
        return load_dataset(args.dataset, args.dataset_config, split=args.split or "train")
