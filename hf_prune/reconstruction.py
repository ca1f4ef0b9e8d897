"""Exact reconstruction: after a mask is chosen, refit what survives of each block to the dense model.

For each site, from the bottom up, the kept columns W of the output projection become the ridge solution of
min ‖F·W + R_s − (Y_t + R_t)‖² + λ‖W − W_old‖², with F the inputs of the pruned student, Y_t the output of the dense
teacher and R the residual streams of both (K-prune, Park et al., ICLR 2024, "knowledge-preserving weight tuning").
Before that the projections that a block begins with are refitted likewise, to what they compute in the teacher: that
is ours, and costs a fraction of a pass. No labels, no gradients. Teacher and student run side by side, one layer at a
time: what is held is the hidden states of one layer, what its teacher's blocks read and write, and the sums of one
site.
"""

import copy
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from .calibration import Calibrator
from .errors import CalibrationError, ConfigError
from .gates import LayerCalls, masked_columns
from .layer_walk import Recovery, walks
from .masks import PruningMask
from .refits import Refit
from .statistics import Moments
from .surgery import cut_layer
from .units import PrunableUnits, base_model, features, output_matrix, projection


def reconstruct(
    model: PreTrainedModel,
    units: PrunableUnits,
    mask: PruningMask,
    calibrator: Calibrator,
    recover: Recovery = "lstsq",
    *,
    ridge: float = 1.0,
    dtype: torch.dtype = torch.float32,
    calls: list[dict[str, LayerCalls]] | None = None,
) -> None:
    """Refit the projections of a model to a mask, in place. Weights change only when all are solved.

    For all but `"bias"`, a dropped layer is part of the teacher, and the pruned layers above it make up for it.

    Args:
        model (`PreTrainedModel`): The dense model. It is its own teacher.
        units ([`PrunableUnits`]): Its units.
        mask ([`PruningMask`]): What stays.
        calibrator ([`Calibrator`]): The data.
        recover (`"lstsq"`, `"lstsq_outputs"`, `"scale"` or `"bias"`, *optional*, defaults to `"lstsq"`):
            [`ridge_solve`] for all projections of the pruned blocks, or for those which write their outputs,
            [`scale_solve`] or [`compensate`].
        ridge (`float`, *optional*, defaults to 1.0): See [`ridge_solve`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the products of one batch; they are summed,
            and the equations solved, in float64.
        calls (`list`, *optional*): What [`Calibrator.collect`] recorded on this model; saves a pass.

    Raises:
        CalibrationError: A solution is NaN or infinite; the message names the layer.
        ConfigError: With `"bias"`, a projection has no bias.
    """
    if recover == "bias":
        compensate(model, units, mask, calibrator)
        return
    base = base_model(model)
    if calls is None:
        calls = calibrator.collect({}, "record layers", record=True)
    pruned = [group for group in units.of_kind("heads", "neurons") if not mask[group.name].all()]
    refits: dict[str, Refit] = {}
    with calibrator.evaluating():
        for walk in walks(calibrator, units, calls, recover, ridge, dtype):
            own = [group for group in pruned if group.stack == walk.stack]
            # A later stack reads what this one ends with; otherwise nothing above the last pruned layer matters.
            last = max((g.layer for g in own), default=-1) if walk.last else len(walk.layers) - 1
            for index, layer in enumerate(walk.layers[: last + 1]):
                groups = [g for g in own if g.layer == index] if mask[walk.stack][index] else []
                small = copy.deepcopy(layer) if groups else layer
                cut_layer(small, groups, mask)
                walk.enter(groups)
                for group in groups:
                    refits |= walk.refit(small, group, mask[group.name])
                if index < last or not walk.last:
                    walk.leave(small if mask[walk.stack][index] else None)
        for name, refit in refits.items():
            refit.write(projection(base, name))


def compensate(
    model: PreTrainedModel,
    units: PrunableUnits,
    mask: PruningMask,
    calibrator: Calibrator,
    moments: Mapping[str, Moments] | None = None,
) -> None:
    """Let the biases of the output projections take over the mean of what is pruned: b += W_pruned·E[x_pruned] (FLAP).

    E is over the real tokens, on the model as it is before heads and neurons go. There each projection keeps its mean
    output, and where the pruned inputs are constant, its output.

    Args:
        model, units, mask, calibrator: As for [`reconstruct`].
        moments (`dict[str, Moments]`, *optional*): Of the inputs of each site; save a pass.

    Raises:
        ConfigError: A projection has no bias.
        CalibrationError: A result is NaN or infinite; the message names the layer.
    """
    base, biases = base_model(model), {}
    pruned = {group.name: columns for group, columns in masked_columns(model, units, mask) if not mask.drops(group)}
    for name in pruned:
        if projection(base, name).bias is None:
            raise ConfigError(f"{name} has no bias that could be compensated: use recover='lstsq'.")
    if moments is None:
        sites = {name: projection(base, name) for name in pruned}
        moments = {name: Moments(features(module)[0], module.weight.device) for name, module in sites.items()}
        calibrator.collect(moments, "mean inputs")
    for name, columns in pruned.items():
        module, mean = projection(base, name), moments[name].mean
        columns = columns.to(mean.device)
        lost = mean[columns] @ output_matrix(module).detach()[columns].double()
        biases[name] = (module.bias.detach().double() + lost).to(module.bias.dtype)
        if not biases[name].isfinite().all():
            raise CalibrationError(f"The compensated bias of {name} is not finite: set recover='none'.")
    with torch.no_grad():
        for name, bias in biases.items():
            projection(base, name).bias.copy_(bias)
