"""`hf-prune compare`: pruning runs side by side, from their reports."""

import argparse
from pathlib import Path
from typing import Any

from ..comparison import comparison_markdown, comparison_rows, write_page
from ..plots import plot_tradeoff
from ..report import PruningReport
from .arguments import distinct_names
from .loading import trying

_DESCRIPTION = """\
Set pruning runs side by side, from the pruning_report.json that is saved with
each pruned model: what is left of MACs, parameters, memory and latency, and what
that cost in quality. Nothing is loaded or measured.
"""
_EXAMPLES = """\
examples:
  hf-prune compare ./bert-80 ./bert-60 ./bert-40
  hf-prune compare ./bert-80 ./bert-60 --html runs.html --plot runs.png

Quality and measured latency are in the table if the report holds them: its
evaluation, and its benchmark or the latency that was the budget.
`hf-prune bench` measures models themselves side by side.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="a folder of a pruned model, or a report in it")
    parser.add_argument("--html", metavar="FILE", help="write one HTML page, which opens without network")
    parser.add_argument("--plot", metavar="FILE", help="draw quality against cost: a .png, .svg or .pdf file")


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """What the reports hold, as data and as text."""
    names = distinct_names(args, args.reports)
    reports = {
        name: PruningReport.load(Path(path).expanduser()) for name, path in zip(names, args.reports, strict=True)
    }
    text = [comparison_markdown(reports)]
    for path, write in ((args.plot, plot_tradeoff), (args.html, write_page)):
        if path is not None:
            with trying(f"write {path}"):
                write(reports, Path(path).expanduser())
            text.append(f"Wrote {path}.")
    return comparison_rows(reports), "\n".join(text)
