"""[`ParetoFront`]: what a search found, from the smallest sub-network to the best one."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from transformers import PreTrainedModel

from ..costs import METRICS, Costs, Metric
from ..errors import ConfigError, InfeasibleBudgetError, PruningError, SaveError
from ..hub import save_pretrained
from ..masks import PruningMask
from ..plots import plot_front
from ..processes import from_main_process
from ..report import REPORT_FILE, PruningReport, package_versions, unit_rows
from ..selection import resolve_budget
from ..surgery import shrunk_copy
from ..units import KINDS, prunable_units
from .base import PAPER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRONT_FILE = "pareto_front.json"
_VERSION = 1


def pareto_optimal(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one dominates, both coordinates the lower the better. Of equal points the first counts.

    Args:
        points (sequence of `tuple[float, float]`): The points, in any order.

    Returns:
        `list[bool]`: In the order of the points.
    """
    optimal = [False] * len(points)
    lowest = float("inf")
    for index in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if points[index][1] < lowest:
            optimal[index], lowest = True, points[index][1]
    return optimal


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float] = (2.0, 2.0)) -> float:
    """The area between points and a reference that they dominate, both coordinates the lower the better.

    Points beyond the reference add nothing. With coordinates from 0 to 1 and the reference (2, 2) of Klein et al.,
    4 is perfect.

    Args:
        points (sequence of `tuple[float, float]`): The points, in any order; dominated ones change nothing.
        reference (`tuple[float, float]`, *optional*, defaults to (2.0, 2.0)): The corner.

    Returns:
        `float`: 0 where no point lies below the reference.
    """
    area, ceiling = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area


@dataclass(frozen=True)
class SubNetwork:
    """A sub-network that was evaluated.

    Args:
        member (`dict[str, int]`): Its numbers in the search space.
        error (`float`): Its error on the validation data.
        costs (`dict[str, float]`): Its `macs`, `params`, `memory`, and where it was asked for `latency`.
        mask ([`PruningMask`], *optional*): What it keeps. A file holds the masks of the front alone.
    """

    member: dict[str, int]
    error: float
    costs: dict[str, float]
    mask: PruningMask | None = None


class ParetoFront(Sequence[SubNetwork]):
    """The sub-networks of a search that no other one beats in error and in cost, in the order of their cost.

    Args:
        evaluated (sequence of [`SubNetwork`]): All that were evaluated; those of the front with masks.
        dense (`dict[str, float]`): Costs of the whole model.
        cost (`"params"`, `"macs"`, `"memory"` or `"latency"`, *optional*, defaults to `"params"`): The second
            objective.
        lengths (`dict[str, float]`, *optional*): For each stack the tokens per example at which MACs were counted.
        facts (`dict`, *optional*): How the search was done. JSON-serialisable.

    Examples:
        ```python
        >>> print(front)
        >>> small = front.extract(front.select({"params": 0.5}), model)
        >>> small.save_pretrained("small")
        ```
    """

    def __init__(
        self,
        evaluated: Sequence[SubNetwork],
        dense: Mapping[str, float],
        *,
        cost: Metric = "params",
        lengths: Mapping[str, float] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.dense, self.cost = dict(dense), cost
        self.lengths, self.facts = dict(lengths or {}), dict(facts or {})
        self.evaluated = sorted(evaluated, key=lambda point: (point.costs[cost], point.error))
        optimal = pareto_optimal(self._objectives(self.evaluated))
        self._points = [point for point, best in zip(self.evaluated, optimal, strict=True) if best]

    @overload
    def __getitem__(self, index: int) -> SubNetwork: ...
    @overload
    def __getitem__(self, index: slice) -> list[SubNetwork]: ...
    def __getitem__(self, index: int | slice) -> SubNetwork | list[SubNetwork]:
        return self._points[index]

    def __len__(self) -> int:
        return len(self._points)

    def _objectives(self, points: Sequence[SubNetwork]) -> list[tuple[float, float]]:
        return [(point.costs[self.cost] / self.dense[self.cost], point.error) for point in points]

    @property
    def dense_error(self) -> float | None:
        """The error of the whole model. `None` where it was not evaluated, or is not finite."""
        whole = [point.error for point in self.evaluated if point.costs[self.cost] == self.dense[self.cost]]
        return min(whole, default=self.facts.get("dense_error"))

    # Looking at it

    def table(self) -> str:
        """The front as Markdown: costs relative to the whole model, units kept, and errors."""
        metrics = [metric for metric in METRICS if metric in self.dense]
        kinds = [kind for kind in KINDS if self._points[0].mask is not None and self._points[0].mask.total(kind)]
        head = ["#", *metrics, *kinds, "error"]
        rows = []
        for index, point in enumerate(self):
            shares = [f"{point.costs[metric] / self.dense[metric]:.1%}" for metric in metrics]
            kept = [f"{point.mask.kept(kind):,}" for kind in kinds if point.mask is not None]
            rows.append([str(index), *shares, *kept, f"{point.error:.4f}"])
        lines = [head, ["---:"] * len(head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __str__(self) -> str:
        return (
            f"{len(self)} of {len(self.evaluated)} evaluated sub-networks are on the front of error and {self.cost}, "
            f"hypervolume {self.hypervolume():.4f}.\n\n{self.table()}"
        )

    def plot(
        self, path: str | os.PathLike[str], baselines: Mapping[str, tuple[float, float]] | None = None
    ) -> "Figure":
        """Draw error against cost: all evaluated sub-networks, the front, and the whole model if its error is known.

        Args:
            path (`str` or path): Where to write it. The suffix chooses the format: `.png`, `.svg`, `.pdf`.
            baselines (`dict[str, tuple[float, float]]`, *optional*): Other models to mark by name: their cost, as a
                ratio to that of the whole model, and their error.

        Returns:
            `matplotlib.figure.Figure`: The figure that was written.

        Raises:
            ConfigError: Nothing was evaluated.
        """
        marked = dict(baselines or {})
        if self.dense_error is not None:
            marked = {"dense": (1.0, self.dense_error), **marked}
        return plot_front(self._objectives(self.evaluated), self._objectives(self), path, marked, self.cost)

    def hypervolume(self, reference: tuple[float, float] = (2.0, 2.0)) -> float:
        """The area that the front dominates, of (cost, error); the higher the better.

        The cost counts as a ratio to that of the whole model, the error as it is: with errors from 0 to 1, such as
        1 - accuracy, values of searches with the same data and model compare. Klein et al. 2024 spread both evenly
        over [0, 1] by their ranks in all runs of all methods instead, so that their figures compare with no others.

        Args:
            reference (`tuple[float, float]`, *optional*, defaults to (2.0, 2.0)): Cost and error of the corner. Choose
                another error for losses and perplexities.
        """
        return hypervolume(self._objectives(self), reference)

    # Taking sub-networks out

    def select(self, budget: Mapping[str, float]) -> int:
        """The index of the point with the lowest error within a budget.

        Args:
            budget (`dict[str, float]`): As for pruning: `{"params": 0.5}`, `{"macs": 2e9}`.

        Returns:
            `int`: Of equal errors that of the cheapest point.

        Raises:
            ConfigError: The budget is malformed.
            InfeasibleBudgetError: All points cost more; the message names the nearest feasible budget.
        """
        limits = resolve_budget(budget, Costs(**self.dense))
        within = [i for i, p in enumerate(self) if all(p.costs[metric] <= limit for metric, limit in limits.items())]
        if not within:
            least = {m: round(min(p.costs[m] for p in self) / self.dense[m] + 5e-5, 4) for m in limits}
            raise InfeasibleBudgetError(
                f"No point of the front costs at most {dict(budget)}: the cheapest ones are at {least}. Search in a "
                "space with smaller members, or for longer."
            )
        return min(within, key=lambda i: (self[i].error, self[i].costs[self.cost]))

    def extract(self, index: int, model: PreTrainedModel) -> PreTrainedModel:
        """The sub-network of a point as a model of its own: shrunk, to be trained further or saved as any other.

        Args:
            index (`int`): Of the point.
            model (`PreTrainedModel`): The model that was searched. It stays as it is.

        Returns:
            `PreTrainedModel`: Of the same class, with copies of the weights.

        Raises:
            MaskError: The front was found in another model.
        """
        return shrunk_copy(model, self._mask(index))

    def report(self, index: int, model: PreTrainedModel) -> PruningReport:
        """What a point is, how it was found, and its quality next to the whole model's on the data of the search.

        Where the search counted latency, the report has that of the point as predicted (`after["latency"]`), and the
        measured blocks that it is a sum of (`latency["table"]`). The point as a whole was not timed.

        Args:
            index (`int`): Of the point.
            model (`PreTrainedModel`): The model that was searched.

        Returns:
            [`PruningReport`]: Of the method `"nas"`. Without an evaluation where the whole model's error is not known,
            or the sub-networks were trained.

        Raises:
            UnsupportedModelError: The model can't be pruned.
        """
        units, point, facts = prunable_units(model), self[index], dict(self.facts)
        latency = facts.pop("latency", None)
        return PruningReport(
            method="nas",
            config={"method": "nas", **facts},
            model_class=type(model).__name__,
            model_type=units.model_type,
            before=self.dense,
            after=point.costs,
            sequence_lengths=self.lengths,
            units=unit_rows(units, self._mask(index)),
            facts={"error": point.error, "evaluated": len(self.evaluated)},
            evaluation=self._evaluation(point),
            latency=latency and {"before": None, "after": None, "multiple_of": 1, **latency},
            papers=[asdict(PAPER)],
            packages=package_versions("optuna"),
        )

    def _evaluation(self, point: SubNetwork) -> list[dict[str, Any]]:
        if self.dense_error is None or "metric" not in self.facts or self.facts.get("trained"):
            return []
        data = self.facts.get("data")
        metric = self.facts["metric"] if data is not None else "error"
        before, after = self.dense_error, point.error
        if self.facts.get("greater_is_better"):
            before, after = 1 - before, 1 - after
        # Without the name of the data: the point was chosen by them, and the Hub would rank it by this figure.
        row = {"metric": metric, "before": before, "after": after}
        return [row | {"n": data["samples"]} if data is not None else row]

    def save_models(
        self, folder: str | os.PathLike[str], model: PreTrainedModel, *, processing_class: Any = None
    ) -> list[Path]:
        """Write every point to a folder of its own, `00`, `01`, ..., with its mask and report, and the front itself.

        Args:
            folder (`str` or path): Where the folders go.
            model (`PreTrainedModel`): The model that was searched. It stays as it is.
            processing_class (*optional*): Tokenizer or processor to save beside each.

        Returns:
            `list[Path]`: The folders.

        Raises:
            ConfigError: The front is of [`standard_nas`], whose trained sub-networks were not kept.
            MaskError: The front was found in another model.
            SaveError: One can't be written, or did not reload to the same function.

        Points of a larger front that was written here before are removed. With several processes call it in all: the
        main one writes, the others wait.
        """
        if self.facts.get("trained"):
            raise ConfigError(
                "The errors of this front are those of trained sub-networks, which were not kept. Train the ones that "
                "you want again, front.extract(index, model), and save them; front.save(folder) writes the front."
            )
        return from_main_process(lambda: self._write_models(Path(folder), model, processing_class))

    def _write_models(self, folder: Path, model: PreTrainedModel, processing_class: Any) -> list[Path]:
        try:
            before = len(ParetoFront.load(folder))
        except PruningError:
            before = 0
        folders = [folder / f"{index:02d}" for index in range(max(before, len(self)))]
        for index, target in enumerate(folders[: len(self)]):
            save_pretrained(
                self.extract(index, model),
                target,
                processing_class=processing_class,
                mask=self._mask(index),
                report=self.report(index, model),
            )
        for old in folders[len(self) :]:
            if (old / REPORT_FILE).exists():  # a point, and nothing of somebody else's
                shutil.rmtree(old)
        self._write(folder)
        return folders[: len(self)]

    def _mask(self, index: int) -> PruningMask:
        mask = self[index].mask
        assert mask is not None
        return mask

    # Files

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write to `pareto_front.json` in a folder, which is made if need be; the file is there whole or not at all.

        With several processes call it in all: the main one writes, the others wait.

        Args:
            folder (`str` or path): The folder.

        Raises:
            SaveError: It can't be written.
        """
        from_main_process(lambda: self._write(Path(folder)))

    def _write(self, folder: Path) -> None:
        front = {id(point) for point in self}
        points = [
            {
                "member": list(point.member.values()),
                "error": point.error,
                "costs": point.costs,
                "mask": point.mask.to_dict() if point.mask is not None and id(point) in front else None,
            }
            for point in self.evaluated
        ]
        data = {
            "version": _VERSION,
            "cost": self.cost,
            "dense": self.dense,
            "lengths": self.lengths,
            "facts": self.facts,
            "parameters": list(self.evaluated[0].member),
            "points": points,
        }
        path = folder / FRONT_FILE
        part = path.with_name(f".{FRONT_FILE}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(data), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise SaveError(f"Can't write the front to {path}: {error}.") from error

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ParetoFront":
        """Read what [`~ParetoFront.save`] wrote.

        Args:
            folder (`str` or path): The folder, such as that of [`~ParetoFront.save_models`].

        Returns:
            [`ParetoFront`]: Points that are not on it have no masks.

        Raises:
            PruningError: There is no such file, or it holds no front.
        """
        path = Path(folder) / FRONT_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != _VERSION:
                raise PruningError(
                    f"{path} has version {data['version']!r}, this hf_prune reads {_VERSION}: update hf_prune."
                )
            points = [
                SubNetwork(
                    dict(zip(data["parameters"], point["member"], strict=True)),
                    point["error"],
                    point["costs"],
                    PruningMask.from_dict(point["mask"]) if point["mask"] is not None else None,
                )
                for point in data["points"]
            ]
            return cls(points, data["dense"], cost=data["cost"], lengths=data["lengths"], facts=data["facts"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PruningError(f"{path} holds no Pareto front: {error}.") from error
