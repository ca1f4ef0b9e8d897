"""What every one-shot method shares: a config, a pruner, and the registry that joins them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from transformers import PreTrainedModel

from ..calibration import Calibrator, Moments, from_main_process
from ..costs import CostTable
from ..errors import ConfigError, unknown
from ..gates import LayerCalls, current_mask, remove_mask, unmasked
from ..latency import latency_table
from ..masks import PruningMask
from ..reconstruction import Recovery, compensate, reconstruct
from ..selection import Allocation, Selector, check_budget
from ..timing import DEFAULT_LENGTH
from ..units import Kind, PrunableUnits, site

Recover = Recovery | Literal["none"]


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
class PruningConfig:
    """Options of all structured one-shot methods.

    Args:
        budget (`dict[str, float]`): The most that the pruned model may cost, by metric: `{"macs": 0.6}` keeps at most
            60 % of the multiply-accumulates, `{"params": 40_000_000}` at most that many parameters. Metrics: `"macs"`,
            `"params"`, `"memory"` (bytes of weights), `"latency"` (of a forward pass, in milliseconds if above 1; by
            the table that [`~hf_prune.latency_table`] measures on the model's device). Several limits hold at once.
        allocation (`"global"` or `"uniform"`, *optional*, defaults to `"global"`): Whether units compete over all
            layers, or each layer keeps equally many, in numbers that a stock config holds, so that plain transformers
            loads the result.
        multiple_of (`int`, *optional*): Keep a multiple of this many neurons in each layer. Defaults to 1; under a
            budget of latency to what is fast, 32 on a CPU and 64 elsewhere: the table knows no slower widths.
        exclude (`tuple[str, ...]`, *optional*): Shell patterns of unit groups that stay whole:
            `("encoder.layer.0.*",)`.
        sequence_length (`float`, *optional*): Tokens per example for MACs and, rounded up, for latency. Defaults to
            the mean of the calibration data, to 128 without data.
        target_length (`float`, *optional*): The same for a decoder that follows an encoder.
        drop_layers (`int`, *optional*, defaults to 0): How many layers to drop first, those of the lowest Block
            Influence on the calibration data. The budget counts them as gone, and the method prunes the others. A
            layer with a group in `exclude` stays.
        latency_batch_size (`int`, *optional*, defaults to 1): Examples in the batch for latency.

    Raises:
        ConfigError: An option is out of range.
    """

    method: ClassVar[str]

    budget: dict[str, float]
    allocation: Allocation = "global"
    multiple_of: int | None = None
    exclude: tuple[str, ...] = ()
    sequence_length: float | None = None
    target_length: float | None = None
    drop_layers: int = 0
    latency_batch_size: int = 1

    def __post_init__(self) -> None:
        check_budget(self.budget)
        self.check_choice("allocation", ("global", "uniform"))
        if type(self.drop_layers) is not int or self.drop_layers < 0:
            raise ConfigError(f"drop_layers must be a whole number of at least 0, got {self.drop_layers!r}.")
        for name in ("multiple_of", "latency_batch_size"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and (name, value) != ("multiple_of", None):
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if isinstance(self.exclude, str) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise ConfigError(f"exclude must be a tuple of shell patterns, got {self.exclude!r}.")
        self.exclude = tuple(self.exclude)
        for name in ("sequence_length", "target_length"):
            if getattr(self, name) is not None:
                self.check_positive(name)

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
    def from_dict(data: Mapping[str, Any]) -> "PruningConfig":
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
        if "budget" not in options:
            raise ConfigError(f'{cls.__name__} needs a budget such as {{"macs": 0.6}}.')
        return cls(**options)


@dataclass(kw_only=True)
class RecoverableConfig(PruningConfig):
    """Options of methods that can end with a refit of the kept weights. See [`PruningConfig`] for the others.

    Args:
        recover (`"lstsq"`, `"scale"`, `"bias"` or `"none"`, *optional*, defaults to `"none"`): How the kept output
            weights are refitted to the dense model on the calibration data: exact least squares, one factor per unit,
            the bias alone, which takes over the mean of what is pruned, or not at all. Where the model has projections
            without a bias (Llama), least squares takes the place of `"bias"`. See [`~hf_prune.reconstruct`].
        ridge (`float`, *optional*, defaults to 1e-4): How firmly least squares holds on to the old weights, as a share
            of the mean square of the inputs.
    """

    recover: Recover = "none"
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("ridge")
        self.check_choice("recover", (*get_args(Recovery), "none"))


C = TypeVar("C", bound=PruningConfig)


class Pruner(ABC, Generic[C]):
    """A one-shot structured method. It decides on a mask, and may refit weight values; it changes no shapes.

    Args:
        config ([`PruningConfig`]): Its options.

    Attributes:
        name (`str`): Its name in configs, reports and on the command line.
        config_class (`type`): Its config.
        kinds (`tuple[str, ...]`): The kinds of units that it prunes.
        needs_data (`bool`): It needs calibration data, even without a refit.
        needs_labels (`bool`): The data must have labels.
        paper ([`Paper`], *optional*): Its source.
        facts (`dict`): What a report shall say about a run beyond config and costs.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[PruningConfig]]
    kinds: ClassVar[tuple[Kind, ...]] = ("heads", "neurons")
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    paper: ClassVar[Paper | None] = None

    def __init__(self, config: C) -> None:
        self.config = config
        self.facts: dict[str, Any] = {}

    @abstractmethod
    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> PruningMask:
        """Decide what stays.

        Args:
            model (`PreTrainedModel`): The model, without the layers of `drop_layers` (it carries a mask that skips
                them) and otherwise dense. Weight values may change, as the last step, once nothing can fail.
            units ([`PrunableUnits`]): Its units.
            calibrator ([`Calibrator`], *optional*): The data, `None` only where `needs_data` is `False`.
        """

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

        `calls` and `moments` of the method's own pass over the data save one here.
        """
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
        reconstruct(model, units, mask, calibrator, recover, ridge=self.config.ridge, calls=calls)

    def recovery(self, model: PreTrainedModel, units: PrunableUnits) -> Recover:
        """How this model will be refitted: `recover` of the config, or least squares where it lacks the biases."""
        recover = self.config.recover if isinstance(self.config, RecoverableConfig) else "none"
        sites = (site(model, group) for group in units.of_kind(*self.kinds) if group.prunable)
        if recover == "bias" and any(module.bias is None for module in sites):
            self.facts["recover"] = "lstsq, as there are projections without a bias"
            return "lstsq"
        return recover

    def walks(self, model: PreTrainedModel, units: PrunableUnits) -> bool:
        """Whether the refit will want the calls of the layers, recorded on this model."""
        return self.recovery(model, units) in ("lstsq", "scale") and current_mask(model) is None

    def cost_table(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> CostTable:
        """Costs at the lengths of the config, or else of the calibration data."""
        length, target = calibrator.lengths if calibrator is not None else (DEFAULT_LENGTH, None)
        length = self.config.sequence_length or length
        target = self.config.target_length or self.config.sequence_length or target
        latency = None
        if "latency" in self.config.budget:
            with unmasked(model):
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
        """A selector with the options of the config. Raises before any computation if the budget can't be met."""
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


_PRUNERS: dict[str, type[Pruner[Any]]] = {}
P = TypeVar("P", bound=type[Pruner[Any]])


def register_pruner(name: str, config_class: type[PruningConfig]) -> Callable[[P], P]:
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
    if not issubclass(config_class, PruningConfig):
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


def get_pruner(name: str) -> type[Pruner[Any]]:
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
