"""Checkpoints in which a zero takes one bit.

A tensor X of such a checkpoint is three: X holds the values that are not zero, in their order; `X.hf_prune_bits` says
for each weight whether it is one of them, `X.hf_prune_shape` how the whole is shaped. `from_pretrained` builds one by
one as it comes to them (see [`layout.enable`]). Without hf_prune it fails: the one-dimensional X fits no parameter. A
checkpoint is a file that a stranger may have written: what it claims is checked against what it holds first.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .errors import LayoutError
from .weight_masks import pack, unpack

_BITS, _SHAPE = ".hf_prune_bits", ".hf_prune_shape"


def compressed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, those with enough zeros in three parts.

    Args:
        tensors (mapping of `str` to `torch.Tensor`): Tensors by name. Matrices of floating-point numbers that become
            smaller are taken apart; the others are returned as they are.

    Returns:
        `dict[str, torch.Tensor]`: For a tensor that is taken apart its values that are not zero, of its dtype and one
        dimension; `.hf_prune_bits`, packed as by [`~hf_prune.weight_masks.pack`]; `.hf_prune_shape`, int64.
    """
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        keep = tensor != 0
        size = int(keep.sum()) * tensor.element_size() + tensor.numel() // 8
        if tensor.dim() < 2 or not tensor.is_floating_point() or size >= tensor.nbytes:
            parts[name] = tensor
        else:
            shape = torch.tensor(tensor.shape)
            parts |= {name: tensor[keep], name + _BITS: pack(keep), name + _SHAPE: shape}
    return parts


def is_compressed(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if any(name.endswith(_BITS) for name in file.keys()):
                return True
    return False


class _Sparse:
    """Stands for a tensor of a checkpoint, as the slices of safetensors do: it is built when it is read.

    Args:
        name (`str`): Its name.
        values, bits, shape: Its parts, tensors or slices of safetensors.

    Raises:
        LayoutError: They don't fit together. Reading raises it as well.
    """

    def __init__(self, name: str, values: Any, bits: Any, shape: Any) -> None:
        self.name, self.values, self.bits = name, values, bits
        numbers, packed = shape[...], bits[...]  # bits take an eighth of a byte for a weight, from a mapped file
        legal = numbers.dtype == torch.int64 and numbers.dim() == 1 and 2 <= len(numbers) <= 8 and numbers.min() > 0
        self.shape: tuple[int, ...] = tuple(numbers.tolist()) if legal else ()
        if not legal or packed.dtype != torch.uint8 or packed.shape != (-(-math.prod(self.shape) // 8),):
            raise LayoutError(f"This checkpoint is damaged: {name} does not have the bits of its shape.")

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        dtype: str = self.values.get_dtype()
        return dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        values, keep = self.values[...], unpack(self.bits[...], self.shape)
        if values.shape != (int(keep.sum()),):
            raise LayoutError(f"This checkpoint is damaged: {self.name} does not have the values of its bits.")
        whole: torch.Tensor = values.new_zeros(self.shape).masked_scatter_(keep, values)[index]
        return whole


def expanded(state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint with its tensors whole again; without parts it is returned as it is.

    Args:
        state (mapping of `str` to tensors or slices of safetensors): Tensors by name.

    Returns:
        `dict[str, Any]`: Under the names of the model. What was a slice of safetensors is one still, and is built when
        it is read.

    Raises:
        LayoutError: Parts are missing, or don't fit together.
    """
    whole = dict(state)
    for name in [key.removesuffix(_BITS) for key in state if key.endswith(_BITS)]:
        missing = [key for key in (name, name + _SHAPE) if key not in state]
        if missing:
            raise LayoutError(f"This checkpoint is damaged: {name + _BITS} comes without {missing[0]}.")
        sparse = _Sparse(name, state[name], whole.pop(name + _BITS), whole.pop(name + _SHAPE))
        whole[name] = sparse[...] if isinstance(state[name], torch.Tensor) else sparse
    return whole
