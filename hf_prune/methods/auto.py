"""Several methods under one budget: the one whose predictions stay closest to the dense model's is kept."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration import Calibrator
from ..divergence import divergence, predictions
from ..errors import ConfigError, PruningError, check_whole
from ..gates import apply_mask, current_mask, remove_mask
from ..masks import PruningMask
from ..units import PrunableUnits, base_model
from .base import Pruner, get_pruner, register_pruner
from .config import PruningConfig, Recover, RecoverableConfig

SHARED = tuple(field.name for field in fields(PruningConfig) if field.name != "drop_layers")


@dataclass(kw_only=True)
class AutoPruningConfig(RecoverableConfig):
    """Options of the automatic choice of a method. See [`PruningConfig`] for those that all candidates share.

    Args:
        candidates (`tuple`, *optional*, defaults to `("kprune", "flap", "kcm", "magnitude")`): The methods: names, or
            dicts of a name and options of its own, such as `{"method": "kcm", "sigma": "median"}`. A candidate that
            can't meet the budget is reported and passed over. Fisher needs labelled data.
        held_out (`int`, *optional*, defaults to 5): Each how-manyth example is held out to compare the candidates; the
            others are their calibration data.
        recover (`"lstsq"`, `"lstsq_outputs"`, `"scale"`, `"bias"` or `"none"`, *optional*, defaults to `"lstsq"`): How
            every candidate that can ends, see [`RecoverableConfig`].

    Raises:
        ConfigError: An option is out of range, or a candidate is unknown, has wrong options, or zeroes single weights.
    """

    candidates: tuple[str | Mapping[str, Any], ...] = ("kprune", "flap", "kcm", "magnitude")
    held_out: int = 5
    recover: Recover = "lstsq"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(2, held_out=self.held_out)
        if isinstance(self.candidates, str | Mapping) or not self.candidates:
            raise ConfigError(f"candidates must be a tuple of methods, got {self.candidates!r}.")
        self.candidates = tuple(self.candidates)
        self.configs()

    def configs(self) -> list[PruningConfig]:
        """The configs of the candidates.

        Returns:
            `list[PruningConfig]`: In the order of `candidates`, with the shared options.

        Raises:
            ConfigError: A method or an option is unknown or out of range; an option is that of all candidates; a
                method is `"auto"` itself, or zeroes single weights.
        """
        configs: list[PruningConfig] = []
        for candidate in self.candidates:
            own = {"method": candidate} if isinstance(candidate, str) else dict(candidate)
            taken = [name for name in own if name in (*SHARED, "drop_layers")]
            if taken or own.get("method") == self.method:
                what = f"set {taken[0]}: it is that of all candidates" if taken else "be 'auto' itself"
                raise ConfigError(f"The candidate {candidate!r} can't {what}.")
            known = {field.name for field in fields(get_pruner(str(own.get("method"))).config_class)}
            shared = {
                name: getattr(self, name) for name in (*SHARED, "recover", "ridge", "precision") if name in known
            }
            config = PruningConfig.from_dict(shared | own)
            if not isinstance(config, PruningConfig):
                raise ConfigError(f"The candidate {candidate!r} zeroes single weights: it meets no budget.")
            configs.append(config)
        return configs


@register_pruner("auto", AutoPruningConfig)
class AutoPruner(Pruner[AutoPruningConfig]):
    """Runs several methods under one budget and keeps the result with the lowest divergence (KL, or squared error)
    from the dense model on held-out calibration data. Holds a second copy of the model.
    """

    def __init__(self, config: AutoPruningConfig) -> None:
        super().__init__(config)
        self.candidates = [get_pruner(candidate.method)(candidate) for candidate in config.configs()]

    @property
    def wants_labels(self) -> bool:
        return any(pruner.wants_labels for pruner in self.candidates)

    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> PruningMask:
        assert calibrator is not None
        fit, held_out = calibrator.split(self.config.held_out)
        dropped = current_mask(model) or PruningMask({}, units)
        dense = copy.deepcopy(model).eval()
        remove_mask(dense)
        rows: list[dict[str, Any]] = []
        best: tuple[float, PruningMask, list[torch.Tensor]] | None = None
        failure: PruningError | None = None
        for pruner in self.candidates:
            started = time.perf_counter()
            row: dict[str, Any] = {"config": pruner.config.to_dict()}
            rows.append(row)
            try:
                apply_mask(model, dropped)
                mask = pruner.prune(model, units, fit) & dropped
                apply_mask(model, mask)
                row["divergence"] = mean_divergence(dense, held_out)
                if best is None or row["divergence"] < best[0]:
                    best = row["divergence"], mask, [p.detach().clone() for p in _refitted(model, units)]
            except PruningError as error:
                row["error"], failure = str(error), failure or error
            finally:
                remove_mask(model)
                _write(_refitted(model, units), _refitted(dense, units))
            row["seconds"], row["facts"] = round(time.perf_counter() - started, 3), pruner.facts
        if best is None:
            assert failure is not None
            raise failure
        _write(_refitted(model, units), best[2])
        self.facts["candidates"] = rows
        self.facts["chosen"] = next(i for i, row in enumerate(rows) if row.get("divergence") == best[0])
        return best[1]


def mean_divergence(dense: PreTrainedModel, calibrator: Calibrator) -> float:
    """The mean divergence of the predictions of the calibrator's model from those of another one.

    Args:
        dense (`PreTrainedModel`): The other one, of the same class.
        calibrator ([`Calibrator`]): The data, and the model.

    Returns:
        `float`: Over all predictions and processes: KL at temperature 1, or the squared error, see
        [`~hf_prune.divergence.divergence`].

    Raises:
        CalibrationError: It is NaN or infinite.
        UnsupportedModelError: The head makes predictions that can't be compared.
    """
    sums = _Sums(calibrator.model.device)
    last = list(calibrator.units.stacks)[-1]
    with calibrator.evaluating():
        for _, batch in calibrator.batches("compare with the dense model"):
            real = calibrator.real_tokens(batch, last)
            pair = [predictions(m, calibrator.forward(batch, m), real) for m in (calibrator.model, dense)]
            for student, teacher in zip(*pair, strict=True):
                sums.update(divergence(student, teacher))
    calibrator.reduce({"the predictions": sums})
    return float(sums.total / sums.count)


class _Sums:
    def __init__(self, device: torch.device) -> None:
        self.total, self.count = torch.zeros(2, dtype=torch.float64, device=device).unbind()

    def update(self, values: torch.Tensor) -> None:
        self.total += values.sum(dtype=torch.float64)
        self.count += len(values)

    def sums(self) -> list[torch.Tensor]:
        return [self.total, self.count]


def _refitted(model: PreTrainedModel, units: PrunableUnits) -> list[torch.Tensor]:
    """The parameters that a refit may change."""
    return [p for stack in units.stacks for p in base_model(model).get_submodule(stack).parameters()]


@torch.no_grad()
def _write(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
