"""`hf-prune bench`: measure checkpoints side by side."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..benchmark import compare, comparison_table
from .arguments import MODEL, add_device, count, distinct_names
from .loading import check_device, resolve, trying

_DESCRIPTION = """\
Measure checkpoints side by side: latency (median and 95th percentile of one
forward pass), peak memory, size on disk, MACs and parameters. The models take
turns on the same random inputs, so that a busy machine slows all of them down
alike; the figures of two calls do not compare.
"""
_EXAMPLES = """\
examples:
  hf-prune bench ./bert-sst2-60 --against ./bert-sst2
  hf-prune bench ./bert-80 ./bert-60 --against ./bert --batch-size 1 32 \\
      --threads 4 --json > bench.json

The table is Markdown, with ratios to the first model.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL)
    parser.add_argument("--against", metavar="DENSE", help="the model to compare with; default: the first MODEL")
    parser.add_argument(
        "--batch-size",
        type=count,
        nargs="+",
        default=[1, 8],
        metavar="N",
        help="examples in a batch, at least 1; latency is measured at each size given; default: 1 8",
    )
    parser.add_argument(
        "--sequence-length",
        type=count,
        default=128,
        metavar="TOKENS",
        help="tokens in each example, at least 1; default: %(default)s",
    )
    parser.add_argument(
        "--repeats", type=count, default=30, metavar="N", help="timed passes, at least 1; default: %(default)s"
    )
    parser.add_argument(
        "--threads", type=count, metavar="N", help="threads on the CPU, at least 1; default: what torch takes"
    )
    add_device(parser)
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="export each model, which takes a while, and measure its latency in ONNX Runtime too",
    )


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """What the command has measured, as data and as text."""
    given = [args.against, *args.models] if args.against else args.models
    names = distinct_names(args, given)
    device = check_device(args.device)
    checkpoints = {name: _folder(model) for name, model in zip(names, given, strict=True)}
    with trying(f"measure {', '.join(given)}"):
        rows = compare(
            checkpoints,
            batch_sizes=args.batch_size,
            sequence_length=args.sequence_length,
            repeats=args.repeats,
            threads=args.threads,
            device=device,
            onnx=args.onnx,
        )
    return [asdict(row) for row in rows], comparison_table(rows)


def _folder(model: str) -> str:
    name = resolve(model)
    if Path(name).is_dir():
        return name
    with trying(f"download the model {model!r}"):
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
