"""[`prune`]: config and data in, masked model and report out."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from .calibration import Calibrator
from .errors import CalibrationError, ConfigError, UnsupportedModelError
from .gates import current_mask
from .methods import MethodConfig, get_pruner
from .offload import refuse_offloaded, resident
from .processes import process_state
from .report import PruningReport
from .units import PrunableUnits, base_model, forget_gguf, prunable_units


@dataclass(frozen=True)
class PruningResult:
    """What [`prune`] returns.

    Args:
        mask ([`PruningMask`] or [`WeightMask`]): What stays.
        report ([`PruningReport`]): What was done.
    """

    mask: Any
    report: PruningReport


def prune(
    model: PreTrainedModel,
    config: MethodConfig,
    data: Any = None,
    *,
    processing_class: Any = None,
    text_column: str | None = None,
    max_samples: int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
) -> PruningResult:
    """Prune a model: it computes the pruned function, shapes unchanged.

    Methods with a budget mask units, and [`shrink`] then makes the model smaller. Methods with a sparsity zero single
    weights in place, which makes no model smaller or faster by itself.

    Args:
        model (`PreTrainedModel`): The model, on any device. It is changed in place.
        config ([`MethodConfig`]): The method, by the class of its config, and its options:
            `KCMConfig(budget={"macs": 0.6})`, `WandaConfig(sparsity=0.5)`.
        data (*optional*): Calibration data, see [`Calibrator`]; or a [`Calibrator`]. Not needed by methods that look
            at weights alone.
        processing_class, text_column, max_samples, batch_size, max_length (*optional*): See [`Calibrator`].

    Returns:
        [`PruningResult`]: The mask and the report.

    Raises:
        UnsupportedModelError: The model can't be pruned.
        ConfigError: An option is wrong, or the model carries a mask already.
        InfeasibleBudgetError: The budget lies below what the method can reach.
        CalibrationError: The data are missing, empty, too small, or give NaN or Inf.

    The model is unchanged after an error; of an offloaded model the log says which blocks are pruned already.
    """
    started = time.perf_counter()
    if not isinstance(config, MethodConfig) or not hasattr(config, "method"):
        raise ConfigError(
            f"config must be the config of a method, such as KCMConfig(budget=...), got {type(config).__name__}."
        )
    pruner = get_pruner(config.method)(config)
    units = prunable_units(model)
    if not pruner.prunes_offloaded:
        refuse_offloaded(model)
    if current_mask(model) is not None:
        raise ConfigError(
            "The model carries a mask already: shrink it first, or take the mask off with remove_mask(model)."
        )
    _check_weights(model, units)

    calibrator = None
    if data is not None:
        calibrator = data
        if not isinstance(data, Calibrator):
            calibrator = Calibrator(
                model,
                data,
                processing_class=processing_class,
                text_column=text_column,
                max_samples=max_samples,
                batch_size=batch_size,
                max_length=max_length,
                labels=pruner.wants_labels,
            )
        if pruner.wants_labels and not calibrator.labels:
            raise CalibrationError(f"{config.method} needs labels: make the Calibrator with labels=True.")
        if calibrator.model is not model:
            raise CalibrationError("The Calibrator was made for another model: make one for this model.")
    elif pruner.wants_data:
        kind = "labelled" if pruner.wants_labels else "unlabelled"
        raise CalibrationError(
            f"{config.method} with these options needs calibration data: pass data=, {kind} examples like those of "
            "the task."
        )

    forget_gguf(model)
    mask, done = pruner.run(model, units, calibrator)
    report = PruningReport(
        method=config.method,
        config=config.to_dict(),
        model_class=type(model).__name__,
        model_type=units.model_type,
        calibration=calibrator and calibrator.describe(),
        seconds=round(time.perf_counter() - started, 3),
        processes=process_state().num_processes,
        facts=pruner.facts,
        papers=[asdict(pruner.paper)] if pruner.paper is not None else [],
        **done,
    )
    return PruningResult(mask, report)


def _check_weights(model: PreTrainedModel, units: PrunableUnits) -> None:
    for stack in units.stacks:
        for index, layer in base_model(model).get_submodule(stack).named_children():
            with resident(layer):
                for name, parameter in layer.named_parameters():
                    if not parameter.isfinite().all():
                        raise UnsupportedModelError(
                            f"The weights of {stack}.{index}.{name} are NaN or infinite: the model is broken already."
                        )
