"""The weight matrices of the projections inside the blocks of a model."""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import ConfigError, UnsupportedModelError, unknown
from .offload import storages
from .units import PrunableUnits, base_model, features


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a projection inside a block.

    Args:
        name (`str`): Its name in `model.named_parameters()`.
        stack, layer (`str`, `int`): The block.
        path (`str`): The projection, relative to the block.
        inputs, outputs (`int`): Its features.
        transposed (`bool`): The parameter is stored as (inputs, outputs), as `Conv1D` does.
        reads_encoder (`bool`): Its inputs are the encoder's tokens: keys and values of cross-attention.
    """

    name: str
    stack: str
    layer: int
    path: str
    inputs: int
    outputs: int
    transposed: bool
    reads_encoder: bool

    @property
    def module(self) -> str:
        """The name of the projection in the model."""
        return self.name.removesuffix(".weight")

    def of(self, model: nn.Module) -> torch.Tensor:
        """The matrix as (outputs, inputs): a view of the parameter's data."""
        weight = model.get_parameter(self.name).data
        return weight.T if self.transposed else weight


def weight_matrices(model: PreTrainedModel, units: PrunableUnits, exclude: tuple[str, ...] = ()) -> list[Matrix]:
    """The weights of all `nn.Linear` and `Conv1D` inside the blocks of a model, in the order of the forward pass.

    Args:
        model (`PreTrainedModel`): The model.
        units ([`PrunableUnits`]): Its units, whose stacks are the blocks. Embeddings and head lie outside.
        exclude (`tuple[str, ...]`, *optional*): Shell patterns of parameters or projections to leave out, such as
            `"model.layers.0.*"` or, relative to the base model, `"layers.*.mlp.down_proj"`.

    Returns:
        `list[Matrix]`: At least one.

    Raises:
        ConfigError: A pattern matches nothing, or all is excluded.
        UnsupportedModelError: One of the weights is shared with another module.
    """
    base = base_model(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    places, owners = storages(model), defaultdict[Hashable, list[str]](list)
    for name, place in places.items():
        owners[place].append(name)
    found, names = [], []
    hits = {pattern: False for pattern in exclude}
    for stack, spec in units.stacks.items():
        encoder = {f"{b.module}.{path}" for b in spec.attention if b.cross for path in (b.key, b.value)}
        for index, layer in base.get_submodule(stack).named_children():
            for path, module in layer.named_modules():
                if not isinstance(module, nn.Linear | Conv1D):
                    continue
                name = f"{prefix}{stack}.{index}.{path}.weight"
                short = f"{stack}.{index}.{path}"
                names.append(f"{prefix}{short}")
                matching = [p for p in exclude if any(fnmatchcase(n, p) for n in (name, names[-1], short))]
                hits |= dict.fromkeys(matching, True)
                if matching:
                    continue
                sharing = owners[places[name]]
                if len(sharing) > 1:
                    raise UnsupportedModelError(
                        f"{' and '.join(sharing)} share one weight, which would be pruned for the inputs of one of "
                        "them: untie them, or exclude it."
                    )
                inputs, outputs = features(module)
                conv = isinstance(module, Conv1D)
                found.append(Matrix(name, stack, int(index), path, inputs, outputs, conv, path in encoder))
    for pattern, hit in hits.items():
        if not hit:
            raise ConfigError(
                unknown("pattern in exclude", pattern, names, "Shell patterns such as 'layers.0.*' work.")
            )
    if not found:
        raise ConfigError("There is nothing left to prune: exclude fewer projections.")
    return found
