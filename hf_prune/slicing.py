"""Sub-networks that cost what their size says, and share the weights of the whole model.

[`subnetwork`] is a second set of modules whose parameters are slices of the model's own. It computes what the masked
model computes, in the time of the shrunk one, and its backward pass writes into the gradients of the model.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import MaskError
from .gates import current_mask
from .masks import PruningMask
from .offload import refuse_offloaded
from .surgery import check_shrinkable, cut_model
from .units import PrunableUnits, prunable_units

_OF_THE_INSTANCE = ("forward", "_original_forward", "_compiled_call_impl")  # they would call the whole model


def subnetwork(model: PreTrainedModel, mask: PruningMask, units: PrunableUnits | None = None) -> PreTrainedModel:
    """What a mask leaves of a model, on slices of its weights.

    Making one takes about as long as listing the modules; no weight is copied where what stays lies in one piece, as
    the first k units do. It serves for any number of batches, until the weights change: then copies do not.

    Gradients are those of the masked model: `backward()` adds them to `grad` of the model's parameters, 0 for what is
    cut, and dropped layers get none. (`torch.autograd.grad` does not see the model.) Hooks and gradient checkpointing
    work as in the model. It runs uncompiled, and without the wrappers of mixed precision that Accelerate puts on a
    model: call it within `accelerator.autocast()`. DDP does not see it: call it outside of the wrapper, and reduce the
    gradients.

    Args:
        model (`PreTrainedModel`): The model. It is not changed.
        mask ([`PruningMask`]): What stays.
        units ([`PrunableUnits`], *optional*): Its units, to save the time of finding them.

    Returns:
        `PreTrainedModel`: Of the same class and mode. Don't save or shrink it: shrink a copy of the model instead.

    Raises:
        MaskError: The mask is for another model, or prunes what this family can't lose; the model carries a mask.
        UnsupportedModelError: The model can't be pruned.

    Examples:
        ```python
        >>> small = subnetwork(model, space.mask({"num_layers": 4, "num_heads": 6, "num_units": 1024}))
        >>> small(**batch).loss.backward()
        ```
    """
    refuse_offloaded(model)
    if current_mask(model) is not None:
        raise MaskError("The model carries a mask: shrink it first, or take the mask off with remove_mask(model).")
    units = units if units is not None else prunable_units(model)
    check_shrinkable(units, mask)
    shadow = _shadow(model, {})
    cut_model(shadow, units, mask, _sliced)
    _spare_embeddings(shadow)
    return shadow


def _sliced(parameter: torch.Tensor, dim: int, index: torch.Tensor) -> nn.Parameter:
    """Some entries of a parameter, without a copy where they lie in one piece."""
    count = len(index)
    first = int(index[0]) if count else 0
    if count == 0 or int(index[-1]) - first + 1 == count:  # indices ascend
        part = parameter.detach().narrow(dim, first, count)
        return _part(part, parameter, lambda whole, mine: whole.narrow(dim, first, count).add_(mine))
    index = index.to(parameter.device)
    part = parameter.detach().index_select(dim, index)
    return _part(part, parameter, lambda whole, mine: whole.index_add_(dim, index, mine))


def _spare_embeddings(model: PreTrainedModel) -> None:
    """Let the gradient of the embeddings hold the tokens of the batch, not the whole vocabulary."""
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding) or table.scale_grad_by_freq:
        return
    weight = table.weight
    if weight.device.type == "mps":  # it lacks operations on sparse tensors
        return
    if sum(p is weight for module in model.modules() for p in module._parameters.values()) == 1:
        table.sparse = True
        table._parameters["weight"] = _part(weight.detach(), weight, torch.Tensor.add_)


def _part(part: torch.Tensor, whole: torch.Tensor, add: Callable[[torch.Tensor, torch.Tensor], Any]) -> nn.Parameter:
    """Part of a parameter as one of its own, whose gradient goes to that of the whole one, with `add`.

    A slice as an operation of the graph would make a gradient of the full size in each pass, most of it zeros.
    """
    parameter = nn.Parameter(part, requires_grad=whole.requires_grad)

    def hand_over(parameter: torch.Tensor) -> None:
        if whole.grad is None:
            whole.grad = torch.zeros_like(whole)
        add(whole.grad, parameter.grad)  # type: ignore[arg-type]
        parameter.grad = None

    if whole.requires_grad:
        parameter.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
    return parameter


def _shadow(module: Any, made: dict[int, Any]) -> Any:
    """A module with attributes and configs of its own, and the parameters and buffers of another one."""
    if id(module) not in made:
        shadow = made[id(module)] = object.__new__(type(module))
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                value = made.setdefault(id(value), copy.copy(value))
            elif isinstance(value, dict):  # parameters, buffers, modules, hooks
                value = value.copy()
            if name not in _OF_THE_INSTANCE:
                vars(shadow)[name] = value
        for name, child in module._modules.items():
            shadow._modules[name] = None if child is None else _shadow(child, made)
    return made[id(module)]
