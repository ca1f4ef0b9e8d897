"""What a model family looks like to a pruner: where its heads and neurons are written, and where they are read.

All module names are relative to one transformer layer, unless said otherwise. `neurons` are the units of a
feed-forward block, `heads` those of an attention block (a KV group under grouped-query attention).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class AttentionSpec:
    """One attention block of a layer.

    Args:
        module (`str`): The attention module, which holds the counters below.
        output (`str`): The output projection. Its input is the site at which heads are masked, observed and cut.
        query, key, value (`str`): The input projections, relative to `module`. Unused when `fused` is given.
        fused (`str`): The one projection that computes query, key and value, relative to `module`.
        fused_order (`"blocks"` or `"interleaved"`): Rows of `fused`: all queries, all keys, all values; or head by
            head.
        extra (`tuple[str, ...]`): Further projections with one row block per query head, cut where they exist.
        head_dim (`str`): Attribute of `module` with the size of one head.
        heads, kv_heads, width (`tuple[str, ...]`): Attributes of `module` with the number of query heads, of KV heads,
            and with heads x head size. Those that a version of the family lacks are skipped.
        config_heads (`bool`): The forward pass reads the head counts from `module.config`.
        residual (`str`, *optional*): Module whose input is the residual stream to which the block's output is added.
            `""` is the layer itself, `None` means that the output is normalised before it is added.
        cross (`bool`): Keys and values come from the encoder.
        prunable (`bool`): Heads can be cut without a change of the function computed by those that stay.
        relative_rows (`Callable`, *optional*): Given the module, how many rows of relative positions are projected,
            and how many meet every token, for each head (DeBERTa's disentangled attention).
    """

    module: str
    output: str
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    fused: str = ""
    fused_order: Literal["blocks", "interleaved"] = "blocks"
    extra: tuple[str, ...] = ()
    head_dim: str = "head_dim"
    heads: tuple[str, ...] = ()
    kv_heads: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    config_heads: bool = False
    residual: str | None = ""
    cross: bool = False
    prunable: bool = True
    relative_rows: Callable[[Any], tuple[int, int]] | None = None


@dataclass(frozen=True)
class FeedForwardSpec:
    """The feed-forward block of a layer.

    Args:
        inputs (`tuple[str, ...]`): The projections that compute the neurons: one, or gate and up. Names that a variant
            of the family lacks are skipped.
        output (`str`): The down projection. Its input is the site at which neurons are masked, observed and cut.
        fused_gate (`bool`): The one input projection computes gate and up, one after the other.
        width (`tuple[str, ...]`): Attributes, relative to the layer, that hold the number of neurons.
        residual (`str` or `Callable`, *optional*): As in [`AttentionSpec`]; a function of the layer where that depends
            on it.
        parallel (`Callable`): Given the layer, the module whose output is added together with that of the block, if
            one is: the output projection of an attention block that reads the same residual stream.
    """

    inputs: tuple[str, ...]
    output: str
    fused_gate: bool = False
    width: tuple[str, ...] = ()
    residual: str | Callable[[Any], str] | None = ""
    parallel: Callable[[Any], str | None] = lambda layer: None


@dataclass(frozen=True)
class StackSpec:
    """A stack of equal layers.

    Args:
        layers (`str`): The `ModuleList`, relative to the base model.
        attention (`tuple[AttentionSpec, ...]`): The attention blocks whose heads can be pruned, in the order of the
            forward pass.
        feed_forward (`FeedForwardSpec`): The feed-forward block.
        config_neurons, config_heads, config_kv_heads, config_head_dim, config_depth (`str`): Attributes of the config
            that hold the number of neurons, heads and KV heads, the size of a head, and the number of layers. `""`
            where the stock model class can't hold a pruned number.
        per_layer (`tuple[str, ...]`): Attributes of the config with one entry a layer.
        fixed_layers (`tuple[int, ...]`): Layers that do more than the others and can't be dropped.
        decoder (`bool`): The second stack of an encoder-decoder.
        fixed_length (`Callable`, *optional*): Given the config, the number of tokens of every input of this stack.
    """

    layers: str
    attention: tuple[AttentionSpec, ...]
    feed_forward: FeedForwardSpec
    config_neurons: str = "intermediate_size"
    config_heads: str = ""
    config_kv_heads: str = ""
    config_head_dim: str = ""
    config_depth: str = "num_hidden_layers"
    per_layer: tuple[str, ...] = ()
    fixed_layers: tuple[int, ...] = ()
    decoder: bool = False
    fixed_length: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class Architecture:
    """The stacks of a model family, in the order of the forward pass, and what it can't do.

    Args:
        stacks (`tuple[StackSpec, ...]`): One for encoders and decoders, two for encoder-decoders.
        refuse (`Callable`, *optional*): Given a config, the reason why such a model can't be pruned, or `None`.
        note (`str`): What a user should know about this family.
    """

    stacks: tuple[StackSpec, ...]
    refuse: Callable[[Any], str | None] | None = None
    note: str = ""
