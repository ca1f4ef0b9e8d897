"""The options of one-shot methods."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from ..errors import ConfigError, check_positive, check_whole, unknown
from ..layer_walk import Recovery
from ..selection import Allocation, check_budget

Recover = Recovery | Literal["none"]


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
        """Raise unless an option is one of the legal values.

        Args:
            name (`str`): The option.
            legal (`tuple`): Its values.

        Raises:
            ConfigError: It is not; the message names the option and its values.
        """
        if getattr(self, name) not in legal:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, legal))}, got {getattr(self, name)!r}.")

    def check_positive(self, name: str) -> None:
        """Raise unless an option is a positive finite number.

        Args:
            name (`str`): The option.

        Raises:
            ConfigError: It is not.
        """
        check_positive(**{name: getattr(self, name)})

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, with the name of the method."""
        return {"method": self.method, **asdict(self), "exclude": list(self.exclude)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "MethodConfig":
        """The config of the method that `data["method"]` names.

        Args:
            data (`dict`): What [`~MethodConfig.to_dict`] returned. Options that are missing have their defaults.

        Returns:
            [`MethodConfig`]: Of the class that the method was registered with.

        Raises:
            ConfigError: The method or an option is unknown, or out of range; or one without a default is missing.
        """
        from .base import get_pruner  # which need the configs

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

    budget: dict[str, float]
    allocation: Allocation = "global"
    multiple_of: int | None = None
    sequence_length: float | None = None
    target_length: float | None = None
    drop_layers: int = 0
    latency_batch_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        self.check_choice("allocation", ("global", "uniform"))
        check_whole(0, drop_layers=self.drop_layers)
        check_whole(1, latency_batch_size=self.latency_batch_size)
        if self.multiple_of is not None:
            check_whole(1, multiple_of=self.multiple_of)
        for name in ("sequence_length", "target_length"):
            if getattr(self, name) is not None:
                self.check_positive(name)


@dataclass(kw_only=True)
class RecoverableConfig(PruningConfig):
    """Options of methods that can end with a refit of the kept weights. See [`PruningConfig`] for the others.

    Args:
        recover (`"lstsq"`, `"lstsq_outputs"`, `"scale"`, `"bias"` or `"none"`, *optional*, defaults to `"none"`): How
            what is kept is refitted to the dense model on the calibration data: exact least squares for all
            projections of the pruned blocks, or for their output projections alone, one factor per unit, the bias
            alone, which takes over the mean of what is pruned, or not at all. Where the model has projections without
            a bias (Llama), least squares takes the place of `"bias"`. See [`~hf_prune.reconstruct`].
        ridge (`float`, *optional*, defaults to 1.0): How firmly least squares holds on to the old weights: as much as
            that many tokens for each input of a projection would, see [`ridge_solve`].
        precision (`"float32"` or `"float64"`, *optional*, defaults to `"float32"`): Of the products of one batch in
            the refits. They are summed, and the equations solved, in float64 in any case.

    Raises:
        ConfigError: An option is out of range.
    """

    recover: Recover = "none"
    ridge: float = 1.0
    precision: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("ridge")
        self.check_choice("precision", ("float32", "float64"))
        self.check_choice("recover", (*get_args(Recovery), "none"))
