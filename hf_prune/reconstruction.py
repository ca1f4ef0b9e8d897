"""Exact reconstruction: after a mask is chosen, refit each output projection on the inputs that survive.

For each site, from the bottom up, the kept columns W of the projection become the ridge solution of
min ‖F·W + R_s − (Y_t + R_t)‖² + λ‖W − W_old‖², with F the inputs of the pruned student, Y_t the output of the dense
teacher and R the residual streams of both (K-prune, Park et al., ICLR 2024, "knowledge-preserving weight tuning"). No
labels, no gradients. Teacher and student run side by side, one layer at a time: what is held is the hidden states of
one layer boundary and FᵀF, FᵀY of one site.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from .calibration import Calibrator, Moments, select_real
from .errors import CalibrationError, ConfigError
from .gates import LayerCalls, masked_columns, observe, record_calls
from .masks import PruningMask
from .surgery import cut_layer
from .units import Projection, PrunableUnits, UnitGroup, base_model, features, kept_columns, output_matrix, projection

Recovery = Literal["lstsq", "scale", "bias"]


class NormalEquations:
    """Streaming sums for a least-squares problem features @ weight + bias ~ targets, in float64.

    Args:
        inputs, outputs (`int`): Number of features and of targets.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.gram, self.cross = zeros(inputs, inputs), zeros(inputs, outputs)
        self.feature_sum, self.target_sum, self.count = zeros(inputs), zeros(outputs), zeros()

    def update(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Take some tokens: features (tokens, inputs), targets (tokens, outputs)."""
        features, targets = features.float(), targets.float()
        self.gram += features.T @ features
        self.cross += features.T @ targets
        self.feature_sum += features.sum(0)
        self.target_sum += targets.sum(0)
        self.count += len(features)

    def sums(self) -> list[torch.Tensor]:
        """The tensors to reduce over processes."""
        return [self.gram, self.cross, self.feature_sum, self.target_sum, self.count]


def ridge_solve(
    equations: NormalEquations, weight: torch.Tensor, bias: torch.Tensor | None, ridge: float = 1e-4
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Least squares with a ridge towards the old weight; the bias, where there is one, is refitted without a ridge.

    Args:
        equations ([`NormalEquations`]): The sums.
        weight (`torch.Tensor`): The old weight, (inputs, outputs).
        bias (`torch.Tensor`, *optional*): The old bias, (outputs,).
        ridge (`float`, *optional*, defaults to 1e-4): Strength, as a share of the mean diagonal of the Gram matrix.

    Returns:
        The new weight and bias in float64. Nothing changes where the old ones fit already.
    """
    old = weight.double()
    gram, cross, mean = equations.gram, equations.cross, equations.feature_sum / equations.count
    target = equations.target_sum / equations.count
    if bias is not None:
        gram = gram - equations.count * mean.outer(mean)
        cross = cross - equations.count * mean.outer(target)
    spread, size = gram.diagonal().mean(), equations.gram.diagonal().mean()
    if not spread > 1e-6 * size:  # constant features: the old weight is as good as any
        new = old
    else:
        eye, strength = torch.eye(len(gram), dtype=gram.dtype, device=gram.device), ridge * spread
        factor, failed = torch.linalg.cholesky_ex(gram + strength * eye)
        while failed:  # the products of float32 features round a semi-definite matrix below zero
            strength = strength * 10
            factor, failed = torch.linalg.cholesky_ex(gram + strength * eye)
        # The correction, not the weight, is solved for: it is zero where the old weight fits.
        new = old + torch.cholesky_solve(cross - gram @ old, factor)
    return new, None if bias is None else target - mean @ new


def scale_solve(equations: NormalEquations, weight: torch.Tensor, width: int, limit: float = 10.0) -> torch.Tensor:
    """One factor per unit instead of a new weight: the mask tuning of Kwon et al. 2022, in closed form.

    With A_u the output of unit u and G = AᵀA, x = 1 + (G² + I)⁻¹ G (AᵀB − G·1): LSMR on the normal equations with
    damping 1.

    Args:
        equations ([`NormalEquations`]): The sums; targets without the bias.
        weight (`torch.Tensor`): The old weight, (inputs, outputs).
        width (`int`): Inputs per unit.
        limit (`float`, *optional*, defaults to 10.0): Largest factor in absolute value.

    Returns:
        The scaled weight, float64.
    """
    old = weight.double()
    units = len(old) // width

    def per_unit(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(units, width, *x.shape[1:]).sum(1)

    gram = per_unit(per_unit((old @ old.T) * equations.gram).T)
    right = per_unit((equations.cross * old).sum(1))
    eye = torch.eye(units, dtype=old.dtype, device=old.device)
    factor = 1 + torch.linalg.solve(gram @ gram + eye, gram @ (right - gram.sum(1)))
    scaled: torch.Tensor = old * factor.clamp(-limit, limit).repeat_interleave(width)[:, None]
    return scaled


def reconstruct(
    model: PreTrainedModel,
    units: PrunableUnits,
    mask: PruningMask,
    calibrator: Calibrator,
    recover: Recovery = "lstsq",
    *,
    ridge: float = 1e-4,
    calls: list[dict[str, LayerCalls]] | None = None,
) -> None:
    """Refit the output projections of a model to a mask, in place. Weights change only when all are solved.

    For all but `"bias"`, a dropped layer is part of the teacher, and the pruned layers above it make up for it.

    Args:
        model (`PreTrainedModel`): The dense model. It is its own teacher.
        units ([`PrunableUnits`]): Its units.
        mask ([`PruningMask`]): What stays.
        calibrator ([`Calibrator`]): The data.
        recover (`"lstsq"`, `"scale"` or `"bias"`, *optional*, defaults to `"lstsq"`): [`ridge_solve`],
            [`scale_solve`] or [`compensate`].
        ridge (`float`, *optional*, defaults to 1e-4): See [`ridge_solve`].
        calls (`list`, *optional*): What [`Calibrator.collect`] recorded on this model; saves a pass.

    Raises:
        CalibrationError: Fewer real tokens than kept units, or NaN or Inf; the message names the layer.
    """
    if recover == "bias":
        compensate(model, units, mask, calibrator)
        return
    base = base_model(model)
    if calls is None:
        calls = calibrator.collect({}, "record layers", record=True)
    solved: dict[str, _Solution] = {}
    ends: list[dict[str, torch.Tensor]] = [{} for _ in calls]
    with calibrator.evaluating():
        for stack in units.stacks:
            teacher = student = [call[stack] for call in calls]
            if any(ends):
                student = [call[stack] for call in _student_calls(calibrator, base, stack, ends)]
            walk = _Walk(calibrator, units, stack, teacher, student)
            solved |= walk.run(base, mask, recover, ridge)
            if walk.student is not walk.teacher:
                for end, hidden in zip(ends, walk.student, strict=True):
                    end[stack] = hidden
        for name, solution in solved.items():
            solution.write(projection(base, name))


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


@dataclass(frozen=True)
class _Solution:
    """New columns of a projection, as (inputs, outputs), and its new bias."""

    columns: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def write(self, module: Projection) -> None:
        matrix = output_matrix(module)
        matrix[self.columns.to(matrix.device)] = self.weight.to(matrix.dtype)
        if self.bias is not None:
            module.bias.copy_(self.bias)


def _student_calls(
    calibrator: Calibrator, base: nn.Module, stack: str, ends: list[dict[str, torch.Tensor]]
) -> list[dict[str, LayerCalls]]:
    """How the layers of a later stack are called when the earlier stacks end as the student's do."""
    own = []
    for index, batch in calibrator.batches("record decoder"):
        with record_calls(base, [*ends[index], stack], ends[index]) as recorded:
            calibrator.forward(batch)
        own.append(recorded)
    return own


def _output(value: Any) -> torch.Tensor:
    hidden: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return hidden


class _Walk:
    """Teacher and student on their way up one stack, one layer at a time."""

    def __init__(
        self,
        calibrator: Calibrator,
        units: PrunableUnits,
        stack: str,
        teacher: list[LayerCalls],
        student: list[LayerCalls],
    ) -> None:
        self.calibrator, self.units, self.stack = calibrator, units, stack
        self.teacher_calls, self.student_calls = teacher, student
        self.teacher = [call.hidden for call in teacher]
        # One list while both are the same, so that the common part runs once.
        self.student = self.teacher if teacher is student else [call.hidden for call in student]

    def run(self, base: nn.Module, mask: PruningMask, recover: Recovery, ridge: float) -> dict[str, _Solution]:
        solved: dict[str, _Solution] = {}
        layers = base.get_submodule(self.stack)
        assert isinstance(layers, nn.ModuleList)
        pruned = [
            g for g in self.units.of_kind("heads", "neurons") if g.stack == self.stack and not mask[g.name].all()
        ]
        # A later stack reads what this one ends with; otherwise nothing above the last pruned layer matters.
        followed = self.stack != list(self.units.stacks)[-1]
        last = len(layers) if followed else max((g.layer for g in pruned), default=-1)
        for index, layer in enumerate(layers[: last + 1]):
            groups = [g for g in pruned if g.layer == index]
            if not mask[self.stack][index]:
                self.student = list(self.student) if self.student is self.teacher else self.student
                self.teacher = self._advance(layer, index, self.teacher, self.teacher_calls)
            elif not groups:
                both = self.student is self.teacher
                self.teacher = self._advance(layer, index, self.teacher, self.teacher_calls)
                self.student = self.teacher if both else self._advance(layer, index, self.student, self.student_calls)
            else:
                small = copy.deepcopy(layer)
                cut_layer(small, self.units.of_layer(self.stack, index), mask)
                for group in groups:
                    on = group is groups[-1] and index < last
                    equations, teacher = self._accumulate(layer, small, index, group, keep_output=on)
                    module = projection(small, _inside(group))
                    solved[group.name] = self._solve(module, group, mask, equations, recover, ridge)
                    replace(solved[group.name], columns=torch.arange(len(output_matrix(module)))).write(module)
                if index < last:
                    self.student = self._advance(small, index, self.student, self.student_calls)
                    self.teacher = teacher
        return solved

    def _advance(
        self, layer: nn.Module, index: int, hidden: list[torch.Tensor], calls: list[LayerCalls]
    ) -> list[torch.Tensor]:
        return [self._call(layer, index, x, call) for x, call in zip(hidden, calls, strict=True)]

    @staticmethod
    def _call(layer: nn.Module, index: int, hidden: torch.Tensor, call: LayerCalls) -> torch.Tensor:
        args, kwargs = call.arguments[index]
        return _output(layer(hidden, *args, **kwargs))

    def _accumulate(
        self, layer: nn.Module, small: nn.Module, index: int, group: UnitGroup, keep_output: bool
    ) -> tuple[NormalEquations, list[torch.Tensor]]:
        """One pass of the layer's teacher and student over the data: the normal equations of one site."""
        name = _inside(group)
        dense, thin = projection(layer, name), projection(small, name)
        equations = NormalEquations(*features(thin), thin.weight.device)
        residual = group.block.residual if group.block is not None else None
        residual = residual(layer) if callable(residual) else residual
        ends = []
        for position, batch in self.calibrator.batches(f"reconstruct {group.name}"):
            real = self.calibrator.real_tokens(batch, self.stack)
            seen: dict[str, torch.Tensor] = {}
            into = {} if residual is None else {residual: _keep(seen, "residual")}
            with observe(layer, into, {name: _keep(seen, "output")}):
                end = self._call(layer, index, self.teacher[position], self.teacher_calls[position])
            target, teacher_stream = select_real(seen["output"], real, group.name).float(), seen.get("residual")
            with observe(small, {**into, name: _keep(seen, "features")}):
                self._call(small, index, self.student[position], self.student_calls[position])
            if teacher_stream is not None:
                gap = teacher_stream.float() - seen["residual"].float()
                target = target + select_real(gap, real, group.name)
            if dense.bias is not None:
                target = target - dense.bias.float()
            equations.update(select_real(seen["features"], real, group.name), target)
            if keep_output:
                ends.append(end)
        self.calibrator.reduce({group.name: equations})
        kept = len(equations.gram)
        if equations.count < kept // group.width:
            raise CalibrationError(
                f"{group.name} keeps {kept // group.width} units, the calibration data have {int(equations.count)} "
                "real tokens: give more data to reconstruct it, or set recover='none'."
            )
        return equations, ends

    def _solve(
        self,
        module: Projection,
        group: UnitGroup,
        mask: PruningMask,
        equations: NormalEquations,
        recover: Recovery,
        ridge: float,
    ) -> _Solution:
        columns = kept_columns(group, mask[group.name])
        weight = output_matrix(module).detach()
        if recover == "scale":
            new, bias = scale_solve(equations, weight, group.width), None
        else:
            if module.bias is not None:
                equations.target_sum += equations.count * module.bias.double()
                equations.cross += equations.feature_sum.outer(module.bias.double())
            new, bias = ridge_solve(equations, weight, module.bias, ridge)
        if not new.isfinite().all():
            raise CalibrationError(
                f"The reconstruction of {group.name} is not finite: give more data, or set recover='none'."
            )
        return _Solution(columns, new, bias)


def _inside(group: UnitGroup) -> str:
    """The name of a group's site relative to its layer."""
    assert group.block is not None
    return group.block.output


def _keep(seen: dict[str, torch.Tensor], key: str) -> Callable[[torch.Tensor], None]:
    return lambda x: seen.__setitem__(key, x)
