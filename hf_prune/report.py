"""[`PruningReport`]: what was done to a model, with provenance."""

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin

from . import __version__
from .errors import PruningError, unknown
from .masks import PruningMask
from .redaction import redact
from .tables import markdown_table, quantities
from .units import KINDS, PrunableUnits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORDS = {
    "macs": "MACs per example",
    "params": "parameters",
    "memory": "memory of weights",
    "latency": "latency, predicted",
    "nonzero": "parameters that are not zero",
}
REPORT_FILE = "pruning_report.json"
SCHEMA_VERSION = 1
_PACKAGES = ("transformers", "torch", "accelerate", "datasets")


@dataclass
class PruningReport:
    """What a pruning run did. JSON in and out; fields of other versions are kept as they are.

    Args:
        method (`str`): Name of the method.
        config (`dict`): Its options.
        model_class, model_type (`str`): Class and family of the model.
        before, after (`dict[str, float]`): `macs`, `params` and `memory` (bytes of weights) of the dense and the
            pruned model; under a budget of latency also `latency`, the predicted milliseconds; where single weights
            were pruned also `nonzero`, the parameters that are not zero (zeros outside the pruned matrices are not
            looked for).
        sequence_lengths (`dict[str, float]`): For each stack the tokens per example at which MACs were counted.
        units (`list[dict]`): For each group of units its name, kind, stack, layer, size and how many were kept.
        weights (`list[dict]`): For each matrix whose single weights were pruned its name, stack, layer, size, and how
            many of its weights are zero (`zeros`) and were so before (`zeros_before`).
        calibration (`dict`, *optional*): Samples, tokens and fingerprint of the data.
        seconds (`float`): Wall-clock time of the run.
        processes (`int`): Number of processes.
        facts (`dict`): What the method has to say beyond that.
        packages (`dict[str, str]`): Versions of hf_prune and of the packages that were used.
        latency (`dict`, *optional*): Under a budget of latency: measured milliseconds `before` and `after` (medians,
            in turns; `None` if memory did not suffice), `where` they were measured, the `multiple_of` that widths were
            rounded to, and the `table` of the predictions. After [`accelerate_sparse`]: `before`, `after`, `where`.
        papers (`list[dict]`): The sources of the method, see [`Paper`].
        command (`str`, *optional*): The command line of the process, where that is a script or `hf-prune`.
        recovery (`dict`, *optional*): How quality was recovered afterwards, in the caller's words: `{"method": "LoRA",
            "rank": 8, "epochs": 1}`.
        evaluation (`list[dict]`): Measured quality: `metric`, its value `before` and `after`, and, if known, the
            number of examples `n` (of tokens, where there are `windows` of them), `interval_before` and
            `interval_after` (95 % confidence), and the `dataset` (its name, or its id on the Hub) with `config`,
            `split` and `revision`.
        benchmark (`list[dict]`): What [`~hf_prune.benchmark.compare`] measured of the dense and the pruned checkpoint:
            `[asdict(row) for row in rows]`.
        metadata (`dict`): Of the model card: `base_model`, `license`, `language`, `datasets`, `tags`, ... Saving adds
            what the model's source says, if it is at hand.
        verified (`dict`, *optional*): How the saved checkpoint was reloaded and compared, as the save found it:
            `masked` where its units are zero, not cut; `usage` where the lines of the model card were run.
        schema_version (`int`): Of this format.
        others (`dict`): Fields of a file that this version does not know.
    """

    method: str
    config: dict[str, Any]
    model_class: str
    model_type: str
    before: dict[str, float]
    after: dict[str, float]
    sequence_lengths: dict[str, float]
    units: list[dict[str, Any]] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    seconds: float = 0.0
    processes: int = 1
    facts: dict[str, Any] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=lambda: package_versions())
    latency: dict[str, Any] | None = None
    papers: list[dict[str, Any]] = field(default_factory=list)
    command: str | None = field(default_factory=lambda: _command())
    recovery: dict[str, Any] | None = None
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    benchmark: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    verified: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION
    others: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def masked(self) -> bool:
        """Whether the model was saved with its pruned units as zeros: it is as large as the dense one."""
        return bool((self.verified or {}).get("masked"))

    def ratio(self, metric: str) -> float:
        """Kept share of a metric: what it is after pruning, divided by what it was before.

        Args:
            metric (`str`): `"macs"`, `"params"`, `"memory"`; `"latency"` and `"nonzero"` where `after` has them.
        """
        return self.after[metric] / self.before[metric]

    def sparsity(self) -> float:
        """Share of zeros in the matrices whose single weights were pruned. 0.0 where there are none."""
        zeros, size = (sum(row[key] for row in self.weights) for key in ("zeros", "size"))
        return float(zeros / max(size, 1))

    def latency_ratio(self) -> float | None:
        """Measured latency of the pruned model as a share of the dense one's: the median at the first batch size of
        the benchmark, else as measured under a budget of latency. `None` if it was not measured."""
        if self.benchmark and self.benchmark[0]["latency"]:
            before, after = (row["latency"][0]["p50_ms"] for row in (self.benchmark[0], self.benchmark[-1]))
        elif self.latency is not None and self.latency["before"] is not None:
            before, after = self.latency["before"], self.latency["after"]
        else:
            return None
        return float(after / before)

    def rows(self) -> list[list[str]]:
        """Costs and quality in words: for each what it is, before, after, and the kept share or the change.

        Returns:
            `list[list[str]]`: Four cells each, the costs first.
        """
        found = []
        for metric, after in self.after.items():
            before, words = self.before[metric], _WORDS.get(metric, metric)
            cells = quantities([before, after], {"latency": "ms", "memory": "B"}.get(metric, ""))
            found.append([words, *cells, f"{self.ratio(metric):.1%}"])
        for row in self.evaluation:
            change = f"{row['after'] - row['before']:+.4f}"
            found.append([row["metric"], f"{row['before']:.4f}", f"{row['after']:.4f}", change])
        return found

    def to_markdown(self) -> str:
        """The report as Markdown: a sentence, costs and quality before and after, and what each layer keeps."""
        parts = [str(self), markdown_table(["", "before", "after", "kept or change"], self.rows())]
        if self.units:
            parts.append(markdown_table(["units", "kept", "of"], [_counts(row, "kept") for row in self.units]))
        if self.weights:
            parts.append(markdown_table(["weights", "zeros", "of"], [_counts(row, "zeros") for row in self.weights]))
        return "\n\n".join(parts) + "\n"

    def plot(self, path: str | os.PathLike[str]) -> "Figure":
        """Draw how many heads, neurons and layers each layer keeps, see [`~hf_prune.plots.plot_units`].

        Args:
            path (`str` or path): Where to write it. The suffix chooses the format: `.png`, `.svg`, `.pdf`.

        Returns:
            `matplotlib.figure.Figure`: The figure that was written.

        Raises:
            ConfigError: No units were pruned: single weights have no picture.
        """
        from .plots import plot_units

        return plot_units(self.units, path)

    def __str__(self) -> str:
        if self.weights:
            speed = "Zeros in dense tensors make a model neither smaller nor faster."
            if self.latency is not None:
                before, after = self.latency["before"], self.latency["after"]
                speed = f"Measured {before:.2f} to {after:.2f} ms ({after / before:.1%}); {self.latency['where']}."
            return (
                f"{self.method}: {self.sparsity():.2%} of {sum(row['size'] for row in self.weights):,} weights in "
                f"{len(self.weights)} matrices are zero, {self.ratio('nonzero'):.1%} of all parameters are left, in "
                f"{self.seconds:.1f} s. {speed}"
            )
        lengths = ", ".join(f"{n:.4g}" for n in self.sequence_lengths.values())
        kept: dict[str, list[int]] = {kind: [0, 0] for kind in KINDS}
        for row in self.units:
            kept[row["kind"]][0] += row["kept"]
            kept[row["kind"]][1] += row["size"]
        parts = [f"{a:,} of {b:,} {kind}" for kind, (a, b) in kept.items() if b]
        time = "MACs are not time: measure it with `hf-prune bench`."
        if self.latency is not None:
            pairs = {"predicted": (self.before["latency"], self.after["latency"])}
            if self.latency["before"] is not None:
                pairs["measured"] = self.latency["before"], self.latency["after"]
            figures = ", ".join(f"{how} {b:.2f} to {a:.2f} ms ({a / b:.1%})" for how, (b, a) in pairs.items())
            time = f"Latency: {figures}; {self.latency['where']}."
        return (
            f"{self.method}: MACs {self.ratio('macs'):.1%} (n = {lengths} tokens), "
            f"parameters {self.ratio('params'):.1%}, kept {', '.join(parts)}, in "
            f"{self.seconds:.1f} s. {time}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        data = asdict(self)
        others = data.pop("others")
        return {**data, **others}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PruningReport":
        """Inverse of [`~PruningReport.to_dict`].

        Args:
            data (`dict`): What `to_dict` returned. Fields of other versions go to `others`.

        Raises:
            PruningError: A field is missing, or holds what no report does; the message names it.
        """
        if not isinstance(data, Mapping):
            raise PruningError(f"Not a pruning report: it must be an object with named fields, got {data!r:.80}.")
        known = {f.name for f in fields(cls)} - {"others"}
        others = {key: value for key, value in data.items() if key not in known}
        try:
            report = cls(**{"command": None, **{key: data[key] for key in data.keys() & known}, "others": others})
        except TypeError as error:
            raise PruningError(f"Not a pruning report: {error}.") from error
        _check_report(report)
        return report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, without tokens and home folders. A folder gets `pruning_report.json`.

        Args:
            path (`str` or path): A file that is written over if need be, or a folder that exists.
        """
        path = Path(path)
        path = path / REPORT_FILE if path.is_dir() else path
        path.write_text(json.dumps(redact(self.to_dict()), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningReport":
        """Read a file written by [`~PruningReport.save`].

        Args:
            path (`str` or path): The file, or the folder that holds `pruning_report.json`.

        Raises:
            PruningError: There is no such file, or it holds no report.
        """
        path = Path(path)
        if path.is_dir() and not (path / REPORT_FILE).exists():
            raise PruningError(
                f"{path} holds no {REPORT_FILE}: give the folder of a model that hf_prune saved with its report."
            )
        path = path / REPORT_FILE if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise PruningError(f"{path} holds no pruning report: {error}.") from error
        except PruningError as error:
            raise PruningError(f"{path}: {error}") from error


def unit_rows(units: PrunableUnits, mask: PruningMask) -> list[dict[str, Any]]:
    """For each group of units a row of a report.

    Args:
        units ([`PrunableUnits`]): Units of the dense model.
        mask ([`PruningMask`]): What stays.

    Returns:
        `list[dict]`: `name`, `kind`, `stack`, `layer`, `size` and `kept`, in the order of the forward pass. Groups in
        dropped layers keep 0.
    """
    return [
        {
            "name": g.name,
            "kind": g.kind,
            "stack": g.stack,
            "layer": g.layer,
            "size": g.size,
            "kept": 0 if mask.drops(g) else int(mask[g.name].sum()),
        }
        for g in units.values()
    ]


def comparable(reports: Mapping[str, PruningReport]) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of the evaluations that may stand on one axis: by what was measured on which data, then by report.

    Where the data have no name, the same value of the dense model stands for the same data.

    Args:
        reports (`dict[str, PruningReport]`): The reports by name.

    Returns:
        `dict[str, dict[str, dict]]`: By the metric, with its data where these have a name or it is measured on
        several, and then by the name of the report, the row of its `evaluation`.
    """
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name, report in reports.items():
        for row in report.evaluation:
            data = " ".join(str(row[key]) for key in ("dataset", "config", "split") if row.get(key))
            key = row["metric"], f" on {data}" if data else f" (dense {row['before']:.4f})"
            groups.setdefault(key, {})[name] = row
    metrics = [metric for metric, _ in groups]
    alone = {key for key in groups if metrics.count(key[0]) == 1 and not key[1].startswith(" on ")}
    return {metric if (metric, of) in alone else metric + of: rows for (metric, of), rows in groups.items()}


# What is read of the rows of a report. Of an evaluation only metric, before and after must be there.
_ROWS: dict[str, dict[str, Any]] = {
    "units": {"name": str, "kind": str, "stack": str, "layer": int, "size": int, "kept": int},
    "weights": {"name": str, "stack": str, "layer": int, "size": int, "zeros": int},
    "papers": {"title": str, "venue": str},
    "evaluation": {
        "metric": str,
        "before": float,
        "after": float,
        "n": int | None,
        "windows": int | None,
        "interval_before": tuple[float, float] | None,
        "interval_after": tuple[float, float] | None,
    },
    "benchmark": {"latency": list[dict[str, Any]]},
}


def _check_report(report: PruningReport) -> None:
    """Raise unless all figures are there, and all that others are divided by are positive."""
    for f in fields(report):
        _check(f.name, getattr(report, f.name), f.type)
    for name, keys in _ROWS.items():
        for index, row in enumerate(getattr(report, name)):
            for key, kind in keys.items():
                _check(f"{name}[{index}].{key}", row.get(key), kind)
    for row in report.units:
        if row["kind"] not in KINDS:
            raise PruningError(f"Not a pruning report: {unknown('kind of units', row['kind'], KINDS)}")
    costs = ["macs", "params", "memory", *report.after]
    if report.weights:
        costs.append("nonzero")
    if report.latency is not None:
        _check("latency.where", report.latency.get("where"), str)
        if report.latency.get("before") is not None:
            for when in ("before", "after"):
                _check(f"latency.{when}", report.latency.get(when), "positive")
        if not report.weights:
            costs.append("latency")
    for metric in costs:
        _check(f"before.{metric}", report.before.get(metric), "positive")
        _check(f"after.{metric}", report.after.get(metric), float)
    for index, measured in enumerate(report.benchmark):
        if len(measured["latency"]) != len(report.benchmark[0]["latency"]):
            raise PruningError("Not a pruning report: the rows of benchmark have latencies at other batch sizes.")
        for run in measured["latency"]:
            _check(f"benchmark[{index}].latency.p50_ms", run.get("p50_ms"), "positive")


def _check(name: str, value: Any, kind: Any) -> None:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if not any(_is(value, each) for each in kinds):
        words = "a positive number" if kind == "positive" else re.sub(r"<class '|'>|typing\.", "", str(kind))
        given = "nothing" if value is None else repr(value)[:80]
        raise PruningError(f"Not a pruning report: {name} must be {words}, got {given}.")


def _is(value: Any, kind: Any) -> bool:
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return True
    if kind == "positive":
        return _is(value, float) and 0 < value < math.inf
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if outer is dict:
        return isinstance(value, Mapping) and all(isinstance(k, str) and _is(v, inner[1]) for k, v in value.items())
    if outer is tuple:  # a list in a file
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(_is, value, inner))
    if outer is list:
        return isinstance(value, list) and all(_is(item, inner[0]) for item in value)
    return isinstance(value, outer) and not (outer is int and isinstance(value, bool))


def _counts(row: Mapping[str, Any], key: str) -> list[str]:
    return [row["name"], f"{row[key]:,}", f"{row['size']:,}"]


def package_versions(*more: str) -> dict[str, str]:
    """The versions of hf_prune, of what it builds on, and of `more` packages, as far as they are installed.

    Args:
        more (`str`): Names of packages, as pip knows them.

    Returns:
        `dict[str, str]`: Version by name of the package.
    """
    found = {"hf_prune": __version__}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _command() -> str | None:
    """`None` in notebooks, shells and tests."""
    script = Path(sys.argv[0] if sys.argv else "")
    if script.stem == "hf-prune" or script.parts[-2:] == ("hf_prune", "__main__.py"):
        words = ["hf-prune"]
    elif script.suffix == ".py" and script.stem not in ("__main__", "ipykernel_launcher"):
        words = ["python", script.name if script.is_absolute() else script.as_posix()]
    else:
        return None
    return shlex.join([*words, *sys.argv[1:]])
