"""`hf-prune card`: write the model card of a saved model anew."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..hub import write_card
from ..report import PruningReport

_DESCRIPTION = """\
Write the model card (README.md) of a saved model anew, from its report. `prune`
has written one already; do it again to add what was measured since. A card that
hf_prune did not write, or that you edited, is left alone.
"""
_EXAMPLES = """\
examples:
  hf-prune card ./bert-sst2-60
  hf-prune bench ./bert-sst2-60 --against ./bert-sst2 --dataset valid.tsv --json > bench.json
  hf-prune card ./bert-sst2-60 --bench bench.json
  hf-prune card ./bert-sst2-60 --evaluation quality.json

quality.json holds rows such as {"metric": "accuracy", "before": 0.865,
"after": 0.853, "n": 1072, "dataset": "stanfordnlp/sst2", "split": "validation"}.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("folder", metavar="FOLDER", help="a folder that save_pretrained or `hf-prune prune` wrote")
    parser.add_argument("--name", metavar="NAME", help="what the card calls the model; default: the folder's name")
    parser.add_argument(
        "--bench",
        metavar="FILE",
        help="what `hf-prune bench FOLDER --against DENSE --json` has printed: the first row is the dense model, the "
        "row of the folder's name (or the last one) is this one; its scores become the evaluation",
    )
    parser.add_argument("--evaluation", metavar="FILE", help="JSON, a list of what was measured, see below")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What the command has done, as data and as text."""
    folder = Path(args.folder).expanduser()
    report = PruningReport.load(folder)
    if args.bench:
        rows = _rows(args.bench)
        own = [row for row in rows[1:] if row.get("name") == folder.resolve().name] or rows[1:]
        if not own:
            raise ConfigError(f"{args.bench} has one row only: measure the model with --against the dense one.")
        report.benchmark = [rows[0], own[-1]]
        report.evaluation = _evaluation(args.bench, *report.benchmark) or report.evaluation
    if args.evaluation:
        report.evaluation = _rows(args.evaluation)
    card = write_card(folder, report, name=args.name)
    return {"card": str(card)}, f"Wrote {card}."


def _evaluation(file: str, dense: dict[str, Any], pruned: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores of two rows of a benchmark as rows of a report's evaluation."""
    parts = [row.get(key) or {} for key in ("scores", "scored_on") for row in (dense, pruned)]
    if not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"{file}: scores and scored_on of a row must be objects, as `hf-prune bench --json` prints.")
    before, after, _, about = parts
    if before.keys() != after.keys():
        found = " and ".join(f"{row.get('name')!r} {sorted(row.get('scores') or {})}" for row in (dense, pruned))
        raise ConfigError(f"{file}: both rows must have the same scores, they are of {found}: measure them together.")
    known = {key: about[key] for key in ("dataset", "config", "split", "revision", "windows") if key in about}
    intervals = {"interval_before": dense.get("intervals") or {}, "interval_after": pruned.get("intervals") or {}}
    return [
        {
            "metric": metric,
            "before": before[metric],
            "after": value,
            "n": about.get("predicted", about.get("samples")),
            **{key: found[metric] for key, found in intervals.items() if metric in found},
            **known,
        }
        for metric, value in after.items()
    ]


def _rows(file: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Can't read {file}: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{file} must hold a list of rows, each a JSON object.")
    return rows
