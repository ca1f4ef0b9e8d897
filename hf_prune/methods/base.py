"""What every one-shot method shares: a config, a pruner, and the registry that joins them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Generic, Literal, TypeVar

from transformers import PreTrainedModel

from ..calibration import Calibrator
from ..costs import DEFAULT_LENGTH, CostTable
from ..errors import ConfigError, unknown
from ..gates import LayerCalls, apply_mask
from ..masks import PruningMask
from ..reconstruction import reconstruct
from ..report import unit_rows
from ..selection import Allocation, Selector, check_budget
from ..surgery import check_shrinkable
from ..units import Kind, PrunableUnits


@dataclass(frozen=True)
class Paper:
    """The source of a method, for reports and model cards.

    Args:
        title, venue, arxiv (`str`): Title, venue with year, and arXiv id.
    """

    title: str
    venue: str
    arxiv: str


@dataclass(kw_only=True)
class MethodConfig:
    """Options of all one-shot methods. Each method has a config of its own.

    Args:
        exclude (`tuple[str, ...]`, *optional*): Shell patterns of what stays whole.

    Raises:
        ConfigError: An option is out of range.
    """

    method: ClassVar[str]

    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise ConfigError(f"exclude must be a tuple of shell patterns, got {self.exclude!r}.")
        self.exclude = tuple(self.exclude)

    def check_choice(self, name: str, legal: tuple[Any, ...]) -> None:
        """Raise unless an option is one of the legal values."""
        if getattr(self, name) not in legal:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, legal))}, got {getattr(self, name)!r}.")

    def check_positive(self, name: str) -> None:
        """Raise unless an option is a positive finite number."""
        value = getattr(self, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{name} must be a positive number, got {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, with the name of the method."""
        return {"method": self.method, **asdict(self), "exclude": list(self.exclude)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "MethodConfig":
        """The config of the method that `data["method"]` names.

        Raises:
            ConfigError: The method or an option is unknown, or out of range.
        """
        options = dict(data)
        cls = get_pruner(str(options.pop("method", ""))).config_class
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise ConfigError(unknown(f"option of {cls.__name__}", name, known))
        for field in fields(cls):
            if field.default is MISSING and field.default_factory is MISSING and field.name not in options:
                raise ConfigError(f"{cls.__name__} needs a {field.name}: see its documentation.")
        return cls(**options)


@dataclass(kw_only=True)
class PruningConfig(MethodConfig):
    """Options of all structured one-shot methods.

    Args:
        budget (`dict[str, float]`): The most that the pruned model may cost, by metric: `{"macs": 0.6}` keeps at most
            60 % of the multiply-accumulates, `{"params": 40_000_000}` at most that many parameters. Metrics: `"macs"`,
            `"params"`, `"memory"` (bytes of weights). Several limits hold at once.
        allocation (`"global"` or `"uniform"`, *optional*, defaults to `"global"`): Whether units compete over all
            layers, or each layer keeps equally many, in numbers that a stock config holds, so that plain transformers
            loads the result.
        multiple_of (`int`, *optional*, defaults to 1): Keep a multiple of this many neurons in each layer.
        exclude (`tuple[str, ...]`, *optional*): Shell patterns of unit groups that stay whole:
            `("encoder.layer.0.*",)`.
        sequence_length (`float`, *optional*): Tokens per example for MACs. Defaults to the mean of the calibration
            data, to 128 without data.
        target_length (`float`, *optional*): The same for a decoder that follows an encoder.

    Raises:
        ConfigError: An option is out of range.
    """

    budget: dict[str, float]
    allocation: Allocation = "global"
    multiple_of: int = 1
    sequence_length: float | None = None
    target_length: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        self.check_choice("allocation", ("global", "uniform"))
        if type(self.multiple_of) is not int or self.multiple_of < 1:
            raise ConfigError(f"multiple_of must be a whole number of at least 1, got {self.multiple_of!r}.")
        for name in ("sequence_length", "target_length"):
            if getattr(self, name) is not None:
                self.check_positive(name)


@dataclass(kw_only=True)
class RecoverableConfig(PruningConfig):
    """Options of methods that can end with a refit of the kept weights. See [`PruningConfig`] for the others.

    Args:
        recover (`"lstsq"`, `"scale"` or `"none"`, *optional*, defaults to `"none"`): How the kept output weights are
            refitted to the dense model on the calibration data: exact least squares, one factor per unit, or not at
            all. See [`~hf_prune.reconstruct`].
    """

    recover: Literal["lstsq", "scale", "none"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("recover", ("lstsq", "scale", "none"))


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
        needs_labels (`bool`): The data must have labels.
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

    @abstractmethod
    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> Any:
        """Decide what stays, and return the mask."""

    @abstractmethod
    def finish(
        self, model: PreTrainedModel, units: PrunableUnits, mask: Any, calibrator: Calibrator | None
    ) -> dict[str, Any]:
        """Make the model compute the pruned function, and return what a report says about it: `before`, `after`,
        `sequence_lengths`, and the rows of what was pruned."""


C = TypeVar("C", bound=PruningConfig)


class Pruner(BasePruner[C]):
    """A one-shot structured method. It decides on a mask of units, and may refit weight values; it changes no shapes.

    Args:
        config ([`PruningConfig`]): Its options.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("heads", "neurons")

    @property
    def wants_data(self) -> bool:
        return self.needs_data or getattr(self.config, "recover", "none") != "none"

    @abstractmethod
    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> PruningMask:
        """Decide what stays.

        Args:
            model (`PreTrainedModel`): The model, unmasked. Weight values may change, as the last step, once nothing
                can fail.
            units ([`PrunableUnits`]): Its units.
            calibrator ([`Calibrator`], *optional*): The data, `None` only where `needs_data` is `False`.
        """

    def finish(
        self, model: PreTrainedModel, units: PrunableUnits, mask: PruningMask, calibrator: Calibrator | None
    ) -> dict[str, Any]:
        check_shrinkable(units, mask)
        table = self.cost_table(model, units, calibrator)
        apply_mask(model, mask)
        return {
            "before": table.of().to_dict(),
            "after": table.of(mask).to_dict(),
            "sequence_lengths": table.lengths,
            "units": unit_rows(units, mask),
        }

    def recover(
        self,
        model: PreTrainedModel,
        units: PrunableUnits,
        mask: PruningMask,
        calibrator: Calibrator | None,
        calls: list[dict[str, LayerCalls]] | None = None,
    ) -> None:
        """Refit the kept weights as the config says: the last step of [`~Pruner.prune`]."""
        recover = self.config.recover if isinstance(self.config, RecoverableConfig) else "none"
        if recover != "none":
            assert calibrator is not None
            reconstruct(model, units, mask, calibrator, recover, calls=calls)

    def cost_table(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> CostTable:
        """Costs at the lengths of the config, or else of the calibration data."""
        length, target = calibrator.lengths if calibrator is not None else (DEFAULT_LENGTH, None)
        return CostTable(
            model,
            units,
            sequence_length=self.config.sequence_length or length,
            target_length=self.config.target_length or self.config.sequence_length or target,
        )

    def selector(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> Selector:
        """A selector with the options of the config. Raises before any computation if the budget can't be met."""
        return Selector(
            self.cost_table(model, units, calibrator),
            self.config.budget,
            self.kinds,
            allocation=self.config.allocation,
            multiple_of=self.config.multiple_of,
            exclude=self.config.exclude,
            config=model.config,
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
        raise ConfigError(f"The config of {name!r} must subclass PruningConfig, got {config_class.__name__}.")

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
