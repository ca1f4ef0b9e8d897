"""Figures: what was pruned where, and how checkpoints compare. They need matplotlib and no display."""

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .benchmark import Measurement, setting
from .errors import ConfigError
from .report import PruningReport, comparable
from .tables import si_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which readers with any colour vision can tell apart.
_PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]
_EMPTY, _INK, _GREY = "#E4E7EB", "#1F2933", "#616E7C"


def plot_units(units: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> "Figure":
    """Draw how many heads, neurons and layers are kept, layer by layer.

    Args:
        units (`list[dict]`): For each unit group `name`, `kind` (`"heads"`, `"neurons"` or `"layers"`), `layer`,
            `stack`, `size` and `kept`, as in `PruningReport.units`. There is one panel for each kind, for layers
            only if some are dropped; stacks stand side by side in it.
        path (`str` or `os.PathLike`): Where to write it. The suffix chooses the format: `.png`, `.svg`, `.pdf`.

    Returns:
        `matplotlib.figure.Figure`: The figure that was written.

    Raises:
        ConfigError: There are no units.
    """
    units = [unit for unit in units if unit["kind"] != "layers" or unit["kept"] < unit["size"]]
    if not units:
        raise ConfigError("There are no units to plot.")
    kinds = [kind for kind in ("heads", "neurons", "layers") if any(unit["kind"] == kind for unit in units)]
    bars = max(sum(unit["kind"] == kind for unit in units) for kind in kinds)
    figure = _figure(min(max(7.0, 0.42 * bars + 1.2), 18.0), 2.7 * len(kinds))
    for row, kind in enumerate(kinds):
        group = [unit for unit in units if unit["kind"] == kind]
        axes = figure.add_subplot(len(kinds), 1, row + 1)
        kept, size = sum(unit["kept"] for unit in group), sum(unit["size"] for unit in group)
        _style(axes, f"{kind.capitalize()} kept: {kept:,} of {size:,} ({kept / max(size, 1):.0%})")
        _draw_units(axes, group, _PALETTE[row])
    figure.savefig(path)
    return figure


def _draw_units(axes: "Axes", group: Sequence[Mapping[str, Any]], color: str) -> None:
    stacks = list(dict.fromkeys(unit["stack"] for unit in group))
    few = len(group) <= 36
    ticks: dict[float, str] = {}
    start = 0.0
    for stack in stacks:
        members = [unit for unit in group if unit["stack"] == stack]
        # A decoder layer has two attention blocks: their bars stand side by side, the second one paler.
        blocks = list(dict.fromkeys(_block(unit) for unit in members))
        width = 0.84 / len(blocks)
        handles = []
        for index, block in enumerate(blocks):
            bars = [unit for unit in members if _block(unit) == block]
            layers = [max(unit["layer"], 0) for unit in bars]
            x = [start + layer + (index - (len(blocks) - 1) / 2) * width for layer in layers]
            axes.bar(x, [unit["size"] for unit in bars], color=_EMPTY, width=0.94 * width)
            kept = [unit["kept"] for unit in bars]
            handles.append(axes.bar(x, kept, color=color, alpha=0.5**index, width=0.94 * width))
            ticks |= {start + layer: str(unit["layer"]) for layer, unit in zip(layers, bars, strict=True)}
            if few:
                axes.bar_label(handles[-1], [f"{count:,}" for count in kept], padding=2, fontsize=7.5)
        if len(blocks) > 1:
            axes.legend(
                handles,
                blocks,
                loc="lower right",
                bbox_to_anchor=(1.0, 0.97),
                ncols=len(blocks),
                frameon=False,
                fontsize=8,
                labelcolor=_GREY,
            )
        last = max(unit["layer"] for unit in members)
        if last < 0:
            ticks[start] = stack
        elif len(stacks) > 1:
            axes.annotate(
                stack,
                (start + last / 2, 0),
                (0, -20),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="top",
                color=_GREY,
            )
        start += max(last, 0) + 1.8
    axes.set_xticks(list(ticks), list(ticks.values()))
    # A few bars (one for each stack) must not swell to fill the panel.
    axes.set_xlim(-0.7, max(start - 1.1, 4.0))
    axes.set_ylim(0, 1.12 * max(1, *(unit["size"] for unit in group)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="y", nbins=5, integer=True)
    if len(stacks) == 1 and group[0]["layer"] >= 0:
        axes.set_xlabel("Layer", color=_GREY)


def _block(unit: Mapping[str, Any]) -> str:
    return str(unit["name"]).removeprefix(f"{unit['stack']}.{unit['layer']}.")


def plot_comparison(rows: Sequence[Measurement], path: str | os.PathLike[str]) -> "Figure":
    """Draw the rows of [`~hf_prune.benchmark.compare`]: one small panel for each figure, one bar for each checkpoint.

    Args:
        rows (`list[Measurement]`): The first one is the reference that the others' ratios refer to.
        path (`str` or `os.PathLike`): Where to write it. The suffix chooses the format: `.png`, `.svg`, `.pdf`.

    Returns:
        `matplotlib.figure.Figure`: The figure that was written. In the panels of latency the bars are the median, the
        whiskers end at the 95th percentile.

    Raises:
        ConfigError: There are no rows.
    """
    if not rows:
        raise ConfigError("There are no measurements to plot.")
    panels: list[tuple[str, str, list[float]]] = [
        ("Parameters", "", [row.parameters for row in rows]),
        ("MACs per example", "", [row.macs for row in rows]),
        ("Weights on disk", "B", [row.disk_bytes for row in rows]),
        ("Peak memory", "B", [row.peak_memory_bytes for row in rows]),
    ]
    runs = rows[0].latency
    columns = 4
    lines = -(-(len(rows[0].scores) + len(panels) + len(runs)) // columns)
    figure = _figure(11.0, 2.75 * lines + 0.7)
    place = 0

    def panel(title: str, values: Sequence[float], labels: Sequence[str]) -> "Axes":
        nonlocal place
        place += 1
        axes = figure.add_subplot(lines, columns, place)
        _style(axes, title)
        colors = [_PALETTE[i % len(_PALETTE)] for i in range(len(rows))]
        bars = axes.bar(range(len(rows)), values, color=colors, width=0.66)
        axes.bar_label(bars, labels, padding=2, fontsize=8.5)
        axes.set_xticks([])
        axes.locator_params(axis="y", nbins=5)
        return axes

    for metric in rows[0].scores:
        values = [row.scores.get(metric, float("nan")) for row in rows]
        axes = panel(metric.replace("_", " ").capitalize(), values, [f"{value:.3f}" for value in values])
        axes.set_ylim(np.nanmin([0.0, *values]), 1.2 * np.nanmax(values))
    for title, unit, values in panels:
        prefix, scale = si_scale(max(values))
        scaled = [value / scale for value in values]
        axes = panel(f"{title} ({prefix}{unit})", scaled, _with_ratio(scaled))
        axes.set_ylim(0, 1.3 * max(scaled))
    for index, run in enumerate(runs):
        p50 = [row.latency[index].p50_ms for row in rows]
        p95 = [row.latency[index].p95_ms for row in rows]
        axes = panel(f"Latency, batch {run.batch_size} (ms)", p50, [""] * len(rows))
        whiskers = np.array([np.zeros(len(rows)), np.subtract(p95, p50)])
        axes.errorbar(range(len(rows)), p50, whiskers, fmt="none", ecolor=_INK, elinewidth=1, capsize=4)
        for x, (top, label) in enumerate(zip(p95, _with_ratio(p50), strict=True)):
            axes.annotate(label, (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=8.5)
        axes.set_ylim(0, 1.3 * max(p95))
    handles = figure.axes[0].patches
    figure.legend(handles, [row.name for row in rows], loc="outside upper left", ncols=len(rows), frameon=False)
    foot = f"Latency: bars are the median, whiskers end at the 95th percentile. {setting(rows[0])}."
    figure.supxlabel(foot, fontsize=9, color=_GREY)
    figure.savefig(path)
    return figure


def plot_tradeoff(reports: Mapping[str, PruningReport], path: str | os.PathLike[str]) -> "Figure":
    """Draw quality against cost: a row of panels for each metric and data of the evaluations, a column for each cost.

    Args:
        reports (`dict[str, PruningReport]`): The reports by name. Costs are shares of the dense model's, which stands
            at 100 % in the shape of a circle. A report is left out of panels for which it has no figure.
        path (`str` or `os.PathLike`): Where to write it. The suffix chooses the format: `.png`, `.svg`, `.pdf`.

    Returns:
        `matplotlib.figure.Figure`: The figure that was written.

    Raises:
        ConfigError: No report has an evaluation.
    """
    qualities = comparable(reports)
    if not qualities:
        raise ConfigError(
            "No report holds an evaluation, so there is no quality to draw. Add it before you save: report.evaluation "
            '= [{"metric": "accuracy", "before": 0.86, "after": 0.85, "n": 1000}].'
        )
    costs: dict[str, Callable[[PruningReport], float | None]] = {
        "MACs": lambda report: report.ratio("macs"),
        "parameters": lambda report: report.ratio("params"),
    }
    if any(report.latency_ratio() is not None for report in reports.values()):
        costs = {"latency": lambda report: report.latency_ratio(), **costs}
    figure = _figure(3.7 * len(costs), 0.6 + 3.2 * len(qualities))
    marks: dict[str, Any] = {}
    for row, (metric, values) in enumerate(qualities.items()):
        for column, (cost, kept) in enumerate(costs.items()):
            first = figure.axes[row * len(costs)] if column else None
            axes = figure.add_subplot(len(qualities), len(costs), row * len(costs) + column + 1, sharey=first)
            _style(axes, textwrap.fill(f"{metric} against {cost}", 36))
            for index, (name, report) in enumerate(reports.items()):
                share, quality = kept(report), values.get(name)
                if share is None or quality is None:
                    continue
                color, marker = _PALETTE[index % len(_PALETTE)], "sD^vPX"[index % 6]
                marks["dense"] = axes.plot(1.0, quality["before"], "o", ms=7, color=_GREY, zorder=2)[0]
                [marks[name]] = axes.plot(
                    share, quality["after"], marker, ms=8, color=color, markeredgecolor="white", zorder=3
                )
            axes.set_xlim(0, 1.08)
            axes.margins(y=0.15)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.set_xlabel(f"{cost} kept", color=_GREY)
    figure.legend(
        marks.values(), marks.keys(), loc="outside lower left", ncols=4, frameon=False, fontsize=8.5, labelcolor=_INK
    )
    figure.savefig(path)
    return figure


def _with_ratio(values: Sequence[float]) -> list[str]:
    """Labels of bars: the value, and below it its ratio to the first one."""
    first, *others = values
    return [f"{first:.3g}", *(f"{value:.3g}\n({value / first:.2f}×)" for value in others)]


def plot_front(
    evaluated: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    path: str | os.PathLike[str],
    marked: Mapping[str, tuple[float, float]],
    cost: str,
) -> "Figure":
    """Draw what a search found, error against cost, and other models to compare with.

    Args:
        evaluated, front (`list[tuple[float, float]]`): Cost, as a ratio to that of the whole model, and error of all
            sub-networks, and of those on the front in the order of their cost.
        path (`str` or `os.PathLike`): Where to write it. The suffix chooses the format: `.png`, `.svg`, `.pdf`.
        marked (`dict[str, tuple[float, float]]`): Other models by name.
        cost (`str`): Name of the cost.

    Returns:
        `matplotlib.figure.Figure`: The figure that was written.

    Raises:
        ConfigError: There is nothing to draw.
    """
    if not evaluated:
        raise ConfigError("There are no sub-networks to plot.")
    figure = _figure(7.0, 4.6)
    axes = figure.add_subplot()
    _style(axes, f"Error against {cost}: {len(front)} of {len(evaluated)} sub-networks are on the front")
    x, y = zip(*evaluated, strict=True)
    axes.scatter(x, y, s=14, color=_GREY, alpha=0.45, linewidths=0, label="evaluated")
    x, y = zip(*front, strict=True)
    axes.plot(x, y, drawstyle="steps-post", marker="o", ms=5, lw=1.6, color=_PALETTE[0], label="front")
    for index, (name, point) in enumerate(marked.items()):
        color, marker = _PALETTE[1 + index % (len(_PALETTE) - 1)], "sD^vPX"[index % 6]
        axes.plot(*point, marker, ms=8, color=color, markeredgecolor="white", label=name)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(f"{cost} kept", color=_GREY)
    axes.set_ylabel("error", color=_GREY)
    figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=8.5, labelcolor=_INK)
    figure.savefig(path)
    return figure


def _figure(width: float, height: float) -> "Figure":
    # A Figure of its own, not pyplot's: no global state to leak into a notebook, and no display needed.
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    return figure


def _style(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=_INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    axes.tick_params(length=0, labelcolor=_GREY, labelsize=8.5)
    axes.grid(axis="y", color=_EMPTY, linewidth=0.8)
    axes.set_axisbelow(True)
