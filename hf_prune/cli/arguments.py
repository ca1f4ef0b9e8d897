"""Arguments and types of arguments that several commands take."""

import argparse
from pathlib import Path

from .loading import TASKS

MODEL = "a folder that save_pretrained wrote, or a model of the Hub"


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def limit(text: str) -> tuple[str, float]:
    """`METRIC=LIMIT` of a budget."""
    metric, _, value = text.partition("=")
    for number in (int, float):
        try:
            return metric, number(value)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(
        f"{text!r} is no METRIC=LIMIT: give the ratio to keep, in (0, 1], such as macs=0.6, or an absolute whole "
        "number such as params=40000000, of macs, params, memory or latency (milliseconds)"
    )


def setting(text: str) -> tuple[str, str]:
    """`KEY=VALUE` of an option of a method."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE, such as recover=none")
    return key, value


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model that a command reads, and the task that it is loaded for."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--task",
        default="auto",
        choices=("auto", *TASKS),
        metavar="TASK",
        help=f"load the model for this task: {', '.join(TASKS)}; default: auto, the class that its config names",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a command runs."""
    parser.add_argument("--device", help="where to run: cpu, cuda, cuda:1, ...; default: the GPU if there is one")


def distinct_names(args: argparse.Namespace, paths: list[str]) -> list[str]:
    """The names of folders or files; where two have the same one, the paths as they are given.

    Args:
        args (`argparse.Namespace`): Of the command: its parser refuses a path that is given twice, with code 2.
        paths (`list[str]`): The paths.
    """
    if len(set(paths)) < len(paths):
        args.error(f"{next(path for path in paths if paths.count(path) > 1)} is given twice")
    names = [Path(path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else paths
