"""The families that hf_prune knows: one table, a few lines a family.

[`verify_architecture`] proves an entry: masked == shrunk, gates live, the saved model reloads equal.
"""

from dataclasses import replace
from typing import Any

from .registry import register_architecture
from .specs import Architecture, AttentionSpec, FeedForwardSpec, StackSpec


def _no_cross_attention(config: Any) -> str | None:
    if config.add_cross_attention:
        return "its cross-attention blocks (config.add_cross_attention=True) are not in the table"
    return None


# Encoders

_BERT_FEED_FORWARD = FeedForwardSpec(("intermediate.dense",), "output.dense", residual="intermediate.dense")

register_architecture(
    ("bert", "roberta", "electra"),
    Architecture(
        (
            StackSpec(
                "encoder.layer",
                (
                    AttentionSpec(
                        "attention.self",
                        "attention.output.dense",
                        "query",
                        "key",
                        "value",
                        head_dim="attention_head_size",
                        heads=("num_attention_heads",),
                        width=("all_head_size",),
                    ),
                ),
                _BERT_FEED_FORWARD,
            ),
        ),
        refuse=_no_cross_attention,
    ),
)

register_architecture(
    "distilbert",
    Architecture(
        (
            StackSpec(
                "transformer.layer",
                (
                    AttentionSpec(
                        "attention",
                        "attention.out_lin",
                        "q_lin",
                        "k_lin",
                        "v_lin",
                        head_dim="attention_head_size",
                        heads=("n_heads",),
                        width=("dim",),
                    ),
                ),
                FeedForwardSpec(("ffn.lin1",), "ffn.lin2", residual="ffn"),
                config_neurons="hidden_dim",
                config_depth="n_layers",
            ),
        ),
    ),
)


def _deberta_relative_rows(attention: Any) -> tuple[int, int]:
    """Rows of relative positions that are projected, and that meet every token, per head (He et al. 2021, eq. 4)."""
    if not attention.relative_attention:
        return 0, 0
    span = 2 * attention.pos_ebd_size
    terms = sum(term in attention.pos_att_type for term in ("c2p", "p2c"))
    return span * (2 if attention.share_att_key else terms), span * terms


register_architecture(
    "deberta-v2",
    Architecture(
        (
            StackSpec(
                "encoder.layer",
                (
                    AttentionSpec(
                        "attention.self",
                        "attention.output.dense",
                        "query_proj",
                        "key_proj",
                        "value_proj",
                        extra=("pos_key_proj", "pos_query_proj"),
                        head_dim="attention_head_size",
                        heads=("num_attention_heads",),
                        width=("all_head_size",),
                        relative_rows=_deberta_relative_rows,
                    ),
                ),
                _BERT_FEED_FORWARD,
                fixed_layers=(0,),  # the optional convolution follows the first layer
            ),
        ),
    ),
)

register_architecture(
    "modernbert",
    Architecture(
        (
            StackSpec(
                "layers",
                (AttentionSpec("attn", "attn.Wo", fused="Wqkv"),),
                FeedForwardSpec(("mlp.Wi",), "mlp.Wo", fused_gate=True, residual="mlp_norm"),
                per_layer=("layer_types",),
                fixed_layers=(0,),  # it alone has no norm before its attention
            ),
        ),
    ),
)


def _patches(config: Any) -> int:
    size, patch = ((x, x) if isinstance(x, int) else tuple(x) for x in (config.image_size, config.patch_size))
    return int(size[0] // patch[0]) * int(size[1] // patch[1]) + 1


register_architecture(
    "vit",
    Architecture(
        (
            StackSpec(
                "layers",
                (AttentionSpec("attention", "attention.o_proj", heads=("num_attention_heads",)),),
                FeedForwardSpec(("mlp.fc1",), "mlp.fc2", residual="layernorm_after"),
                config_heads="num_attention_heads",
                config_head_dim="head_dim",
                fixed_length=_patches,
            ),
        ),
    ),
)

# Decoders


def _refuse_gpt2(config: Any) -> str | None:
    if config.scale_attn_by_inverse_layer_idx:
        return "config.scale_attn_by_inverse_layer_idx=True makes the function of a layer depend on its position"
    return _no_cross_attention(config)


register_architecture(
    "gpt2",
    Architecture(
        (
            StackSpec(
                "h",
                (
                    AttentionSpec(
                        "attn", "attn.c_proj", fused="c_attn", heads=("num_heads",), width=("split_size", "embed_dim")
                    ),
                ),
                FeedForwardSpec(("mlp.c_fc",), "mlp.c_proj", residual="ln_2"),
                config_neurons="n_inner",
                config_depth="n_layer",
            ),
        ),
        refuse=_refuse_gpt2,
    ),
)


register_architecture(
    "opt",
    Architecture(
        (
            StackSpec(
                "decoder.layers",
                (AttentionSpec("self_attn", "self_attn.out_proj", heads=("num_heads",)),),
                # opt-350m alone normalises after each block
                FeedForwardSpec(
                    ("fc1",), "fc2", residual=lambda layer: "final_layer_norm" if layer.do_layer_norm_before else "fc1"
                ),
                config_neurons="ffn_dim",
            ),
        ),
    ),
)

register_architecture(
    "gpt_neox",
    Architecture(
        (
            StackSpec(
                "layers",
                (
                    AttentionSpec(
                        "attention",
                        "attention.dense",
                        fused="query_key_value",
                        fused_order="interleaved",
                        head_dim="head_size",
                    ),
                ),
                FeedForwardSpec(
                    ("mlp.dense_h_to_4h",),
                    "mlp.dense_4h_to_h",
                    residual="post_attention_layernorm",
                    parallel=lambda layer: "attention.dense" if layer.use_parallel_residual else None,
                ),
            ),
        ),
    ),
)

_LLAMA_ATTENTION = AttentionSpec(
    "self_attn", "self_attn.o_proj", heads=("num_heads", "num_attention_heads"), kv_heads=("num_key_value_heads",)
)
_GATED = FeedForwardSpec(
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
    width=("mlp.intermediate_size",),
    residual="post_attention_layernorm",
)


def _decoder(
    attention: AttentionSpec = _LLAMA_ATTENTION, feed_forward: FeedForwardSpec = _GATED, **others: Any
) -> Architecture:
    return Architecture(
        (
            StackSpec(
                "layers",
                (attention,),
                feed_forward,
                config_heads="num_attention_heads",
                config_kv_heads="num_key_value_heads",
                config_head_dim="head_dim",
                **others,
            ),
        )
    )


register_architecture(("llama", "mistral"), _decoder())
register_architecture(("qwen2", "qwen3"), _decoder(per_layer=("layer_types",)))
register_architecture(
    ("gemma2", "gemma3_text"),
    _decoder(
        # Both blocks end in a norm of their own before they are added to the stream.
        replace(_LLAMA_ATTENTION, residual=None),
        replace(_GATED, residual=None),
        per_layer=("layer_types",),
    ),
)
register_architecture(
    "phi3",
    _decoder(
        AttentionSpec(
            "self_attn", "self_attn.o_proj", fused="qkv_proj", kv_heads=("num_key_value_heads",), config_heads=True
        ),
        FeedForwardSpec(("mlp.gate_up_proj",), "mlp.down_proj", fused_gate=True, residual="post_attention_layernorm"),
    ),
)

# Encoder-decoders


def _t5_attention(module: str, cross: bool = False) -> AttentionSpec:
    return AttentionSpec(
        module,
        f"{module}.o",
        "q",
        "k",
        "v",
        head_dim="key_value_proj_dim",
        cross=cross,
        residual=module.rpartition(".")[0],
        # The position bias of layer 0 has one slice a head and is added in every layer.
        prunable=False,
    )


def _t5_feed_forward(index: int) -> FeedForwardSpec:
    block = f"layer.{index}.DenseReluDense"
    return FeedForwardSpec((f"{block}.wi", f"{block}.wi_0", f"{block}.wi_1"), f"{block}.wo", residual=f"layer.{index}")


register_architecture(
    "t5",
    Architecture(
        (
            StackSpec(
                "encoder.block",
                (_t5_attention("layer.0.SelfAttention"),),
                _t5_feed_forward(1),
                config_neurons="d_ff",
                config_depth="num_layers",
                fixed_layers=(0,),  # it computes the position bias of all layers
            ),
            StackSpec(
                "decoder.block",
                (_t5_attention("layer.0.SelfAttention"), _t5_attention("layer.1.EncDecAttention", cross=True)),
                _t5_feed_forward(2),
                config_neurons="d_ff",
                config_depth="num_decoder_layers",
                fixed_layers=(0,),
                decoder=True,
            ),
        ),
        note="feed-forward neurons and layers; its heads share one position bias and stay",
    ),
)


def _bart_stack(side: str, pre_norm: bool, **others: Any) -> StackSpec:
    heads = ("num_heads",)
    attention = [AttentionSpec("self_attn", "self_attn.out_proj", heads=heads)]
    if side == "decoder":
        residual = "encoder_attn_layer_norm" if pre_norm else "encoder_attn"
        attention.append(
            AttentionSpec("encoder_attn", "encoder_attn.out_proj", heads=heads, cross=True, residual=residual)
        )
    return StackSpec(
        f"{side}.layers",
        tuple(attention),
        FeedForwardSpec(("fc1",), "fc2", residual="final_layer_norm" if pre_norm else "fc1"),
        config_neurons=f"{side}_ffn_dim",
        config_depth=f"{side}_layers",
        decoder=side == "decoder",
        **others,
    )


register_architecture(("bart", "marian"), Architecture((_bart_stack("encoder", False), _bart_stack("decoder", False))))
register_architecture(
    "whisper",
    Architecture(
        (
            _bart_stack("encoder", True, fixed_length=lambda config: int(config.max_source_positions)),
            _bart_stack("decoder", True),
        )
    ),
)
