"""Pruning runs side by side: a table, and one HTML page that needs no network."""

import base64
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .errors import ConfigError
from .plots import plot_tradeoff, plot_units
from .report import PruningReport, comparable
from .tables import markdown_table


def comparison_rows(reports: Mapping[str, PruningReport]) -> list[dict[str, Any]]:
    """For each report what is kept of the dense model's costs and quality. JSON-serialisable.

    Args:
        reports (`dict[str, PruningReport]`): The reports by name.

    Returns:
        `list[dict]`: `name`, `method`, `model`, the kept ratios `macs`, `params`, `memory` and `latency` (`None` where
        it was not measured), the share of `zeros` (`None` unless single weights were pruned), whether it was saved
        `masked`, with all its parameters, and `quality`: for each metric and data of the evaluation its `metric` and
        `dataset` (`None` where that has no name), and its value `before` and `after`.
    """
    quality = comparable(reports)
    return [
        {
            "name": name,
            "method": report.method,
            "model": f"{report.model_class} ({report.model_type})",
            **{metric: report.ratio(metric) for metric in ("macs", "params", "memory")},
            "latency": report.latency_ratio(),
            "zeros": report.sparsity() if report.weights else None,
            "masked": report.masked,
            "quality": {
                what: {key: rows[name].get(key) for key in ("metric", "dataset", "before", "after")}
                for what, rows in quality.items()
                if name in rows
            },
        }
        for name, report in reports.items()
    ]


def comparison_cells(reports: Mapping[str, PruningReport]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of several reports: costs as shares of the dense model's, quality and its change.

    Args:
        reports (`dict[str, PruningReport]`): The reports by name.

    Returns:
        `list[str]` and `list[list[str]]`: The cells of the head and of a line for each report. Costs that no report
        has are left out; `"-"` where a report has none.
    """
    rows = comparison_rows(reports)
    metrics = dict.fromkeys(metric for row in rows for metric in row["quality"])
    titles = {"macs": "MACs", "params": "parameters", "memory": "memory", "latency": "latency", "zeros": "zeros"}
    shown = [key for key in titles if any(row[key] is not None for row in rows)]
    head = ["", "method", *(titles[key] for key in shown), *metrics]
    lines = []
    for row in rows:
        shares = ["-" if row[key] is None else f"{row[key]:.1%}" for key in shown]
        found = [row["quality"].get(metric) for metric in metrics]
        quality = ["-" if q is None else f"{q['after']:.4f} ({q['after'] - q['before']:+.4f})" for q in found]
        lines.append([row["name"], row["method"], *shares, *quality])
    return head, lines


def comparison_markdown(reports: Mapping[str, PruningReport]) -> str:
    """Several reports as a Markdown table, see [`comparison_rows`].

    Args:
        reports (`dict[str, PruningReport]`): The reports by name.

    Returns:
        `str`: The table, and below it what the shares are of.
    """
    models = dict.fromkeys(f"{report.model_class} ({report.model_type})" for report in reports.values())
    foot = f"Shares of the dense model's, {', '.join(models)}. {masked_note(reports)}".rstrip()
    return f"{markdown_table(*comparison_cells(reports))}\n\n{foot}"


def masked_note(reports: Mapping[str, PruningReport]) -> str:
    """Which checkpoints are larger than the table says; empty if none is."""
    names = [name for name, report in reports.items() if report.masked]
    return f"Saved masked, as large as the dense model until it is shrunk: {', '.join(names)}." if names else ""


def write_page(reports: Mapping[str, PruningReport], path: str | Path) -> None:
    """Write one HTML page about one or more pruning runs. Pictures and styles are in it: it opens without network.

    Args:
        reports (`dict[str, PruningReport]`): The reports by name.
        path (`str` or path): Where to write it.

    Raises:
        ConfigError: There are no reports.
    """
    if not reports:
        raise ConfigError("There are no reports to show.")
    page = Environment(
        loader=PackageLoader("hf_prune", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    head, lines = comparison_cells(reports)
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        tradeoff = None
        if any(report.evaluation for report in reports.values()):
            plot_tradeoff(reports, picture)
            tradeoff = _inline(picture)
        plans = {}
        for name, report in reports.items():
            if report.units:
                plot_units(report.units, picture)
                plans[name] = _inline(picture)
    html = page.get_template("page.html").render(
        reports=reports, head=head, lines=lines, tradeoff=tradeoff, plans=plans, dump=_dump, note=masked_note(reports)
    )
    Path(path).write_text(html, encoding="utf-8")


def _inline(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode('ascii')}"


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
