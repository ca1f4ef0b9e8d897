"""What every one-shot method shares: a pruner, and the registry that joins it with a config."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from transformers import PreTrainedModel

from ..calibration import Calibrator
from ..costs import CostTable
from ..depth import drop_layers
from ..errors import ConfigError, unknown
from ..gates import LayerCalls, apply_mask, current_mask, remove_mask, without_mask
from ..latency import latency_table, measure_pruned
from ..masks import PruningMask
from ..processes import from_main_process
from ..reconstruction import compensate, reconstruct
from ..report import unit_rows
from ..selection import Selector
from ..statistics import Moments
from ..surgery import check_shrinkable
from ..timing import DEFAULT_LENGTH
from ..units import Kind, PrunableUnits, site
from .config import MethodConfig, PruningConfig, Recover, RecoverableConfig


@dataclass(frozen=True)
class Paper:
    """The source of a method, for reports and model cards.

    Args:
        title, venue, arxiv (`str`): Title, venue with year, and arXiv id.
        authors (`str`, *optional*): As BibTeX has them, with `and` between them.
        url (`str`, *optional*): Where it is, if not on arXiv.
    """

    title: str
    venue: str
    arxiv: str
    authors: str = ""
    url: str = ""


M = TypeVar("M", bound=MethodConfig)


class BasePruner(ABC, Generic[M]):
    """A one-shot method: it decides on a mask, and puts it on the model. [`Pruner`] masks units, [`WeightPruner`]
    zeroes single weights.

    Args:
        config ([`MethodConfig`]): Its options.

    Attributes:
        name (`str`): Its name in configs, reports and on the command line.
        config_class (`type`): Its config.
        kinds (`tuple[str, ...]`): The kinds of units that it prunes, if any.
        needs_data (`bool`): It needs calibration data, whatever its options.
        needs_labels (`bool`): The data must have labels, whatever its options.
        prunes_offloaded (`bool`): The weights of the model may be offloaded.
        paper ([`Paper`], *optional*): Its source.
        facts (`dict`): What a report shall say about a run beyond config and costs.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[MethodConfig]]
    kinds: ClassVar[tuple[Kind, ...]] = ()
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    prunes_offloaded: ClassVar[bool] = False
    paper: ClassVar[Paper | None] = None

    def __init__(self, config: M) -> None:
        self.config = config
        self.facts: dict[str, Any] = {}

    @property
    def wants_data(self) -> bool:
        """It needs calibration data with these options."""
        return self.needs_data

    @property
    def wants_labels(self) -> bool:
        """The data must have labels with these options."""
        return self.needs_labels

    @abstractmethod
    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> Any:
        """Decide what stays, and return the mask.

        Args:
            model (`PreTrainedModel`): The model.
            units ([`PrunableUnits`]): Its units.
            calibrator ([`Calibrator`], *optional*): The data. `None` only where `wants_data` is `False`.

        Returns:
            [`PruningMask`] or [`WeightMask`].
        """

    def run(
        self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None
    ) -> tuple[Any, dict[str, Any]]:
        """[`~BasePruner.prune`] and [`~BasePruner.finish`].

        Args:
            model, units, calibrator: As in [`~BasePruner.prune`].

        Returns:
            The mask, and what a report says about it.
        """
        mask = self.prune(model, units, calibrator)
        return mask, self.finish(model, units, mask, calibrator)

    @abstractmethod
    def finish(
        self, model: PreTrainedModel, units: PrunableUnits, mask: Any, calibrator: Calibrator | None
    ) -> dict[str, Any]:
        """Make the model compute the pruned function, and return what a report says about it.

        Args:
            model, units, calibrator: As in [`~BasePruner.prune`].
            mask ([`PruningMask`] or [`WeightMask`]): What stays.

        Returns:
            `dict[str, Any]`: Fields of [`PruningReport`]: `before`, `after`, `sequence_lengths`, and the rows of what
            was pruned.
        """


C = TypeVar("C", bound=PruningConfig)


class Pruner(BasePruner[C]):
    """A one-shot structured method. It decides on a mask of units, and may refit weight values; it changes no shapes.

    Args:
        config ([`PruningConfig`]): Its options.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("heads", "neurons")

    @property
    def wants_data(self) -> bool:
        return self.needs_data or bool(self.config.drop_layers) or getattr(self.config, "recover", "none") != "none"

    @abstractmethod
    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> PruningMask:
        """Decide what stays.

        Args:
            model (`PreTrainedModel`): The model, without the layers of `drop_layers` (it carries a mask that skips
                them) and otherwise dense. Weight values may change, as the last step, once nothing can fail.
            units ([`PrunableUnits`]): Its units.
            calibrator ([`Calibrator`], *optional*): The data, `None` only where `needs_data` is `False`.

        Returns:
            [`PruningMask`]: What stays. That the layers of `drop_layers` go is added to it.
        """

    def run(
        self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None
    ) -> tuple[PruningMask, dict[str, Any]]:
        if not self.config.drop_layers:
            return super().run(model, units, calibrator)
        assert calibrator is not None
        dropped, self.facts["block_influence"] = drop_layers(calibrator, self.config.drop_layers, self.config.exclude)
        try:
            apply_mask(model, dropped)
            mask = self.prune(model, units, calibrator) & dropped
        finally:
            remove_mask(model)
        return mask, self.finish(model, units, mask, calibrator)

    def finish(
        self, model: PreTrainedModel, units: PrunableUnits, mask: PruningMask, calibrator: Calibrator | None
    ) -> dict[str, Any]:
        check_shrinkable(units, mask)
        table = self.cost_table(model, units, calibrator)
        timed, latency = table.latency, None
        if timed is not None:
            latency = {
                **from_main_process(lambda: measure_pruned(model, mask, timed)),
                "where": timed.where,
                "multiple_of": self.config.multiple_of or timed.multiple_of,
                "table": str(timed).splitlines(),
            }
        apply_mask(model, mask)
        return {
            "before": table.of().to_dict(),
            "after": table.of(mask).to_dict(),
            "sequence_lengths": table.lengths,
            "units": unit_rows(units, mask),
            "latency": latency,
        }

    def recover(
        self,
        model: PreTrainedModel,
        units: PrunableUnits,
        mask: PruningMask,
        calibrator: Calibrator | None,
        calls: list[dict[str, LayerCalls]] | None = None,
        moments: Mapping[str, Moments] | None = None,
    ) -> None:
        """Refit the kept weights as the config says: the last step of [`~Pruner.prune`].

        Args:
            model, units, calibrator: As in [`~Pruner.prune`].
            mask ([`PruningMask`]): What stays.
            calls, moments (*optional*): Of the method's own pass over the data: they save one here.

        Raises:
            MaskError: This family can't lose what the mask prunes. No weight has changed.
        """
        check_shrinkable(units, mask)
        recover = self.recovery(model, units)
        if recover == "none":
            return
        assert calibrator is not None
        if recover == "bias":
            compensate(model, units, mask, calibrator, moments)
            return
        dropped = current_mask(model)
        if dropped is not None:  # the teacher has all layers, and what it hands to a decoder is the dense encoder's
            mask, calls = mask & dropped, None
            remove_mask(model)
        assert isinstance(self.config, RecoverableConfig)
        dtype = getattr(torch, self.config.precision)
        reconstruct(model, units, mask, calibrator, recover, ridge=self.config.ridge, dtype=dtype, calls=calls)

    def recovery(self, model: PreTrainedModel, units: PrunableUnits) -> Recover:
        """How this model will be refitted: `recover` of the config, or least squares where it lacks the biases.

        Args:
            model (`PreTrainedModel`): The model.
            units ([`PrunableUnits`]): Its units.

        Returns:
            `str`: `"lstsq"`, `"lstsq_outputs"`, `"scale"`, `"bias"` or `"none"`. If it is not what the config says,
                `facts` says why.
        """
        recover = self.config.recover if isinstance(self.config, RecoverableConfig) else "none"
        sites = (site(model, group) for group in units.of_kind(*self.kinds) if group.prunable)
        if recover == "bias" and any(module.bias is None for module in sites):
            self.facts["recover"] = "lstsq, as there are projections without a bias"
            return "lstsq"
        return recover

    def walks(self, model: PreTrainedModel, units: PrunableUnits) -> bool:
        """Whether the refit will want the calls of the layers, recorded on this model.

        Args:
            model, units: As in [`~Pruner.recovery`].

        Returns:
            `bool`: What to pass to [`Calibrator.collect`] as `record`, where the method makes a pass over the data of
            its own.
        """
        return self.recovery(model, units) in ("lstsq", "lstsq_outputs", "scale") and current_mask(model) is None

    def cost_table(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> CostTable:
        """Costs at the lengths of the config, or else of the calibration data.

        Args:
            model (`PreTrainedModel`): The model. Under a budget of latency it is measured, or its table read.
            units ([`PrunableUnits`]): Its units.
            calibrator ([`Calibrator`], *optional*): The data. Without them, and without lengths in the config, 128
                tokens.

        Returns:
            [`CostTable`]: The same in all processes. For latency lengths are rounded up.

        Raises:
            ConfigError: The latency of this model can't be measured.
        """
        length, target = calibrator.lengths if calibrator is not None else (DEFAULT_LENGTH, None)
        length = self.config.sequence_length or length
        target = self.config.target_length or self.config.sequence_length or target
        latency = None
        if "latency" in self.config.budget:
            with without_mask(model):
                latency = from_main_process(
                    lambda: latency_table(
                        model,
                        units,
                        batch_size=self.config.latency_batch_size,
                        sequence_length=math.ceil(length),
                        target_length=None if target is None else math.ceil(target),
                    )
                )
        return CostTable(model, units, sequence_length=length, target_length=target, latency=latency)

    def selector(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> Selector:
        """A selector with the options of the config. Raises before any computation if the budget can't be met.

        Args:
            model, units, calibrator: As in [`~Pruner.cost_table`].

        Returns:
            [`~hf_prune.selection.Selector`]: For the units of the method's `kinds`, without layers that are dropped
            already.

        Raises:
            ConfigError: The budget is malformed or above the cost of the model, `exclude` matches nothing, or there is
                nothing left to prune.
            InfeasibleBudgetError: The budget lies below the floor; the message names the nearest feasible one.
        """
        table = self.cost_table(model, units, calibrator)
        return Selector(
            table,
            self.config.budget,
            self.kinds,
            allocation=self.config.allocation,
            multiple_of=self.config.multiple_of or (table.latency.multiple_of if table.latency is not None else 1),
            exclude=self.config.exclude,
            config=model.config,
            base=current_mask(model),
        )


_PRUNERS: dict[str, type[BasePruner[Any]]] = {}
P = TypeVar("P", bound=type[BasePruner[Any]])


def register_pruner(name: str, config_class: type[MethodConfig]) -> Callable[[P], P]:
    """Class decorator that makes a method known by its config and its name.

    Args:
        name (`str`): Lower case, unique.
        config_class (`type`): Its config, used by no other method.

    Raises:
        ConfigError: The name or the config is taken, or malformed.

    Examples:
        ```python
        @register_pruner("mine", MyConfig)
        class MyPruner(Pruner[MyConfig]):
            def prune(self, model, units, calibrator):
                selector = self.selector(model, units, calibrator)
                return selector.select({group.name: my_scores(group) for group in selector.groups})
        ```
    """
    if name != name.lower() or not name.isidentifier():
        raise ConfigError(f"The name of a method is a lower-case identifier, got {name!r}.")
    if not issubclass(config_class, MethodConfig):
        raise ConfigError(f"The config of {name!r} must subclass MethodConfig, got {config_class.__name__}.")

    def register(cls: P) -> P:
        for other in _PRUNERS.values():
            if other.__qualname__ != cls.__qualname__ and (other.name == name or other.config_class is config_class):
                raise ConfigError(f"{name!r} with {config_class.__name__} collides with the method {other.name!r}.")
        cls.name, cls.config_class = name, config_class
        config_class.method = name
        _PRUNERS[name] = cls
        return cls

    return register


def get_pruner(name: str) -> type[BasePruner[Any]]:
    """The method of a name.

    Raises:
        ConfigError: There is none.
    """
    if name not in _PRUNERS:
        raise ConfigError(unknown("pruning method", name, _PRUNERS))
    return _PRUNERS[name]


def known_pruners() -> list[str]:
    """Names of the registered methods, sorted."""
    return sorted(_PRUNERS)
