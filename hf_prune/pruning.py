"""[`prune`]: config and data in, masked model and report out."""

import copy
import time
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from .calibration import Calibrator, from_main_process, process_state
from .costs import CostTable
from .depth import drop_layers
from .errors import CalibrationError, ConfigError, UnsupportedModelError
from .gates import apply_mask, current_mask, remove_mask
from .latency import LatencyTable
from .masks import PruningMask
from .methods import PruningConfig, get_pruner
from .report import PruningReport, unit_rows
from .surgery import check_shrinkable, shrink
from .timing import measure_latency
from .units import PrunableUnits, base_model, prunable_units

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PruningResult:
    """What [`prune`] returns.

    Args:
        mask ([`PruningMask`]): What stays.
        report ([`PruningReport`]): What was done.
    """

    mask: PruningMask
    report: PruningReport


def prune(
    model: PreTrainedModel,
    config: PruningConfig,
    data: Any = None,
    *,
    processing_class: Any = None,
    text_column: str | None = None,
    max_samples: int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
) -> PruningResult:
    """Prune a model: it is masked, shapes unchanged, and computes the pruned function. [`shrink`] makes it smaller.

    Args:
        model (`PreTrainedModel`): The model, on any device. It is changed in place.
        config ([`PruningConfig`]): The method, by the class of its config, and its options:
            `KCMConfig(budget={"macs": 0.6})`.
        data (*optional*): Calibration data, see [`Calibrator`]; or a [`Calibrator`]. Not needed by methods that look
            at weights alone.
        processing_class, text_column, max_samples, batch_size, max_length (*optional*): See [`Calibrator`].

    Returns:
        [`PruningResult`]: The mask and the report.

    Raises:
        UnsupportedModelError: The model can't be pruned.
        ConfigError: An option is wrong.
        InfeasibleBudgetError: The budget lies below what the method can reach.
        CalibrationError: The data are missing, empty, too small, or give NaN or Inf.

    The model is unchanged after an error.
    """
    started = time.perf_counter()
    if not isinstance(config, PruningConfig) or type(config) is PruningConfig:
        raise ConfigError(
            f"config must be the config of a method, such as KCMConfig(budget=...), got {type(config).__name__}."
        )
    pruner = get_pruner(config.method)(config)
    units = prunable_units(model)
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
                labels=pruner.needs_labels,
            )
        if pruner.needs_labels and not calibrator.labels:
            raise CalibrationError(f"{config.method} needs labels: make the Calibrator with labels=True.")
        if calibrator.model is not model:
            raise CalibrationError("The Calibrator was made for another model: make one for this model.")
    elif pruner.needs_data or config.drop_layers or getattr(config, "recover", "none") != "none":
        kind = "labelled" if pruner.needs_labels else "unlabelled"
        raise CalibrationError(
            f"{config.method} with these options needs calibration data: pass data=, {kind} examples like those of "
            "the task."
        )

    if config.drop_layers:
        assert calibrator is not None
        dropped, pruner.facts["block_influence"] = drop_layers(calibrator, config.drop_layers, config.exclude)
        try:
            apply_mask(model, dropped)
            mask = pruner.prune(model, units, calibrator) & dropped
        finally:
            remove_mask(model)
    else:
        mask = pruner.prune(model, units, calibrator)
    check_shrinkable(units, mask)
    table: CostTable = pruner.cost_table(model, units, calibrator)
    timed = table.latency
    latency = None
    if timed is not None:
        latency = {
            **from_main_process(lambda: _measured_latency(model, mask, timed)),
            "where": timed.where,
            "multiple_of": config.multiple_of or timed.multiple_of,
            "table": str(timed).splitlines(),
        }
    apply_mask(model, mask)
    report = PruningReport(
        method=config.method,
        config=config.to_dict(),
        model_class=type(model).__name__,
        model_type=units.model_type,
        before=table.of().to_dict(),
        after=table.of(mask).to_dict(),
        sequence_lengths=table.lengths,
        units=unit_rows(units, mask),
        calibration=calibrator and calibrator.describe(),
        seconds=round(time.perf_counter() - started, 3),
        processes=process_state().num_processes,
        facts=pruner.facts,
        latency=latency,
    )
    return PruningResult(mask, report)


def _measured_latency(model: PreTrainedModel, mask: PruningMask, table: LatencyTable) -> dict[str, float | None]:
    """Milliseconds of the dense and of the shrunk model, in turns, with the inputs of the table."""
    lengths = {name: table.setting[name] for name in ("batch_size", "sequence_length", "target_length")}
    repeats = min(max(round(5_000 / table.total), 5), 30)
    try:
        # What is not cut is shared: the copy takes as much memory as the kept part of the pruned blocks.
        small = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        measured = measure_latency({"before": model, "after": shrink(small, mask)}, **lengths, repeats=repeats)
    except RuntimeError as error:  # out of memory, as a rule: no reason to lose what has been computed
        logger.warning("The latency of the pruned model could not be measured: %s", error)
        return {"before": None, "after": None}
    return {name: run.p50_ms for name, run in measured.items()}


def _check_weights(model: PreTrainedModel, units: PrunableUnits) -> None:
    for stack in units.stacks:
        for name, parameter in base_model(model).get_submodule(stack).named_parameters():
            if not parameter.isfinite().all():
                raise UnsupportedModelError(
                    f"The weights of {stack}.{name} are NaN or infinite: the model is broken already."
                )
