"""The sections of a model card, as Markdown: each is a function of the report."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from ..benchmark import Measurement, setting
from ..errors import PruningError
from ..methods import MethodConfig
from ..report import PruningReport
from ..tables import markdown_table, quantities
from .markdown import code, text

_SHARES = ("accuracy", "exact_match", "eval_accuracy")  # means of n answers that are right or wrong


def measurements(report: PruningReport) -> list[Measurement]:
    """The dense and the pruned row of the report's benchmark; empty where there is none.

    Args:
        report ([`PruningReport`]): The report. The first of its rows is the dense model, the last the pruned one.
    """
    if not report.benchmark:
        return []
    return [Measurement.from_dict(report.benchmark[0]), Measurement.from_dict(report.benchmark[-1])]


def verdict(report: PruningReport, base: str | None) -> str:
    """One line with the numbers that matter.

    Args:
        report ([`PruningReport`]): What was done and measured.
        base (`str`, *optional*): The dense model's id on the Hub, to link to.
    """
    dense = f"[{text(base)}](https://huggingface.co/{base})" if base else f"A dense {text(report.model_class)}"
    if report.weights:
        done = f"{report.sparsity():.1%} of the weights in {len(report.weights)} matrices are zero"
        done += ". Zeros in dense tensors make a model neither smaller nor faster" if report.latency is None else ""
    elif report.masked:
        done = f"{_gone(report)} are zero, not cut. The model is as large as the dense one"
    else:
        done = f"{_less(report.ratio('macs'))} multiply-accumulates and {_less(report.ratio('params'))} parameters"
    facts = [f"**{dense}, pruned with {text(report.method)}: {done}"]
    rows = measurements(report)
    if rows and rows[0].latency:
        before, after = (row.latency[0] for row in rows)
        where = f"batch {before.batch_size}, {text(setting(rows[0]).partition(';')[0])}"
        facts.append(f"one forward pass takes {after.p50_ms / before.p50_ms:.2f}× the time ({where})")
    for row in sorted(report.evaluation, key=lambda row: row["metric"] == "loss")[:1]:  # a metric of the task, if any
        facts.append(f"{text(row['metric'])} {row['before']:.4f} → {row['after']:.4f}{_count(row)}")
    return "; ".join(facts) + ".**"


def _gone(report: PruningReport) -> str:
    counts: dict[str, list[int]] = {}
    for row in report.units:
        count = counts.setdefault(row["kind"], [0, 0])
        count[0] += row["size"] - row["kept"]
        count[1] += row["size"]
    return " and ".join(f"{gone:,} of {size:,} {kind}" for kind, (gone, size) in counts.items() if gone) or "no units"


def _less(ratio: float) -> str:
    return f"{abs(1 - ratio):.0%} {'fewer' if ratio <= 1 else 'more'}"


def measured(report: PruningReport) -> str:
    """Dense against pruned: a row for each thing that was counted or measured, and no other."""
    rows: list[list[str]] = []

    def add(what: str, before: float, after: float, unit: str = "") -> None:
        rows.append([what, *quantities([before, after], unit), f"{after / before:.2f}×" if before else ""])

    for row in report.evaluation:
        cells = [_quality(row, when) for when in ("before", "after")]
        rows.append([f"{text(row['metric'])}{_count(row)}", *cells, f"{row['after'] - row['before']:+.4f}"])
    for key, what in (
        ("params", "parameters"),
        ("nonzero", "parameters that are not zero"),
        ("macs", "MACs per example"),
    ):
        if key in report.before and key in report.after:
            add(what, report.before[key], report.before[key] if report.masked else report.after[key])
    pair = measurements(report)
    if pair:
        dense, pruned = pair
        add("weights on disk", dense.disk_bytes, pruned.disk_bytes, "B")
        add("peak memory", dense.peak_memory_bytes, pruned.peak_memory_bytes, "B")
        for where, kind in (("latency", "latency"), ("ONNX Runtime", "onnx_latency")):
            for runs in zip(*(getattr(row, kind) for row in pair), strict=True):
                for name in ("p50", "p95"):
                    before, after = (getattr(run, f"{name}_ms") for run in runs)
                    add(f"{where} {name}, batch {runs[0].batch_size}", before, after, "ms")
    elif (times := _timed(report)) is not None:
        add("latency p50", *times, "ms")
    if (times := _predicted(report)) is not None:
        add("latency, predicted", *times, "ms")
    return markdown_table(["", "dense", "pruned", "pruned vs dense"], rows)


def _timed(report: PruningReport) -> tuple[float, float] | None:
    """Milliseconds before and after under a budget of latency. What was saved masked was not what was timed."""
    if report.latency is None or report.latency["before"] is None or report.masked:
        return None
    return report.latency["before"], report.latency["after"]


def _predicted(report: PruningReport) -> tuple[float, float] | None:
    """Milliseconds before and after as a table of measured blocks adds them up. They are those of what is cut."""
    if report.latency is None or "latency" not in report.after or report.masked:
        return None
    return report.before["latency"], report.after["latency"]


def _count(row: Mapping[str, Any]) -> str:
    """On how much a metric was measured."""
    windows = row.get("windows")
    where = f" tokens in {windows:,} window{'s' if windows > 1 else ''}" if windows else ""
    return f" (n = {row['n']:,}{where})" if row.get("n") else ""


def _quality(row: Mapping[str, Any], when: str) -> str:
    interval = _interval(row, when)
    return f"{row[when]:.4f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _interval(row: Mapping[str, Any], when: str) -> Sequence[float] | None:
    """The 95 % confidence interval of a metric, where it is known or follows from n."""
    value, known = row[when], row.get(f"interval_{when}")
    if known is None and row.get("n") and row["metric"] in _SHARES and 0 <= value <= 1:
        return wilson_interval(value, row["n"])
    return known


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a share of n independent answers: E. B. Wilson, JASA 22 (1927)."""
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def notes(report: PruningReport) -> str:
    """What the figures of the table hold for."""
    found = []
    if report.sequence_lengths:
        lengths = ", ".join(f"{n:.4g}" for n in report.sequence_lengths.values())
        found.append(f"MACs: the layers' multiply-accumulates for one example of {lengths} tokens.")
    if report.masked:
        left = f"{report.ratio('params'):.2f}× the parameters and {report.ratio('macs'):.2f}× the MACs"
        found.append(f"`hf_prune.shrink` would leave {left}.")
    if any(_interval(row, when) for row in report.evaluation for when in ("before", "after")):
        windows = any(row.get("windows") for row in report.evaluation)
        how = " A window of tokens counts as one observation (Student's t)." if windows else ""
        found.append(f"In brackets: 95 % confidence intervals, each of one model alone.{how}")
    data = [
        f"{text(row['metric'])} on {text(' '.join(str(row[k]) for k in ('dataset', 'config', 'split') if row.get(k)))}"
        for row in report.evaluation
        if row.get("dataset")
    ]
    if data:
        found.append(f"Measured: {', '.join(dict.fromkeys(data))}.")
    pair = measurements(report)
    if pair and pair[0].latency:
        found.append(f"Latency of one forward pass, the models taking turns: {text(setting(pair[0]))}.")
    elif report.latency is not None and _timed(report):
        found.append(f"Latency: {text(report.latency['where'])}.")
    if report.latency is not None and _predicted(report):
        where = text(report.latency["where"])
        found.append(f"Latency, predicted: the sum of a table of blocks that were measured one by one; {where}.")
    return "\n".join(found)


def plan(report: PruningReport) -> str:
    """What is left, layer by layer. Empty where nothing was pruned."""
    if report.weights:
        cells = {row["name"]: f"{row['zeros'] / max(row['size'], 1):.1%}" for row in report.weights}
        return _by_layer(report.weights, cells, "share of zeros")
    if all(row["kept"] == row["size"] for row in report.units):
        return ""
    cells = {row["name"]: f"{row['kept']:,} of {row['size']:,}" for row in report.units}
    return _by_layer(report.units, cells, "kept")


def _by_layer(rows: Sequence[Mapping[str, Any]], cells: Mapping[str, str], what: str) -> str:
    places = dict.fromkeys((row["stack"], row["layer"]) for row in rows)
    columns = dict.fromkeys(_column(row) for row in rows)
    found = {(row["stack"], row["layer"], _column(row)): cells[row["name"]] for row in rows}
    lines = [
        [
            text(stack if layer < 0 else f"{stack}.{layer}"),
            *(found.get((stack, layer, column), "") for column in columns),
        ]
        for stack, layer in places
    ]
    return markdown_table([what, *map(text, columns)], lines)


def _column(row: Mapping[str, Any]) -> str:
    """What a row is of its layer. Parameters have names relative to the model, units relative to its base."""
    name, layer = str(row["name"]).removesuffix(".weight"), f"{row['stack']}.{row['layer']}."
    before, found, rest = f".{name}".partition(f".{layer}")
    return rest if found else name


def call(report: PruningReport) -> tuple[str, str] | None:
    """The command line, or the call that prunes so, and its language.

    Args:
        report ([`PruningReport`]): The report. Without a command, the call is made of its config.

    Returns:
        `tuple[str, str]`: The code, and `"bash"` or `"python"`; `None` where the method is not known.
    """
    if report.command:
        return report.command, "bash"
    try:
        config = MethodConfig.from_dict(report.config)
    except (PruningError, TypeError):
        return None
    given = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in fields(config)
        if field.default is MISSING or getattr(config, field.name) != field.default
    ]
    data = ", data" if report.calibration else ""
    return f"hf_prune.prune(model, hf_prune.{type(config).__name__}({', '.join(given)}){data})", "python"


def calibration(report: PruningReport) -> str:
    """The data that the method looked at, or was trained on."""
    data = data_of(report)
    facts = ["the training data"] if "steps" in report.facts else [] if data else ["none"]
    if "samples" in data:
        source = " ".join(str(data[key]) for key in ("dataset", "config", "split") if data.get(key))
        of = f" of {text(source)}" if source else ""
        revision = f" at revision {text(data['revision'])}" if data.get("revision") else ""
        facts.append(f"{data['samples']:,} examples{of}{revision}")
    if "tokens" in data:
        facts.append(f"{data['tokens']:,} tokens, {data['mean_length']:.4g} in the mean")
    words = f"{', '.join(facts)}."
    if "sha256" in data:
        words += f" SHA-256 of what the model saw: `{code(data['sha256'])}`."
    if "fingerprint" in data:
        words += f" Fingerprint of the `datasets.Dataset`: `{code(data['fingerprint'])}`."
    return words


def data_of(report: PruningReport) -> Mapping[str, Any]:
    """What is known of the data that the method looked at: of a search they are among its options."""
    data = report.calibration or report.config.get("data")
    return data if isinstance(data, Mapping) else {}


def recovery(report: PruningReport) -> str:
    """How the model was repaired after, or while, it was pruned."""
    parts = []
    way = report.facts.get("recover") or report.config.get("recover")
    if way and way != "none":
        named = {
            "lstsq": "least squares",
            "lstsq_outputs": "least squares, output projections alone",
            "scale": "one factor for each unit",
            "bias": "the biases alone",
        }
        parts.append(f"what is kept was refitted to the dense model ({text(named.get(way, way))})")
    if "steps" in report.facts:
        taught = report.config.get("distillation_weight")
        teacher = f", distillation weight {text(taught)}" if taught else ""
        parts.append(f"trained for {report.facts['steps']:,} steps{teacher}")
    if report.recovery:
        parts.append(", ".join(f"{text(key)} {text(value)}" for key, value in report.recovery.items()))
    return "; ".join(parts) + "." if parts else "none."


def limits(report: PruningReport) -> list[str]:
    """What was not measured, and what holds for any pruned model."""
    found = []
    if report.evaluation:
        found.append("Its quality was measured with the metrics above, and no other.")
    else:
        found.append("Its quality was not measured: evaluate it on your task before you rely on it.")
    pair = measurements(report)
    if report.masked:
        found.append("Its units are zero, not cut: memory and latency gain nothing before `hf_prune.shrink`.")
    elif report.weights and report.latency is None:
        found.append("Tensors keep their shapes: memory and latency gain nothing without kernels for sparse weights.")
    elif pair and pair[0].latency or _timed(report):
        found.append("Latency holds for the hardware and the sizes named above.")
    elif _predicted(report):
        found.append(
            "Its latency was predicted from measured blocks, and not measured as a whole: `hf-prune bench` does that."
        )
    else:
        found.append("Latency was not measured. Fewer multiply-accumulates are not always less time.")
    found.append(
        "Pruning costs rare classes, groups and languages more than an average shows. Bias and safety of the dense "
        "model carry over and were not tested again."
    )
    if not report.metadata.get("license"):
        found.append("No license is stated, for the card of the dense model was not at hand: that model's holds.")
    return found


def paper(source: Mapping[str, Any]) -> str:
    """A paper in the running text."""
    title, url = text(source["title"]), _url(source)
    return f"{f'[{title}]({url})' if url else title} ({text(source['venue'])})"


def citation(source: Mapping[str, Any]) -> str:
    """A paper as BibTeX."""
    lines = {
        "title": f"{{{source['title']}}}",
        "author": source.get("authors"),
        "note": source["venue"],
        "eprint": source.get("arxiv"),
        "archivePrefix": "arXiv" if source.get("arxiv") else None,
        "url": _url(source),
    }
    words = "".join(c if c.isalnum() else " " for c in source["title"]).split()
    body = ",\n".join(f"  {key} = {{{' '.join(str(value).split())}}}" for key, value in lines.items() if value)
    return f"@misc{{{''.join(words[:3]).lower()},\n{body}\n}}"


def _url(source: Mapping[str, Any]) -> str | None:
    arxiv, url = source.get("arxiv"), source.get("url") or ""
    if arxiv and all(c.isalnum() or c in "./-" for c in arxiv):
        return f"https://arxiv.org/abs/{arxiv}"
    return url if url.startswith("https://") and not set(url) & set(" ()<>\"'`\\\n") else None


def settings(report: PruningReport) -> str:
    """All options, as JSON."""
    return json.dumps(report.config, indent=2, ensure_ascii=False)
