"""Exact reconstruction: after a mask is chosen, refit each output projection on the inputs that survive.

For each site, from the bottom up, the kept columns W of the projection become the ridge solution of
min ‖F·W + R_s − (Y_t + R_t)‖² + λ‖W − W_old‖², with F the inputs of the pruned student, Y_t the output of the dense
teacher and R the residual streams of both (K-prune, Park et al., ICLR 2024, "knowledge-preserving weight tuning"). No
labels, no gradients. Teacher and student run side by side, one layer at a time: what is held is the hidden states of
one layer, its teacher's targets, and FᵀF, FᵀY of one site.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import FeedForwardSpec
from .calibration import Calibrator, select_real
from .errors import CalibrationError, ConfigError
from .gates import LayerCalls, masked_columns, observe, record_calls, resume_at
from .least_squares import NormalEquations, ridge_solve, scale_solve
from .masks import PruningMask
from .statistics import Moments
from .surgery import cut_layer
from .units import Projection, PrunableUnits, UnitGroup, base_model, features, kept_columns, output_matrix, projection

Recovery = Literal["lstsq", "scale", "bias"]


def reconstruct(
    model: PreTrainedModel,
    units: PrunableUnits,
    mask: PruningMask,
    calibrator: Calibrator,
    recover: Recovery = "lstsq",
    *,
    ridge: float = 1e-4,
    dtype: torch.dtype = torch.float32,
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
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the products of one batch; they are summed,
            and the equations solved, in float64.
        calls (`list`, *optional*): What [`Calibrator.collect`] recorded on this model; saves a pass.

    Raises:
        CalibrationError: Fewer real tokens than kept units, or NaN or Inf; the message names the layer.
        ConfigError: With `"bias"`, a projection has no bias.
    """
    if recover == "bias":
        compensate(model, units, mask, calibrator)
        return
    base = base_model(model)
    if calls is None:
        calls = calibrator.collect({}, "record layers", record=True)
    pruned = [group for group in units.of_kind("heads", "neurons") if not mask[group.name].all()]
    solutions: dict[str, Solution] = {}
    with calibrator.evaluating():
        for walk in walks(calibrator, units, calls):
            own = [group for group in pruned if group.stack == walk.stack]
            # A later stack reads what this one ends with; otherwise nothing above the last pruned layer matters.
            last = max((g.layer for g in own), default=-1) if walk.last else len(walk.layers) - 1
            for index, layer in enumerate(walk.layers[: last + 1]):
                groups = [g for g in own if g.layer == index] if mask[walk.stack][index] else []
                small = copy.deepcopy(layer) if groups else layer
                cut_layer(small, groups, mask)
                walk.enter(groups)
                for group in groups:
                    solutions[group.name] = walk.refit(small, group, mask[group.name], recover, ridge, dtype)
                if index < last or not walk.last:
                    walk.leave(small if mask[walk.stack][index] else None)
        for name, solution in solutions.items():
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
class Solution:
    """New rows of a projection's output matrix, and its new bias.

    Args:
        columns (`torch.Tensor`): Indices of the inputs that stay.
        weight (`torch.Tensor`): (kept inputs, outputs).
        bias (`torch.Tensor`, *optional*): (outputs,).
    """

    columns: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def write(self, module: Projection) -> None:
        """Put them into the projection of the uncut model.

        Args:
            module (`nn.Linear` or `Conv1D`): The projection. The rows of its matrix that don't stay keep their values.
        """
        matrix = output_matrix(module)
        matrix[self.columns.to(matrix.device)] = self.weight.to(matrix.dtype)
        if self.bias is not None:
            module.bias.copy_(self.bias)


def walks(calibrator: Calibrator, units: PrunableUnits, calls: list[dict[str, LayerCalls]]) -> Iterator["Walk"]:
    """One [`Walk`] for each stack of the calibrator's model; each has to be walked to its end before the next.

    Args:
        calibrator ([`Calibrator`]): The data.
        units ([`PrunableUnits`]): The units of its model.
        calls (`list`): What [`Calibrator.collect`] recorded on the dense model.

    Yields:
        [`Walk`]: In the order of the stacks. A later stack reads what the student of an earlier one ends with.
    """
    base, ends = base_model(calibrator.model), [dict[str, tuple[int, torch.Tensor]]() for _ in calls]
    for stack in units.stacks:
        student = [call[stack] for call in calls]
        if any(ends):  # the layers of a later stack are called with what the student's earlier stacks end with
            for index, batch in calibrator.batches("record decoder"):
                with resume_at(base, calls[index], ends[index]), record_calls(base, [stack]) as recorded:
                    calibrator.forward(batch)
                student[index] = recorded[stack]
        walk = Walk(calibrator, units, stack, [call[stack] for call in calls], student)
        yield walk
        if walk.student is not walk.teacher:
            for end, hidden in zip(ends, walk.student, strict=True):
                end[stack] = (len(walk.layers), hidden)


class _Reached(Exception):
    """A layer has computed all that is needed of it."""


class Walk:
    """Dense teacher and pruned student on their way up one stack, one layer at a time: enter, refit sites, leave.

    Held are, for all tokens, the hidden states of both before the layer, those of the teacher behind it, and the
    teacher's output at each site of the layer.

    Attributes:
        stack (`str`): The stack.
        layers (`nn.ModuleList`): Its layers, those of the teacher.
        index (`int`): The layer that was entered.
        teacher, student (`list[torch.Tensor]`): For each batch of this process what goes into that layer.
        last (`bool`): No stack reads what this one ends with.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        units: PrunableUnits,
        stack: str,
        teacher: list[LayerCalls],
        student: list[LayerCalls],
    ) -> None:
        layers = base_model(calibrator.model).get_submodule(stack)
        assert isinstance(layers, nn.ModuleList)
        self.calibrator, self.stack, self.layers, self.index = calibrator, stack, layers, -1
        self.last = stack == list(units.stacks)[-1]
        self._teacher_calls, self._student_calls = teacher, student
        self.teacher = [call.hidden for call in teacher]
        # One list while both are the same, so that the common part runs once.
        self.student = (
            self.teacher
            if all(a is b for a, b in zip(teacher, student, strict=True))
            else [call.hidden for call in student]
        )
        self._targets: dict[str, list[torch.Tensor]] = {}
        self._ends: list[torch.Tensor] = []

    def enter(self, groups: Sequence[UnitGroup]) -> None:
        """Run the teacher through the next layer.

        Args:
            groups (sequence of [`UnitGroup`]): Those of this layer that may be refitted.
        """
        self.index += 1
        layer, self._ends, self._targets = self.layers[self.index], [], {group.name: [] for group in groups}
        streams = {group.name: _stream(layer, group) for group in groups}
        for position, hidden in enumerate(self.teacher):
            before: dict[str, torch.Tensor] = {}
            after: dict[str, torch.Tensor] = {}
            inputs = {name: _keep(before, name) for read, _ in streams.values() for name in read}
            outputs = {name: _keep(after, name) for _, written in streams.values() for name in written}
            outputs |= {_inside(group): _keep(after, _inside(group)) for group in groups}
            with observe(layer, inputs, outputs):
                self._ends.append(self._run(layer, hidden, self._teacher_calls[position]))
            for group in groups:
                target, (read, written) = after[_inside(group)].float(), streams[group.name]
                for part in (*(before[name] for name in read), *(after[name] for name in written)):
                    target = target + part.float().reshape(target.shape)
                self._targets[group.name].append(target)

    def refit(
        self,
        small: nn.Module,
        group: UnitGroup,
        keep: torch.Tensor,
        recover: Recovery,
        ridge: float = 1e-4,
        dtype: torch.dtype = torch.float32,
    ) -> Solution:
        """Refit one site of the student to the teacher, given all below it.

        Args:
            small (`nn.Module`): The student's layer, cut at this site and below. Its projection is updated.
            group ([`UnitGroup`]): The site.
            keep (`torch.Tensor`): bool of shape (units,), how it was cut.
            recover, ridge, dtype: See [`reconstruct`]. `"bias"` keeps the mean output, given all below.

        Returns:
            [`Solution`]: What to write into the projection of the uncut model.

        Raises:
            CalibrationError: Fewer real tokens than kept units, or the solution is NaN or infinite; the message names
                the site.
        """
        module = projection(small, _inside(group))
        equations = self._accumulate(small, module, group, dtype)
        old, bias = output_matrix(module).detach().double(), None
        if recover == "lstsq":
            weight, bias = ridge_solve(equations, old, module.bias, ridge)
        elif recover == "bias":
            weight, bias = old, (equations.target_sum - equations.feature_sum @ old) / equations.count
        else:
            if module.bias is not None:
                equations.cross -= equations.feature_sum.outer(module.bias.double())
            weight = scale_solve(equations, old, group.width)
        if not weight.isfinite().all():
            raise CalibrationError(
                f"The reconstruction of {group.name} is not finite: give more data, or set recover='none'."
            )
        Solution(torch.arange(len(weight)), weight, bias).write(module)
        return Solution(kept_columns(group, keep), weight, bias)

    def leave(self, small: nn.Module | None) -> None:
        """Run the student through its layer, and let both go on to the next one.

        Args:
            small (`nn.Module`, *optional*): The student's layer: cut, or the teacher's. `None` if it was dropped.
        """
        layer, same = self.layers[self.index], self.student is self.teacher
        ends, pairs = self.student, zip(self.student, self._student_calls, strict=True)
        if small is not None and not (same and small is layer):
            ends = [self._run(small, hidden, call) for hidden, call in pairs]
        self.teacher = self._between(self._ends)
        self.student = self.teacher if same and small is layer else self._between(ends)

    def _between(self, ends: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the next layer reads, where that is not what this one returned: DeBERTa's convolution comes between."""
        following = self.index + 1
        if not any(following in call.gaps for call in self._teacher_calls):
            return ends
        base = base_model(self.calibrator.model)
        found: list[torch.Tensor] = []

        def reach(x: torch.Tensor) -> None:
            found.append(x)
            raise _Reached

        for index, batch in self.calibrator.batches("enter layer"):
            calls = {self.stack: self._teacher_calls[index]}
            with (
                resume_at(base, calls, {self.stack: (following, ends[index])}),
                observe(base, {f"{self.stack}.{following}": reach}),
                suppress(_Reached),
            ):
                self.calibrator.forward(batch)
        return found

    def _run(self, layer: nn.Module, hidden: torch.Tensor, call: LayerCalls) -> torch.Tensor:
        args, kwargs = call.arguments[self.index]
        output = layer(hidden, *args, **kwargs)
        end: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return end

    def _accumulate(
        self, small: nn.Module, module: Projection, group: UnitGroup, dtype: torch.dtype
    ) -> NormalEquations:
        """One pass of the student's layer over the data: the normal equations of one site."""
        equations = NormalEquations(*features(module), module.weight.device, dtype)
        read, written = _stream(small, group)
        for position, batch in self.calibrator.batches(f"reconstruct {group.name}"):
            real = self.calibrator.real_tokens(batch, self.stack)
            seen: dict[str, torch.Tensor] = {}
            before: dict[str, torch.Tensor] = {}
            after: dict[str, torch.Tensor] = {}

            def reach(x: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> None:
                seen["features"] = x
                raise _Reached

            inputs = {name: _keep(before, name) for name in read} | {_inside(group): reach}
            with observe(small, inputs, {name: _keep(after, name) for name in written}), suppress(_Reached):
                self._run(small, self.student[position], self._student_calls[position])
            target = select_real(self._targets[group.name][position], real, group.name)
            for part in (*before.values(), *after.values()):
                target = target - select_real(part, real, group.name).float()
            equations.update(select_real(seen["features"], real, group.name), target)
        self.calibrator.reduce({group.name: equations})
        kept = len(equations.gram) // group.width
        if equations.count < kept:
            raise CalibrationError(
                f"{group.name} keeps {kept} units, the calibration data have {int(equations.count)} "
                "real tokens: give more data to reconstruct it, or set recover='none'."
            )
        return equations


def _inside(group: UnitGroup) -> str:
    """The name of a group's site relative to its layer."""
    assert group.block is not None
    return group.block.output


def _stream(layer: nn.Module, group: UnitGroup) -> tuple[list[str], list[str]]:
    """The modules of a layer whose inputs, and those whose outputs, a block adds its own output to."""
    block = group.block
    assert block is not None
    residual = block.residual(layer) if callable(block.residual) else block.residual
    parallel = block.parallel(layer) if isinstance(block, FeedForwardSpec) else None
    return [name for name in (residual,) if name is not None], [name for name in (parallel,) if name is not None]


def _keep(seen: dict[str, torch.Tensor], key: str) -> Callable[[torch.Tensor], None]:
    return lambda x: seen.__setitem__(key, x)
