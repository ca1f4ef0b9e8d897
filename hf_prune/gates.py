"""Mask, gate and observe units at their site: the only place that registers hooks.

A gate is a child module of the projection (of the layer, for layers) and its hook a module-level function, so that
deepcopy, checkpoints, DDP, gradient checkpointing and torch.compile treat it as part of the model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .masks import PruningMask
from .offload import refuse_offloaded
from .units import PrunableUnits, UnitGroup, base_model, kept_columns, projection, prunable_units

GATE = "hf_prune_gate"


class MaskGate(nn.Module):
    """Zeroes the input columns of the pruned units of a group.

    Args:
        keep (`torch.Tensor`): bool of shape (units,), `True` = keep.
        columns (`torch.Tensor`): bool of shape (columns,), the same for each column of the site's input.
    """

    keep: torch.Tensor
    pruned_columns: torch.Tensor

    def __init__(self, keep: torch.Tensor, columns: torch.Tensor) -> None:
        super().__init__()
        # Not persistent: a checkpoint holds the mask folded into the weights, and no key that from_pretrained doesn't
        # know.
        self.register_buffer("keep", keep, persistent=False)
        self.register_buffer("pruned_columns", ~columns, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs of shape (..., columns) with zeros in the pruned columns."""
        return x.masked_fill(self.pruned_columns, 0)  # exact where 0 * inf would be NaN


class SkipGate(nn.Module):
    """Marks a layer whose output is replaced by its input."""


def _gate_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(module, GATE)(args[0]), *args[1:])


def _skip_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def attach_gate(module: nn.Module, gate: nn.Module) -> None:
    """Let `gate` transform the input of a projection from now on. One gate a projection: an older one is replaced.

    Args:
        module (`nn.Module`): The projection; a layer, if the gate is a [`SkipGate`].
        gate (`nn.Module`): Called with what goes in first, of shape (..., columns), returns what goes in instead. A
            [`SkipGate`] is never called: it makes the layer return its input.
    """
    detach_gate(module)
    _attach(module, gate)


def _attach(module: nn.Module, gate: nn.Module) -> None:
    module.add_module(GATE, gate)
    if isinstance(gate, SkipGate):
        module.register_forward_hook(_skip_layer, with_kwargs=True)
    else:
        module.register_forward_pre_hook(_gate_input)


def detach_gate(module: nn.Module) -> None:
    """Remove the gate of a projection or a layer, if there is one."""
    if hasattr(module, GATE):
        delattr(module, GATE)
        for hooks, function in ((module._forward_pre_hooks, _gate_input), (module._forward_hooks, _skip_layer)):
            for key in [key for key, hook in hooks.items() if hook is function]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)


def apply_mask(model: PreTrainedModel, mask: PruningMask) -> None:
    """Turn a model into the pruned function, shapes unchanged. A mask that is there already is replaced.

    Args:
        model (`PreTrainedModel`): The model. Its weights stay as they are.
        mask ([`PruningMask`]): What stays.

    Raises:
        MaskError: The mask is for another model.
        UnsupportedModelError: The model is offloaded, or of a kind that can't be pruned.
    """
    refuse_offloaded(model)
    units = prunable_units(model)
    mask.check(units)
    remove_mask(model)
    base = base_model(model)
    for group in units.values():
        keep = mask[group.name]
        if group.kind == "layers":
            layers = base.get_submodule(group.name)
            assert isinstance(layers, nn.ModuleList)
            for index in (~keep).nonzero().flatten().tolist():
                _attach(layers[index], SkipGate())
        elif not keep.all():
            module = projection(base, group.name)
            keep = keep.to(module.weight.device)
            attach_gate(module, MaskGate(keep, keep.repeat_interleave(group.width)))


def remove_mask(model: PreTrainedModel) -> None:
    """Give a masked model its dense function back. Nothing happens to a model without a mask."""
    for module, _ in _mask_gates(model):
        detach_gate(module)


@contextmanager
def without_mask(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, a masked model computes its dense function."""
    gates = _mask_gates(model)
    remove_mask(model)
    try:
        yield
    finally:
        for module, gate in gates:
            _attach(module, gate)


def _mask_gates(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    found = [(module, getattr(module, GATE, None)) for module in model.modules()]
    return [(module, gate) for module, gate in found if isinstance(gate, MaskGate | SkipGate)]


def current_mask(model: PreTrainedModel) -> PruningMask | None:
    """The mask that [`apply_mask`] put on a model, `None` if there is none.

    Raises:
        UnsupportedModelError: The model is of a kind that can't be pruned.
    """
    units, base, keep = prunable_units(model), base_model(model), {}
    for group in units.values():
        if group.kind == "layers":
            layers = base.get_submodule(group.name)
            assert isinstance(layers, nn.ModuleList)
            kept = torch.tensor(
                [not isinstance(getattr(layer, GATE, None), SkipGate) for layer in layers], dtype=torch.bool
            )
            if not kept.all():
                keep[group.name] = kept
        else:
            gate = getattr(base.get_submodule(group.name), GATE, None)
            if isinstance(gate, MaskGate):
                keep[group.name] = gate.keep
    return PruningMask(keep, units) if keep else None


def masked_columns(
    model: PreTrainedModel, units: PrunableUnits, mask: PruningMask
) -> Iterator[tuple[UnitGroup, torch.Tensor]]:
    """Groups of heads and neurons with pruned units, each with the indices of the pruned input columns of its site.

    Args:
        model (`PreTrainedModel`): The model.
        units ([`PrunableUnits`]): Its units.
        mask ([`PruningMask`]): What stays. Groups in layers that it drops count by their own vectors.

    Yields:
        [`UnitGroup`] and `torch.Tensor`: The group, and int64 of shape (pruned columns,), ascending.
    """
    for group in units.of_kind("heads", "neurons"):
        if not mask[group.name].all():
            yield group, kept_columns(group, ~mask[group.name])


Observer = Callable[[torch.Tensor], None]


@contextmanager
def observe(
    root: nn.Module, inputs: Mapping[str, Observer] | None = None, outputs: Mapping[str, Observer] | None = None
) -> Iterator[None]:
    """Within the context, call observers with what goes into and comes out of modules.

    Args:
        root (`nn.Module`): What the names are relative to.
        inputs (`dict[str, Callable]`, *optional*): For a module what to call with its first input, behind a gate.
        outputs (`dict[str, Callable]`, *optional*): For a module what to call with its output, the first of a tuple.
    """
    handles = []

    def before(function: Observer) -> Callable[..., None]:
        return lambda module, args, kwargs: function(args[0] if args else kwargs["hidden_states"])

    def after(function: Observer) -> Callable[..., None]:
        return lambda module, args, output: function(output[0] if isinstance(output, tuple) else output)

    try:
        for name, function in (inputs or {}).items():
            handles.append(root.get_submodule(name).register_forward_pre_hook(before(function), with_kwargs=True))
        for name, function in (outputs or {}).items():
            handles.append(root.get_submodule(name).register_forward_hook(after(function)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def record_inputs(model: nn.Module, calls: list[dict[str, Any]]) -> RemovableHandle:
    """Append the keyword arguments of every call of a model to `calls`, until the handle is removed.

    Args:
        model (`nn.Module`): The model.
        calls (`list`): Where they go. The tensors in them are not copied.

    Returns:
        `RemovableHandle`: Its `remove()` ends the recording.
    """

    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    return model.register_forward_pre_hook(call, with_kwargs=True)


@contextmanager
def grad_inputs(root: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Within the context, keep what goes into modules, so that a loss can be differentiated by it.

    What lies before the first of them is not part of the graph, unless parameters there require gradients.

    Args:
        root (`nn.Module`): What the names are relative to.
        names (iterable of `str`): The modules.

    Yields:
        `dict[str, torch.Tensor]`: For each module that has run its first input.
    """
    inputs: dict[str, torch.Tensor] = {}
    handles = []

    def keep(name: str) -> Callable[..., Any]:
        def call(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs[name] = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            return (inputs[name], *args[1:])

        return call

    try:
        for name in names:
            handles.append(root.get_submodule(name).register_forward_pre_hook(keep(name)))
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replace_layers(root: nn.Module, stack: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within the context, the layers of a stack don't run: a function is called in place of each.

    Args:
        root (`nn.Module`): The base model.
        stack (`str`): The stack.
        function (`Callable`): Called as `function(index, forward, hidden, arguments)`, with the forward pass that the
            layer would run, what goes in, and its other (positional, keyword) arguments.
    """
    layers = root.get_submodule(stack)
    assert isinstance(layers, nn.ModuleList)
    own = [layer.__dict__.get("forward") for layer in layers]

    def replaced(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            hidden, others = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            return function(index, forward, hidden, (others, kwargs))

        return call

    try:
        for index, layer in enumerate(layers):
            layer.forward = replaced(index, layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


@dataclass
class LayerCalls:
    """How the layers of one stack were called for one batch, and what they returned.

    Args:
        hidden (`torch.Tensor`): What went into the first layer.
        end (`torch.Tensor`): What came out of the last.
        arguments (`list`): For each layer the other positional and the keyword arguments.
        rest (`list`): For each layer what it returned behind the hidden states, `None` if it returned them alone.
        gaps (`set[int]`): Layers that read something else than what the layer below returned.
    """

    hidden: torch.Tensor
    end: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    rest: list[tuple[Any, ...] | None] = field(default_factory=list)
    gaps: set[int] = field(default_factory=set)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


@contextmanager
def record_calls(root: nn.Module, stacks: Iterable[str]) -> Iterator[dict[str, LayerCalls]]:
    """Within the context, record how each layer is called in one forward pass, without its autograd graph.

    Args:
        root (`nn.Module`): The base model.
        stacks (iterable of `str`): The stacks to record.

    Yields:
        `dict[str, LayerCalls]`: By stack, as far as its layers have run.
    """
    calls: dict[str, LayerCalls] = {}
    last: dict[str, torch.Tensor] = {}
    handles = []

    def before(stack: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(kwargs)
            hidden, others = (args[0], args[1:]) if args else (named.pop("hidden_states"), ())
            call = calls.setdefault(stack, LayerCalls(hidden.detach(), hidden.detach()))
            if call.arguments and hidden is not last[stack]:
                call.gaps.add(len(call.arguments))
            call.arguments.append(tree_map(_detached, (others, named)))

        return note

    def after(stack: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            alone = not isinstance(output, tuple)
            last[stack] = output if alone else output[0]
            calls[stack].end = last[stack].detach()
            calls[stack].rest.append(None if alone else tree_map(_detached, output[1:]))

        return note

    try:
        for stack in stacks:
            layers = root.get_submodule(stack)
            assert isinstance(layers, nn.ModuleList)
            for layer in layers:
                handles.append(layer.register_forward_pre_hook(before(stack), with_kwargs=True))
                handles.append(layer.register_forward_hook(after(stack)))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resume_at(
    root: nn.Module, calls: Mapping[str, LayerCalls], hidden: Mapping[str, tuple[int, torch.Tensor]]
) -> Iterator[None]:
    """Within the context, a forward pass computes the upper layers only.

    Args:
        root (`nn.Module`): The base model.
        calls (`dict[str, LayerCalls]`): What [`record_calls`] recorded for this batch.
        hidden (`dict[str, tuple[int, torch.Tensor]]`): For a stack the first layer to compute and what goes into it;
            its number of layers, to compute none, and what comes out of the last.
    """

    def resumed(first: int, start: torch.Tensor, rest: list[tuple[Any, ...] | None]) -> Callable[..., Any]:
        def layer(index: int, forward: Callable[..., Any], given: torch.Tensor, others: Any) -> Any:
            if index < first:
                extras = rest[index]
                return start if extras is None else (start, *extras)
            return forward(start if index == first else given, *others[0], **others[1])

        return layer

    with ExitStack() as replaced:
        for stack, (first, start) in hidden.items():
            replaced.enter_context(replace_layers(root, stack, resumed(first, start, calls[stack].rest)))
        yield
