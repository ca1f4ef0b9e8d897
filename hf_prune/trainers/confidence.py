"""How sure attention heads are: PASS opens closed heads again by it."""

import inspect
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import PreTrainedModel

from ..architectures import AttentionSpec
from ..errors import UnsupportedModelError
from ..processes import process_state
from ..units import UnitGroup
from .head_gates import HeadGates


def head_confidence(model: PreTrainedModel, gates: HeadGates, batches: list[dict[str, Any]]) -> torch.Tensor:
    """How sure each head is: the largest attention probability of a query, mean over queries; the surest head has 1.

    The authors' code sums it up in every step since the last reopening. Here it is that of the batches of one step, in
    the model as it would be left: a mean over thousands of queries as it is, and the attention that gives the
    probabilities is too slow and too large for every step.

    Args:
        model (`PreTrainedModel`): The model. It is called in evaluation mode, in which it is left.
        gates ([`HeadGates`]): Its gates.
        batches (`list[dict]`): What to call it with; of this what its `forward` names. Queries at padding don't count.
            Several processes take the mean.

    Returns:
        `torch.Tensor`: float64 of shape (n,), from 0 to 1.

    Raises:
        UnsupportedModelError: The model does not return attention probabilities.
    """
    before = model.config._attn_implementation
    known = inspect.signature(type(model).forward).parameters  # a trainer may call a forward of its own
    total = torch.zeros(len(gates), dtype=torch.float64)
    model.eval()
    model.set_attn_implementation("eager")  # the only one that has the probabilities
    try:
        for batch in batches:
            given = {name: value for name, value in batch.items() if name in known}
            with torch.no_grad():
                outputs = model(**{**given, "output_attentions": True, "return_dict": True})
            total += torch.cat([_group_confidence(outputs, group, batch) for group in gates.groups])
    finally:
        model.set_attn_implementation(before)
    if process_state().num_processes > 1:
        total = reduce(total.to(model.device, torch.float32), "mean").cpu().double()
    return total / total.max()


def _group_confidence(outputs: Any, group: UnitGroup, batch: dict[str, Any]) -> torch.Tensor:
    assert isinstance(group.block, AttentionSpec)
    decodes = outputs.get("decoder_attentions") is not None and group.stack.startswith("decoder")
    both = outputs.get("encoder_attentions") is not None
    side = "decoder_" if decodes else "encoder_"
    name = "cross_attentions" if group.block.cross else f"{side if both else ''}attentions"
    layers = outputs.get(name)
    if not layers or layers[group.layer] is None:
        raise UnsupportedModelError(
            f"The model returns no attention probabilities for {group.name}, by which heads are opened again: set "
            "reopen=False."
        )
    best = layers[group.layer].double().amax(-1).cpu()  # (batch, query heads, queries)
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    if decodes and mask is None and batch.get("labels") is not None:
        mask = batch["labels"] != -100  # collators leave the mask of the decoder away
    real = torch.ones_like(best[:, 0])
    if mask is not None and mask.shape == real.shape:
        real = mask.cpu().to(real)
    mean: torch.Tensor = (best * real[:, None]).sum((0, 2)) / real.sum()
    return mean.view(group.size, -1).mean(1)
