"""Cut pruned units out of a model: the only place where shapes change."""

import copy
from collections.abc import Callable
from typing import TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architectures import AttentionSpec, FeedForwardSpec, StackSpec
from .emptied import run_empty
from .errors import MaskError
from .gates import current_mask, remove_mask
from .layout import KEY, ConfigView, record, skeleton
from .masks import PruningMask
from .offload import refuse_offloaded
from .units import Projection, PrunableUnits, UnitGroup, base_model, features, head_counts, projection, prunable_units

Select: TypeAlias = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


def copied(parameter: torch.Tensor, dim: int, index: torch.Tensor) -> nn.Parameter:
    """A new parameter with some entries of another one. Dtype, device and `requires_grad` stay.

    Args:
        parameter (`torch.Tensor`): The other one.
        dim (`int`): The dimension in which entries are chosen.
        index (`torch.Tensor`): Which of them, in their new order, int64 of shape (kept,).

    Returns:
        `nn.Parameter`: Of the same shape, but `kept` entries in `dim`.
    """
    small = parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(small, requires_grad=parameter.requires_grad)


def cut(module: Projection, index: torch.Tensor, side: str, select: Select = copied) -> None:
    """Keep some inputs or outputs of a projection, in place.

    Args:
        module (`nn.Linear` or `Conv1D`): The projection.
        index (`torch.Tensor`): Indices of what stays.
        side (`"inputs"` or `"outputs"`): Which features are cut.
        select (`Callable`, *optional*): Makes what takes the place of a parameter, given that, a dimension and
            `index`. Defaults to [`copied`].
    """
    conv = isinstance(module, Conv1D)
    outputs = side == "outputs"
    module._parameters["weight"] = select(module.weight, 0 if outputs != conv else 1, index)  # type: ignore[assignment]
    if outputs and module.bias is not None:
        module._parameters["bias"] = select(module.bias, 0, index)  # type: ignore[assignment]
    inputs, rows = features(module)
    if isinstance(module, Conv1D):
        module.nx, module.nf = inputs, rows
    else:
        module.in_features, module.out_features = inputs, rows
    run_empty(module)


def cut_heads(layer: nn.Module, spec: AttentionSpec, keep: torch.Tensor, select: Select = copied) -> None:
    """Keep some heads (KV groups) of an attention block, in place.

    Args:
        layer (`nn.Module`): The layer.
        spec ([`AttentionSpec`]): The block, by the table of families.
        keep (`torch.Tensor`): bool of shape (units,), or the indices of the units that stay, in their new order.
        select (`Callable`, *optional*): See [`cut`].
    """
    queries, keys, size = head_counts(layer, spec)
    group = queries // keys
    index = _indices(keep)
    kept = len(index)

    def rows(width: int) -> torch.Tensor:
        return (index[:, None] * width + torch.arange(width)).flatten()

    attention = layer.get_submodule(spec.module)
    query_rows, key_rows = rows(group * size), rows(size)
    if not spec.fused:
        names = {spec.query: query_rows, spec.key: key_rows, spec.value: key_rows}
        names |= {name: query_rows for name in spec.extra if hasattr(attention, name)}
        for name, index in names.items():
            cut(projection(attention, name), index, "outputs", select)
    elif spec.fused_order == "blocks":
        blocks = [query_rows, queries * size + key_rows, (queries + keys) * size + key_rows]
        cut(projection(attention, spec.fused), torch.cat(blocks), "outputs", select)
    else:
        cut(projection(attention, spec.fused), rows((group + 2) * size), "outputs", select)
    cut(projection(layer, spec.output), query_rows, "inputs", select)

    for names_, count in ((spec.heads, kept * group), (spec.kv_heads, kept), (spec.width, kept * group * size)):
        for name in names_:
            if hasattr(attention, name):
                setattr(attention, name, count)
    if spec.config_heads:
        config = attention.config
        whole = config._config if isinstance(config, ConfigView) else config
        attention.config = ConfigView(  # type: ignore[assignment]
            whole, {"num_attention_heads": kept * group, "num_key_value_heads": kept}
        )
    run_empty(attention)


def cut_neurons(layer: nn.Module, spec: FeedForwardSpec, keep: torch.Tensor, select: Select = copied) -> None:
    """Keep some neurons of a feed-forward block, in place.

    Args:
        layer (`nn.Module`): The layer.
        spec ([`FeedForwardSpec`]): The block, by the table of families.
        keep (`torch.Tensor`): bool of shape (neurons,), or the indices of those that stay, in their new order.
        select (`Callable`, *optional*): See [`cut`].
    """
    index = _indices(keep)
    total, _ = features(projection(layer, spec.output))
    rows = torch.cat([index, total + index]) if spec.fused_gate else index
    for name in present_inputs(layer, spec):
        cut(projection(layer, name), rows, "outputs", select)
    cut(projection(layer, spec.output), index, "inputs", select)
    for path in spec.width:
        owner, _, name = path.rpartition(".")
        setattr(layer.get_submodule(owner), name, len(index))


def _indices(keep: torch.Tensor) -> torch.Tensor:
    return keep.nonzero().flatten() if keep.dtype == torch.bool else keep


def present_inputs(layer: nn.Module, spec: FeedForwardSpec) -> list[str]:
    """The input projections of a feed-forward block that this variant of the family has."""
    return [
        name for name in spec.inputs if hasattr(layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
    ]


def reorder(layer: nn.Module, group: UnitGroup, order: torch.Tensor) -> None:
    """Permute the units of a group of heads or neurons, in place: the layer computes the same function.

    Args:
        layer (`nn.Module`): The layer.
        group ([`UnitGroup`]): The group.
        order (`torch.Tensor`): Indices of all units in their new order.
    """

    def permuted(parameter: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return parameter.copy_(parameter.index_select(dim, index.to(parameter.device)))

    if isinstance(group.block, AttentionSpec):
        cut_heads(layer, group.block, order, permuted)
    elif isinstance(group.block, FeedForwardSpec):
        cut_neurons(layer, group.block, order, permuted)


def cut_layer(layer: nn.Module, groups: list[UnitGroup], mask: PruningMask, select: Select = copied) -> None:
    """Cut the pruned units of one layer, in place.

    Args:
        layer (`nn.Module`): The layer.
        groups (`list[UnitGroup]`): Its groups of heads and neurons.
        mask ([`PruningMask`]): What stays. Whether the layer itself is dropped does not matter here.
        select (`Callable`, *optional*): See [`cut`].
    """
    for group in groups:
        keep = mask[group.name]
        if keep.all():
            continue
        if isinstance(group.block, AttentionSpec):
            cut_heads(layer, group.block, keep, select)
        elif isinstance(group.block, FeedForwardSpec):
            cut_neurons(layer, group.block, keep, select)


def check_shrinkable(units: PrunableUnits, mask: PruningMask) -> None:
    """Raise unless a mask can be cut out of a model with these units.

    Args:
        units ([`PrunableUnits`]): The units.
        mask ([`PruningMask`]): What is to stay.

    Raises:
        MaskError: It is for another model, or prunes what this family can't lose.
    """
    mask.check(units)
    for group in units.values():
        keep = mask[group.name]
        if keep.all():
            continue
        stack = units.stacks[group.stack]
        if not group.prunable:
            raise MaskError(
                f"The heads of {group.name} can't be pruned: in {units.model_type} {units.architecture.note}."
            )
        if group.kind == "layers":
            fixed = [index for index in stack.fixed_layers if index < len(keep) and not keep[index]]
            if fixed:
                raise MaskError(
                    f"Layer {fixed[0]} of {group.name} can't be dropped: the others of a {units.model_type} need it."
                )
            if not keep.any():
                raise MaskError(f"The mask drops all layers of {group.name}: keep at least one.")


def shrink(model: PreTrainedModel, mask: PruningMask | None = None) -> PreTrainedModel:
    """Make a masked model physically smaller, in place. It computes the same function.

    The config is updated: to a plain stock config where one can hold the shapes, else with a layout under `hf_prune`.

    Args:
        model (`PreTrainedModel`): The model. It may have been shrunk before.
        mask ([`PruningMask`], *optional*): What stays. Defaults to the mask that [`prune`] put on the model.

    Returns:
        `PreTrainedModel`: The same object.

    Raises:
        MaskError: There is no mask, it is for another model, or it prunes what this family can't lose.
        LayoutError: The result could not be described in a config.
        UnsupportedModelError: The model can't be pruned.

    The model is unchanged after an error.
    """
    refuse_offloaded(model)
    units = prunable_units(model)
    mask = mask if mask is not None else current_mask(model)
    if mask is None:
        raise MaskError(
            "There is nothing to shrink: prune the model first, or pass shrink(model, mask). A model whose single "
            "weights were zeroed keeps its shapes: save it as it is."
        )
    check_shrinkable(units, mask)
    # The whole operation once on the meta device: if it fails there, no weight has been touched.
    rehearsal = skeleton(model, model.config)
    cut_model(rehearsal, units, mask)
    config = record(rehearsal, _candidates(rehearsal, units))

    remove_mask(model)
    cut_model(model, units, mask)
    _update_configs(model, skeleton(model, config))
    return model


def shrunk_copy(model: PreTrainedModel, mask: PruningMask) -> PreTrainedModel:
    """What a mask leaves of a model, as a model of its own. A mask that the model carries does not count.

    Args:
        model (`PreTrainedModel`): The model. It is not changed.
        mask ([`PruningMask`]): What stays.

    Returns:
        `PreTrainedModel`: A shrunk copy.

    Raises:
        As [`shrink`].
    """
    # Mixed precision puts a forward of its own on the instance, and a copy of it would call the original model.
    forward = model.__dict__.pop("forward", None)
    try:
        small = copy.deepcopy(model)
    finally:
        if forward is not None:
            model.forward = forward
    return shrink(small, mask)


def cut_model(model: PreTrainedModel, units: PrunableUnits, mask: PruningMask, select: Select = copied) -> None:
    """Cut the pruned units and layers of a model, in place. Its config only gets the number of layers.

    Args:
        model (`PreTrainedModel`): The model.
        units ([`PrunableUnits`]): Its units.
        mask ([`PruningMask`]): What stays, see [`check_shrinkable`].
        select (`Callable`, *optional*): See [`cut`].
    """
    base = base_model(model)
    for stack in units.stacks.values():
        layers = base.get_submodule(stack.layers)
        assert isinstance(layers, nn.ModuleList)
        kept = mask[stack.layers].nonzero().flatten().tolist()
        for index in kept:
            cut_layer(layers[index], units.of_layer(stack.layers, index), mask, select)
        if len(kept) < len(layers):
            _drop_layers(base, stack, kept)


def _drop_layers(base: nn.Module, stack: StackSpec, kept: list[int]) -> None:
    owner, _, name = stack.layers.rpartition(".")
    layers = base.get_submodule(stack.layers)
    assert isinstance(layers, nn.ModuleList)
    parent = base.get_submodule(owner)
    setattr(parent, name, nn.ModuleList(layers[index] for index in kept))
    if hasattr(parent, stack.config_depth):  # DistilBERT's stack counts its layers
        setattr(parent, stack.config_depth, len(kept))
    for new, old in enumerate(kept):
        for module in layers[old].modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = new  # type: ignore[assignment]  # it addresses the KV cache
    config = base.config
    assert isinstance(config, PreTrainedConfig)
    for attribute in stack.per_layer:
        values = getattr(config, attribute, None)
        if values is not None:
            setattr(config, attribute, [values[index] for index in kept])
    setattr(config, stack.config_depth, len(kept))


def _candidates(model: PreTrainedModel, units: PrunableUnits) -> list[PreTrainedConfig]:
    """Configs that may describe a shrunk model: one with the widths of the first layers, one with the dense widths."""
    dense = copy.deepcopy(model.config)
    dense.__dict__.pop(KEY, None)
    stock = copy.deepcopy(dense)
    base = base_model(model)
    try:
        for stack in units.stacks.values():
            layer = base.get_submodule(f"{stack.layers}.0")
            if stack.config_neurons:
                setattr(stock, stack.config_neurons, features(projection(layer, stack.feed_forward.output))[0])
            if stack.config_heads and stack.attention:
                queries, keys, size = head_counts(layer, stack.attention[0])
                setattr(stock, stack.config_heads, queries)
                if stack.config_kv_heads:
                    setattr(stock, stack.config_kv_heads, keys)
                setattr(stock, stack.config_head_dim, size)
    except (ValueError, StrictDataclassError):  # a config that checks its numbers refuses these
        return [dense]
    return [stock, dense]


def _update_configs(model: PreTrainedModel, built: PreTrainedModel) -> None:
    """Give a model, and the models nested in it, the numbers of the configs from which `built` was made."""
    theirs = _nested_models(built)
    for name, module in _nested_models(model).items():
        mine, new = module.config, theirs[name].config
        if mine is new:
            continue
        if KEY in vars(mine) and KEY not in vars(new):
            delattr(mine, KEY)
        for key, value in vars(new).items():
            if not key.startswith("_") and vars(mine).get(key) != value:
                setattr(mine, key, copy.deepcopy(value))


def _nested_models(root: PreTrainedModel) -> dict[str, PreTrainedModel]:
    return {name: module for name, module in root.named_modules() if isinstance(module, PreTrainedModel)}
