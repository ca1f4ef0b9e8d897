"""[`WeightMask`]: which weights stay. `True` = keep."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from .errors import MaskError, unknown
from .masks import MASK_FILE
from .offload import resident

_VERSION = 1


def pack(keep: torch.Tensor) -> torch.Tensor:
    """A bool tensor as bytes of eight, flat.

    Args:
        keep (`torch.Tensor`): bool, of any shape and on any device.

    Returns:
        `torch.Tensor`: uint8 of shape (⌈size / 8⌉,), on the CPU. The first weight is the highest bit of the first
        byte.
    """
    return torch.from_numpy(np.packbits(keep.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1)))


def unpack(bits: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Inverse of [`pack`].

    Args:
        bits (`torch.Tensor`): uint8 on the CPU, of as many bits as the shape has entries, or more.
        shape (`tuple[int, ...]`): The shape.

    Returns:
        `torch.Tensor`: bool of that shape, on the CPU.
    """
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).view(torch.bool).reshape(shape)


class WeightMask(Mapping[str, torch.Tensor]):
    """For each pruned parameter a bool tensor of its shape, on the CPU: `True` = keep.

    Names and orientation are those of `model.named_parameters()`; parameters that are missing are kept whole. The
    pruned weights of a model are zeros in plain tensors, so there is nothing to shrink: a model with zeros is as large
    and, on dense kernels, as slow as before. The mask says which zeros training has to keep. `&` and `|` combine masks
    of the same parameters, `==` compares.

    Args:
        keep (`dict[str, torch.Tensor]`): The bool tensors by name of a parameter. They are kept as packed bits.

    Raises:
        MaskError: One is no bool tensor.

    Examples:
        ```python
        >>> mask = hf_prune.prune(model, hf_prune.WandaConfig(sparsity=0.5), texts, processing_class=tokenizer).mask
        >>> mask.sparsity(), mask.sparsity("model.layers.0.mlp.down_proj.weight")
        (0.5, 0.5)
        >>> mask.apply(model)  # again, after an optimizer step
        ```
    """

    def __init__(self, keep: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in keep.items():
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.bool:
                got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise MaskError(f"The mask of {name} must be a bool tensor, got {got}.")
        self._bits = {name: pack(tensor) for name, tensor in keep.items()}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in keep.items()}

    @classmethod
    def from_bits(cls, bits: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> "WeightMask":
        """A mask from packed bits ([`pack`]) and shapes, by name.

        Args:
            bits (`dict[str, torch.Tensor]`): The packed bits. They are kept, not copied.
            shapes (`dict[str, tuple[int, ...]]`): The shape of each parameter.

        Returns:
            [`WeightMask`]: Of the names in `shapes`.

        Raises:
            MaskError: They don't fit.
        """
        mask = cls({})
        for name, shape in shapes.items():
            if not all(type(size) is int and size >= 0 for size in shape):
                raise MaskError(f"The mask of {name} has no shape: {shape!r}.")
            if bits[name].dtype != torch.uint8 or bits[name].shape != (-(-int(np.prod(shape)) // 8),):
                raise MaskError(f"The mask of {name} does not have the bits of its shape, {shape!r}.")
            mask._bits[name], mask._shapes[name] = bits[name], tuple(shape)
        return mask

    # A mapping

    def __getitem__(self, name: str) -> torch.Tensor:
        return unpack(self._bits[name], self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __repr__(self) -> str:
        return f"WeightMask({len(self)} parameters, {self.sparsity():.2%} of {self.total():,} weights pruned)"

    # Algebra

    def __and__(self, other: "WeightMask") -> "WeightMask":
        return self._combine(other, torch.logical_and)

    def __or__(self, other: "WeightMask") -> "WeightMask":
        return self._combine(other, torch.logical_or)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightMask):
            return NotImplemented
        return self._shapes == other._shapes and all(torch.equal(b, other._bits[n]) for n, b in self._bits.items())

    __hash__ = None  # type: ignore[assignment]  # as PruningMask

    def _combine(self, other: "WeightMask", op: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> "WeightMask":
        if not isinstance(other, WeightMask):
            return NotImplemented
        if self._shapes != other._shapes:
            raise MaskError(f"Masks of different parameters don't combine: {self!r} and {other!r}.")
        return WeightMask({name: op(self[name], other[name]) for name in self})

    # Counting

    def kept(self, name: str | None = None) -> int:
        """Number of kept weights, of one parameter or of all."""
        return sum(int(self[n].sum()) for n in ([name] if name is not None else self))

    def total(self, name: str | None = None) -> int:
        """Number of weights, of one parameter or of all."""
        return sum(int(np.prod(self._shapes[n])) for n in ([name] if name is not None else self))

    def sparsity(self, name: str | None = None) -> float:
        """Pruned share of the weights, of one parameter or of all."""
        return 1 - self.kept(name) / max(self.total(name), 1)

    # On a model

    def apply(self, model: PreTrainedModel) -> None:
        """Zero the pruned weights of a model in place, offloaded ones too.

        Raises:
            MaskError: The mask is for another model.
        """
        for name, parameter in self._parameters(model, write=True):
            with torch.no_grad():
                parameter.masked_fill_(~self[name].to(parameter.device), 0)

    def check(self, model: PreTrainedModel) -> None:
        """Raise unless all pruned weights of a model are zero.

        Raises:
            MaskError: Some are not, or the mask is for another model.
        """
        for name, parameter in self._parameters(model):
            revived = int(parameter.detach()[~self[name].to(parameter.device)].count_nonzero())
            if revived:
                raise MaskError(f"{revived:,} pruned weights of {name} are not zero: mask.apply(model) zeroes them.")

    def _parameters(self, model: PreTrainedModel, write: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the mask, each while it is on its device."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, shape in self._shapes.items():
            if name not in shapes:
                raise MaskError(f"This mask is for another model. {unknown('parameter', name, shapes):.300}")
            if shape != shapes[name]:
                raise MaskError(f"This mask is for another model: {name} is {shapes[name]}, the mask {shape}.")
        for name in self:
            path, _, own = name.rpartition(".")
            module = model.get_submodule(path)
            with resident(module, write):
                yield name, getattr(module, own)

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a `.safetensors` file, one bit a weight. A folder gets `pruning_mask.safetensors`.

        Args:
            path (`str` or path): A file that is written over if need be, or a folder that exists.

        Raises:
            MaskError: The path has another ending, and is no folder.
        """
        head = json.dumps({"version": _VERSION, "shapes": self._shapes})
        save_file(self._bits, _mask_path(path), metadata={"hf_prune_weight_mask": head})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "WeightMask":
        """Read a file written by [`~WeightMask.save`].

        Args:
            path (`str` or path): The file, or the folder that holds `pruning_mask.safetensors`.

        Raises:
            MaskError: There is no such file, or it holds no mask of weights.
        """
        path = _mask_path(path)
        try:
            with safe_open(path, "pt") as file:
                head = json.loads((file.metadata() or {})["hf_prune_weight_mask"])
                if head["version"] != _VERSION:
                    raise MaskError(
                        f"This mask has version {head['version']!r}, this hf_prune reads {_VERSION}: update hf_prune."
                    )
                return cls.from_bits({name: file.get_tensor(name) for name in head["shapes"]}, head["shapes"])
        except (OSError, KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            if isinstance(error, MaskError):
                raise
            raise MaskError(f"{path} holds no mask of weights: {type(error).__name__} {error}.") from error


def _mask_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.is_dir():
        return path / MASK_FILE
    if path.suffix != ".safetensors":
        raise MaskError(f"A file with a mask of weights ends in .safetensors, got {path.name!r}.")
    return path
