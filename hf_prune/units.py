"""The prunable units of a model: heads, neurons and layers.

A unit is a slice of the input of one projection, the *site* of its [`UnitGroup`]: the attention output projection for
heads, the down projection for neurons. Masking, observing and cutting all happen there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from .architectures import Architecture, AttentionSpec, FeedForwardSpec, StackSpec, get_architecture
from .errors import ConfigError, UnsupportedModelError, unknown
from .offload import is_offloaded

Projection: TypeAlias = nn.Linear | Conv1D
Kind = Literal["heads", "neurons", "layers"]
KINDS: tuple[Kind, ...] = ("heads", "neurons", "layers")


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind at one place.

    Args:
        name (`str`): The site, relative to the base model: `"encoder.layer.0.output.dense"`. For layers the stack.
        kind (`"heads"`, `"neurons"` or `"layers"`): Under grouped-query attention a unit of kind `"heads"` is a KV
            group.
        size (`int`): Number of units.
        width (`int`): Columns of the site's input that one unit takes. 0 for layers.
        stack (`str`): The stack of layers it belongs to.
        layer (`int`): Index of its layer. -1 for layers.
        block (`AttentionSpec` or `FeedForwardSpec`, *optional*): Its entry in the table of families. `None` for
            layers.
        prunable (`bool`): `False` where units are counted but must stay.
    """

    name: str
    kind: Kind
    size: int
    width: int
    stack: str
    layer: int
    block: AttentionSpec | FeedForwardSpec | None = None
    prunable: bool = True


class PrunableUnits(Mapping[str, UnitGroup]):
    """All unit groups of a model, by name, in the order of the forward pass. Made by [`prunable_units`].

    Args:
        model_type (`str`): Its family, `config.model_type`.
        architecture ([`Architecture`]): The entry of the family.
        groups (`list[UnitGroup]`): The groups.
    """

    def __init__(self, model_type: str, architecture: Architecture, groups: list[UnitGroup]) -> None:
        self.model_type = model_type
        self.architecture = architecture
        self._groups = {group.name: group for group in groups}

    def __getitem__(self, name: str) -> UnitGroup:
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        counts = {kind: sum(g.size for g in self.of_kind(kind)) for kind in KINDS}
        return f"PrunableUnits({self.model_type}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()) + ")"

    @cached_property
    def stacks(self) -> dict[str, StackSpec]:
        """The stacks that this model has, by the name of their group of layers."""
        present = {group.name for group in self.of_kind("layers")}
        return {spec.layers: spec for spec in self.architecture.stacks if spec.layers in present}

    def of_kind(self, *kinds: Kind) -> list[UnitGroup]:
        """The groups of some kinds.

        Args:
            kinds (`"heads"`, `"neurons"` or `"layers"`): One or more.

        Returns:
            `list[UnitGroup]`: In the order of the forward pass.
        """
        return [group for group in self._groups.values() if group.kind in kinds]

    def of_layer(self, stack: str, layer: int) -> list[UnitGroup]:
        """The groups of heads and neurons in one layer, in the order of the forward pass.

        Args:
            stack (`str`): The stack, by its name in `stacks`.
            layer (`int`): Index of the layer.

        Returns:
            `list[UnitGroup]`: Empty where there is no such layer.
        """
        return [group for group in self._groups.values() if group.stack == stack and group.layer == layer]

    def matching(self, patterns: tuple[str, ...]) -> set[str]:
        """Names of the groups that match one of the shell patterns, such as `"encoder.layer.0.*"`.

        Args:
            patterns (`tuple[str, ...]`): The patterns. Without any, no group matches.

        Raises:
            ConfigError: A pattern matches nothing.
        """
        found: set[str] = set()
        for pattern in patterns:
            hits = {name for name in self if fnmatchcase(name, pattern)}
            if not hits:
                raise ConfigError(
                    unknown("pattern in exclude", pattern, self, "Shell patterns such as 'encoder.layer.0.*' work.")
                )
            found |= hits
        return found


def base_model(model: PreTrainedModel) -> nn.Module:
    """The model without its head. Unit names are relative to it, so that a mask serves every head."""
    base: nn.Module = model.base_model
    return base


def site(model: PreTrainedModel, group: UnitGroup) -> Projection:
    """The projection whose input holds the units of a group of heads or neurons.

    Args:
        model (`PreTrainedModel`): The model.
        group ([`UnitGroup`]): The group. Groups of layers have no site.

    Returns:
        `nn.Linear` or `Conv1D`: The module itself, as it is in the model.

    Raises:
        UnsupportedModelError: Another kind of module is there, such as one with an adapter.
    """
    return projection(base_model(model), group.name)


def projection(root: nn.Module, path: str) -> Projection:
    """The `nn.Linear` or `Conv1D` at a path.

    Args:
        root (`nn.Module`): What the path is relative to.
        path (`str`): The names, with dots between them.

    Returns:
        `nn.Linear` or `Conv1D`: The module.

    Raises:
        UnsupportedModelError: There is something else.
    """
    module = root.get_submodule(path)
    if type(module) is nn.Linear or isinstance(module, Conv1D):
        return module
    raise UnsupportedModelError(
        f"{path} is a {type(module).__name__}, no plain Linear or Conv1D: merge adapters and dequantise first."
    )


def features(module: Projection) -> tuple[int, int]:
    """(inputs, outputs) of a projection; `Conv1D` stores its weight the other way round."""
    first, second = module.weight.shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)


def output_matrix(module: Projection) -> torch.Tensor:
    """The weight of a projection as (inputs, outputs): row i is what input i writes.

    Args:
        module (`nn.Linear` or `Conv1D`): The projection.

    Returns:
        `torch.Tensor`: A view of shape (inputs, outputs): to write to it, under `no_grad`, is to change the weight.
    """
    return module.weight if isinstance(module, Conv1D) else module.weight.T


def head_counts(layer: nn.Module, spec: AttentionSpec) -> tuple[int, int, int]:
    """(query heads, KV heads, size of a head) of an attention block, as its weights are now.

    Args:
        layer (`nn.Module`): The layer that the block is in.
        spec ([`AttentionSpec`]): Its entry in the table of families.

    Returns:
        `tuple[int, int, int]`: Without grouped-query attention the first two are equal.

    Raises:
        UnsupportedModelError: A projection is no plain `nn.Linear` or `Conv1D`.
    """
    attention = layer.get_submodule(spec.module)
    size: int = getattr(attention, spec.head_dim)
    queries = features(projection(layer, spec.output))[0] // size
    if spec.fused:
        keys = (features(projection(attention, spec.fused))[1] // size - queries) // 2
    else:
        keys = features(projection(attention, spec.key))[1] // size
    return queries, keys, size


def refuse_unprunable(model: object) -> None:
    """Raise if a model can't be pruned as it is, and say what to do.

    Raises:
        UnsupportedModelError: Not a `PreTrainedModel`, or one with adapters, quantised, or without weights.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        for attribute, how in (
            ("merge_and_unload", "call merge_and_unload() first"),
            ("_orig_mod", "pass model._orig_mod"),
            ("module", "pass model.module"),
        ):
            if hasattr(model, attribute):
                raise UnsupportedModelError(f"{name} wraps a model: {how}, then prune that.")
        raise UnsupportedModelError(f"hf_prune prunes transformers.PreTrainedModel, got {name}.")
    if getattr(model, "_hf_peft_config_loaded", False) or any("lora_A" in n for n, _ in model.named_modules()):
        raise UnsupportedModelError(f"{name} carries PEFT adapters: merge them (merge_and_unload()) before pruning.")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not all(
        p.is_floating_point() and type(p) is nn.Parameter for p in model.parameters()
    ):
        raise UnsupportedModelError(
            f"{name} is quantised ({type(quantizer).__name__}): load it in float, prune, then quantise."
        )
    meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if meta is not None and not is_offloaded(model):
        raise UnsupportedModelError(f"{name} has no weights ({meta} is on the meta device): load them before pruning.")


def forget_gguf(model: PreTrainedModel) -> None:
    """Take off the mark of a GGUF file from a model whose weights were unpacked when it was loaded.

    With it transformers refuses to save the model and to train it, though all weights are plain.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, GgufHfQuantizer) and all(p.is_floating_point() for p in model.parameters()):
        quantizer.remove_quantization_config(model)


def prunable_units(model: PreTrainedModel) -> PrunableUnits:
    """Find the heads, neurons and layers of a model that can be pruned.

    Args:
        model (`PreTrainedModel`): Any model of a registered family, with any head. It is not changed.

    Returns:
        [`PrunableUnits`]: For each layer the groups of heads and neurons, for each stack the group of its layers.

    Raises:
        UnsupportedModelError: The family is unknown, the model is of a kind that can't be pruned, or its modules are
            not where the table of families says.
    """
    refuse_unprunable(model)
    config, base = model.config, base_model(model)
    architecture = get_architecture(config.model_type)
    reason = architecture.refuse(config) if architecture.refuse else None
    if reason:
        raise UnsupportedModelError(f"This {type(model).__name__} can't be pruned: {reason}.")
    groups: list[UnitGroup] = []
    try:
        for stack in architecture.stacks:
            # Encoder-only and decoder-only classes of an encoder-decoder have one of the two stacks.
            if len(architecture.stacks) == 1 or hasattr(base, stack.layers.partition(".")[0]):
                groups += _stack_units(base, stack)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not built as the entry of {config.model_type!r} says: {error}."
        ) from error
    _refuse_shared(base, groups)
    return PrunableUnits(config.model_type, architecture, groups)


def _stack_units(base: nn.Module, stack: StackSpec) -> list[UnitGroup]:
    layers = base.get_submodule(stack.layers)
    assert isinstance(layers, nn.ModuleList)
    groups = []
    for index, layer in enumerate(layers):
        path = f"{stack.layers}.{index}"
        for block in stack.attention:
            queries, keys, size = head_counts(layer, block)
            if queries % max(keys, 1) or bool(queries) != bool(keys):
                raise UnsupportedModelError(
                    f"{path}.{block.module} has {queries} query heads and {keys} KV heads by its entry in the table: "
                    "the entry is wrong."
                )
            # A block that lost all its heads has no ratio of queries to keys any more, and nothing left to prune.
            width = size * queries // keys if keys else size
            groups.append(
                UnitGroup(f"{path}.{block.output}", "heads", keys, width, stack.layers, index, block, block.prunable)
            )
        feed_forward = stack.feed_forward
        neurons, _ = features(projection(layer, feed_forward.output))
        groups.append(
            UnitGroup(f"{path}.{feed_forward.output}", "neurons", neurons, 1, stack.layers, index, feed_forward)
        )
    return [*groups, UnitGroup(stack.layers, "layers", len(layers), 0, stack.layers, -1)]


def _refuse_shared(base: nn.Module, groups: list[UnitGroup]) -> None:
    owners: dict[int, str] = {}
    for group in groups:
        if group.kind != "layers":
            weight = projection(base, group.name).weight
            first = owners.setdefault(id(weight), group.name)
            if first != group.name:
                raise UnsupportedModelError(
                    f"{first} and {group.name} share one weight: their units can't be pruned apart."
                )


def kept_columns(group: UnitGroup, keep: torch.Tensor) -> torch.Tensor:
    """Indices of the site's input columns that belong to the kept units.

    Args:
        group ([`UnitGroup`]): A group of heads or neurons.
        keep (`torch.Tensor`): bool of shape (units,).

    Returns:
        `torch.Tensor`: int64 of shape (kept units · width,), ascending, on the device of `keep`.
    """
    return keep.repeat_interleave(group.width).nonzero().flatten()
