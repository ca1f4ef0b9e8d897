"""`hf-prune bench`: measure checkpoints side by side."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..benchmark import compare, comparison_table
from .loading import check_device, resolve, trying


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """What the command has measured, as data and as text."""
    given = [args.against, *args.models] if args.against else args.models
    if len(set(given)) < len(given):
        args.error("a model is given twice")
    device = check_device(args.device)
    names = [Path(model).resolve().name for model in given]
    if len(set(names)) < len(names):
        names = given
    checkpoints = {name: _folder(model) for name, model in zip(names, given, strict=True)}
    with trying(f"measure {', '.join(given)}"):
        rows = compare(
            checkpoints,
            batch_sizes=args.batch_size,
            sequence_length=args.sequence_length,
            repeats=args.repeats,
            threads=args.threads,
            device=device,
        )
    return [asdict(row) for row in rows], comparison_table(rows)


def _folder(model: str) -> str:
    name = resolve(model)
    if Path(name).is_dir():
        return name
    with trying(f"download the model {model!r}"):
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
