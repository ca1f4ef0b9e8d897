"""[`PruningReport`]: what was done to a model, with provenance."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import PruningError
from .masks import PruningMask
from .units import KINDS, PrunableUnits

REPORT_FILE = "pruning_report.json"
_PACKAGES = ("hf_prune", "transformers", "torch", "accelerate", "datasets")


@dataclass
class PruningReport:
    """What a pruning run did. JSON in and out; fields from newer versions are skipped when reading.

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
        packages (`dict[str, str]`): Versions.
        schema_version (`int`): Of this format.
        latency (`dict`, *optional*): Under a budget of latency: measured milliseconds `before` and `after` (medians,
            in turns; `None` if memory did not suffice), `where` they were measured, the `multiple_of` that widths were
            rounded to, and the `table` of the predictions. After [`accelerate_sparse`]: `before`, `after`, `where`.
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
    packages: dict[str, str] = field(default_factory=lambda: _versions())
    latency: dict[str, Any] | None = None
    schema_version: int = 1

    def ratio(self, metric: str) -> float:
        """Kept share of a metric."""
        return self.after[metric] / self.before[metric]

    def sparsity(self) -> float:
        """Share of zeros in the matrices whose single weights were pruned."""
        zeros, size = (sum(row[key] for row in self.weights) for key in ("zeros", "size"))
        return float(zeros / max(size, 1))

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
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PruningReport":
        """Inverse of [`~PruningReport.to_dict`].

        Raises:
            PruningError: A field is missing.
        """
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{key: value for key, value in data.items() if key in known})
        except TypeError as error:
            raise PruningError(f"Not a pruning report: {error}.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON. A folder gets `pruning_report.json`."""
        path = Path(path)
        path = path / REPORT_FILE if path.is_dir() else path
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningReport":
        """Read a file written by [`~PruningReport.save`].

        Raises:
            PruningError: There is no such file, or it holds no report.
        """
        path = Path(path)
        path = path / REPORT_FILE if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError) as error:
            raise PruningError(f"{path} holds no pruning report: {error}.") from error


def unit_rows(units: PrunableUnits, mask: PruningMask) -> list[dict[str, Any]]:
    """For each group of units a row of a report."""
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


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
