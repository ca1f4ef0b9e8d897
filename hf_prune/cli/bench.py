"""`hf-prune bench`: measure checkpoints side by side."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..benchmark import compare, comparison_table, load_checkpoint
from ..calibration import Calibrator
from ..evaluation import METRICS, Evaluator, load_metrics
from ..hub.files import VOCABULARIES
from .arguments import MODEL, add_device, count, distinct_names
from .data import add_data, read_examples, reading
from .loading import check_device, load_processor, resolve, trying

_DESCRIPTION = """\
Measure checkpoints side by side: latency (median and 95th percentile of one
forward pass), peak memory, size on disk, MACs and parameters, and, on data that
you give, quality. The models take turns on the same random inputs, so that a busy
machine slows all of them down alike; the figures of two calls do not compare.
"""
_EXAMPLES = """\
examples:
  hf-prune bench ./bert-sst2-60 --against ./bert-sst2
  hf-prune bench ./bert-80 ./bert-60 --against ./bert --batch-size 1 32 \\
      --threads 4 --dataset valid.tsv --json > bench.json
  hf-prune bench ./qwen3-2of4 --against ./qwen3 --dataset valid.txt \\
      --metric perplexity

The table is Markdown, with ratios to the first model. Data for quality have a
column `label` or `labels`; the perplexity of a causal language model is that of a
.txt file, or of --text-column.
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
    parser.add_argument("--metric", default="accuracy", choices=METRICS, help="of the quality; default: %(default)s")
    add_data(parser, "data to measure quality on", batch_size=False)


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """What the command has measured, as data and as text."""
    given = [args.against, *args.models] if args.against else args.models
    names = distinct_names(args, given)
    device = check_device(args.device)
    checkpoints = {name: _folder(model) for name, model in zip(names, given, strict=True)}
    with trying(f"measure {', '.join(given)}"):
        quality = _quality(args, checkpoints, device) if args.dataset is not None else ({}, None, {})
        scores, scored_on, intervals = quality
        rows = compare(
            checkpoints,
            batch_sizes=args.batch_size,
            sequence_length=args.sequence_length,
            repeats=args.repeats,
            threads=args.threads,
            device=device,
            onnx=args.onnx,
            scores=scores,
            scored_on=scored_on,
        )
    rows = [replace(row, intervals=intervals.get(row.name, {})) for row in rows]
    return [asdict(row) for row in rows], comparison_table(rows)


def _quality(
    args: argparse.Namespace, checkpoints: dict[str, str], device: str
) -> tuple[dict[str, dict[str, float]], dict[str, Any], dict[str, dict[str, tuple[float, float]]]]:
    """The metric of each model, on what data, and the confidence intervals that don't follow from their number."""
    data, scored_on = read_examples(args), {}
    scores: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for name, folder in checkpoints.items():
        model, processor = load_checkpoint(folder, device=device), load_processor(folder)
        text = data[args.text_column] if args.text_column is not None else data
        if args.metric == "perplexity" and all(isinstance(line, str) for line in text):
            text = list(text)[: args.max_samples]
            window = min(args.max_length or 1024, getattr(model.config, "max_position_embeddings", 1024))
            found = load_metrics().estimate_perplexity(model, processor, text, window=window)
            value, scored_on = found.value, {"samples": len(text), "predicted": found.n, "windows": found.windows}
            if found.interval is not None:
                intervals[name] = {args.metric: found.interval}
        else:
            calibrator = Calibrator(model, data, processing_class=processor, labels=True, **reading(args))
            value, scored_on = Evaluator(calibrator, args.metric).measure(model), calibrator.describe()
        scores[name] = {args.metric: value}
    return scores, {"dataset": Path(args.dataset).name, **scored_on}, intervals


def _folder(model: str) -> str:
    name = resolve(model)
    if Path(name).is_dir():
        return name
    with trying(f"download the model {model!r}"):
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", *VOCABULARIES])
