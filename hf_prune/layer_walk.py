"""Dense teacher and pruned student side by side, layer by layer from the bottom up: what refits are solved on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Literal

import torch
from torch import nn

from .architectures import FeedForwardSpec
from .calibration import Calibrator, select_real
from .errors import CalibrationError
from .gates import LayerCalls, observe, record_calls, resume_at
from .least_squares import NormalEquations, ridge_solve, scale_solve
from .refits import InputRefit, OutputRefit, Refit
from .surgery import present_inputs
from .units import Projection, PrunableUnits, UnitGroup, base_model, features, kept_columns, output_matrix, projection

Recovery = Literal["lstsq", "lstsq_outputs", "scale", "bias"]


def walks(
    calibrator: Calibrator,
    units: PrunableUnits,
    calls: list[dict[str, LayerCalls]],
    recover: Recovery | Literal["none"] = "lstsq",
    ridge: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Iterator["Walk"]:
    """One [`Walk`] for each stack of the calibrator's model; each has to be walked to its end before the next.

    Args:
        calibrator ([`Calibrator`]): The data.
        units ([`PrunableUnits`]): The units of its model.
        calls (`list`): What [`Calibrator.collect`] recorded on the dense model.
        recover, ridge, dtype: How blocks will be refitted, see [`reconstruct`]. Here `"bias"` keeps the mean output,
            given all below.

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
        walk = Walk(calibrator, stack, [call[stack] for call in calls], student, recover, ridge, dtype)
        yield walk
        if walk.student is not walk.teacher:
            for end, hidden in zip(ends, walk.student, strict=True):
                end[stack] = (len(walk.layers), hidden)


class _Reached(Exception):
    """A layer has computed all that is needed of it."""


class Walk:
    """Dense teacher and pruned student on their way up one stack, one layer at a time: enter, refit sites, leave.

    Held are, for all tokens, the hidden states of both before the layer, those of the teacher behind it, and what the
    teacher's blocks in the layer read and write.

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
        stack: str,
        teacher: list[LayerCalls],
        student: list[LayerCalls],
        recover: Recovery | Literal["none"],
        ridge: float,
        dtype: torch.dtype,
    ) -> None:
        layers = base_model(calibrator.model).get_submodule(stack)
        assert isinstance(layers, nn.ModuleList)
        self.calibrator, self.stack, self.layers, self.index = calibrator, stack, layers, -1
        self._stacks = list(calibrator.units.stacks)
        self.last = stack == self._stacks[-1]
        self._recover, self._ridge, self._dtype = recover, ridge, dtype
        self._teacher_calls, self._student_calls = teacher, student
        self.teacher = [call.hidden for call in teacher]
        # One list while both are the same, so that the common part runs once.
        self.student = (
            self.teacher
            if all(a is b for a, b in zip(teacher, student, strict=True))
            else [call.hidden for call in student]
        )
        self._read: dict[str, list[torch.Tensor]] = {}
        self._targets: dict[str, list[torch.Tensor]] = {}
        self._ends: list[torch.Tensor] = []
        self._differs = False

    def enter(self, groups: Sequence[UnitGroup]) -> None:
        """Run the teacher through the next layer.

        Args:
            groups (sequence of [`UnitGroup`]): Those of this layer that may be refitted.
        """
        self.index += 1
        self._differs = self.student is not self.teacher
        layer, self._ends, self._targets = self.layers[self.index], [], {group.name: [] for group in groups}
        streams = {group.name: _stream(layer, group) for group in groups}
        readers = []
        if self._recover == "lstsq":
            readers = [names[0] for group in groups for names, _ in _readers(layer, group)]
        self._read = {name: [] for name in readers}
        for position, hidden in enumerate(self.teacher):
            before: dict[str, torch.Tensor] = {}
            after: dict[str, torch.Tensor] = {}
            read_by = [*readers, *(name for read, _ in streams.values() for name in read)]
            inputs = {name: _keep(before, name) for name in read_by}
            outputs = {name: _keep(after, name) for _, written in streams.values() for name in written}
            outputs |= {_inside(group): _keep(after, _inside(group)) for group in groups}
            with observe(layer, inputs, outputs):
                self._ends.append(self._run(layer, hidden, self._teacher_calls[position]))
            for name in readers:
                self._read[name].append(before[name])
            for group in groups:
                target, (read, written) = after[_inside(group)].float(), streams[group.name]
                for part in (*(before[name] for name in read), *(after[name] for name in written)):
                    target = target + part.float().reshape(target.shape)
                self._targets[group.name].append(target)

    def refit(self, small: nn.Module, group: UnitGroup, keep: torch.Tensor) -> dict[str, Refit]:
        """Refit one block of the student to the teacher, given all below it: first what reads, then what writes.

        Args:
            small (`nn.Module`): The student's layer, cut at this block's site and below. Its projections are updated.
            group ([`UnitGroup`]): The site.
            keep (`torch.Tensor`): bool of shape (units,), how it was cut.

        Returns:
            `dict[str, Refit]`: What to write into the uncut model, by the names of its projections relative to the
            base model.

        Raises:
            CalibrationError: The solution is NaN or infinite; the message names the site.
        """
        refits: dict[str, Refit] = {}
        if self._recover == "lstsq" and self._differs and keep.any():  # else both read the same, or nothing does
            refits = self._refit_readers(small, group)
        self._differs = True
        module = projection(small, _inside(group))
        equations = self._accumulate(small, module, group)
        old, bias = output_matrix(module).detach().double(), None
        if self._recover == "bias":
            weight, bias = old, (equations.target_sum - equations.feature_sum @ old) / equations.count
        elif self._recover == "scale":
            if module.bias is not None:
                equations.cross -= equations.feature_sum.outer(module.bias.double())
            weight = scale_solve(equations, old, group.width)
        else:
            weight, bias = ridge_solve(equations, old, module.bias, self._ridge)
        if not weight.isfinite().all():
            raise CalibrationError(
                f"The reconstruction of {group.name} is not finite: set precision='float64', or recover='none'."
            )
        OutputRefit(torch.arange(len(weight)), weight, bias).write(module)
        return refits | {group.name: OutputRefit(kept_columns(group, keep), weight, bias)}

    def _refit_readers(self, small: nn.Module, group: UnitGroup) -> dict[str, Refit]:
        """Refit the projections that a block begins with."""
        refits: dict[str, Refit] = {}
        for names, encoder in _readers(small, group):
            equations = self._read_by_both(small, names[0], self._stacks[0] if encoder else self.stack)
            maps: dict[bool, InputRefit] = {}
            for name in names:
                module = projection(small, name)
                bias = module.bias is not None
                if bias not in maps:
                    maps[bias] = InputRefit.solve(equations, bias, self._ridge)
                maps[bias].write(module)
                refits[f"{self.stack}.{self.index}.{name}"] = maps[bias]
        return refits

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

    def _read_by_both(self, small: nn.Module, name: str, stack: str) -> NormalEquations:
        """One pass of the student's layer over the data, up to one of its modules that reads tokens of a stack."""
        module = projection(small, name)
        width, _ = features(module)
        equations = NormalEquations(width, width, module.weight.device, self._dtype)
        for position, batch in self.calibrator.batches(f"refit {self.stack}.{self.index}.{name}"):
            real = self.calibrator.real_tokens(batch, stack)
            student, teacher = self._run_to(name, small, position), self._read[name][position]
            equations.update(select_real(student, real, name), select_real(teacher, real, name))
        self.calibrator.reduce({f"{self.stack}.{self.index}.{name}": equations})
        return equations

    def _accumulate(self, small: nn.Module, module: Projection, group: UnitGroup) -> NormalEquations:
        """One pass of the student's layer over the data: the normal equations of one site."""
        equations = NormalEquations(*features(module), module.weight.device, self._dtype)
        read, written = _stream(small, group)
        for position, batch in self.calibrator.batches(f"reconstruct {group.name}"):
            real = self.calibrator.real_tokens(batch, self.stack)
            before: dict[str, torch.Tensor] = {}
            after: dict[str, torch.Tensor] = {}
            inputs = {name: _keep(before, name) for name in read}
            with observe(small, inputs, {name: _keep(after, name) for name in written}):
                seen = self._run_to(_inside(group), small, position)
            target = select_real(self._targets[group.name][position], real, group.name)
            for part in (*before.values(), *after.values()):
                target = target - select_real(part, real, group.name).float()
            equations.update(select_real(seen, real, group.name), target)
        self.calibrator.reduce({group.name: equations})
        return equations

    def _run_to(self, name: str, small: nn.Module, position: int) -> torch.Tensor:
        """Run the student's layer on a batch, up to one of its modules.

        Returns:
            `torch.Tensor`: What that module reads.
        """
        seen: list[torch.Tensor] = []

        def reach(x: torch.Tensor) -> None:
            seen.append(x)
            raise _Reached

        with observe(small, {name: reach}), suppress(_Reached):
            self._run(small, self.student[position], self._student_calls[position])
        return seen[0]


def _inside(group: UnitGroup) -> str:
    """The name of a group's site relative to its layer."""
    assert group.block is not None
    return group.block.output


def _readers(layer: nn.Module, group: UnitGroup) -> list[tuple[list[str], bool]]:
    """The projections of a layer that a block begins with: what reads the same, and if that is the encoder's end."""
    block = group.block
    if isinstance(block, FeedForwardSpec):
        return [(present_inputs(layer, block), False)]
    assert block is not None
    query, key, value = (f"{block.module}.{name}" for name in (block.query, block.key, block.value))
    if block.relative_rows is not None:  # queries and keys are projections of relative positions, too
        return [([value], False)]
    if block.fused:
        return [([f"{block.module}.{block.fused}"], False)]
    return [([query], False), ([key, value], True)] if block.cross else [([query, key, value], False)]


def _stream(layer: nn.Module, group: UnitGroup) -> tuple[list[str], list[str]]:
    """The modules of a layer whose inputs, and those whose outputs, a block adds its own output to."""
    block = group.block
    assert block is not None
    residual = block.residual(layer) if callable(block.residual) else block.residual
    parallel = block.parallel(layer) if isinstance(block, FeedForwardSpec) else None
    return [name for name in (residual,) if name is not None], [name for name in (parallel,) if name is not None]


def _keep(seen: dict[str, torch.Tensor], key: str) -> Callable[[torch.Tensor], None]:
    return lambda x: seen.__setitem__(key, x)
