"""Tiny random models of every family, and inputs for them."""

import copy
from typing import Any

import torch
import transformers as T

HIDDEN, VOCAB = 32, 99
_ENCODER = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    pad_token_id=0,
)
_DECODER = dict(**_ENCODER, num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2)
_SEQ2SEQ = dict(
    vocab_size=VOCAB,
    d_model=HIDDEN,
    encoder_layers=3,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=2,
    forced_eos_token_id=None,
)
_T5 = dict(
    vocab_size=VOCAB,
    d_model=HIDDEN,
    d_kv=8,
    d_ff=64,
    num_layers=3,
    num_decoder_layers=3,
    num_heads=4,
    pad_token_id=0,
    decoder_start_token_id=0,
)
_DEBERTA = dict(relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm")
_CLASSIFIER, _CAUSAL = T.AutoModelForSequenceClassification, T.AutoModelForCausalLM

# name -> (config, auto class); the name is the model_type, with a variant behind "/"
FAMILIES: dict[str, tuple[T.PreTrainedConfig, Any]] = {
    "bert": (T.BertConfig(**_ENCODER), _CLASSIFIER),
    "roberta": (T.RobertaConfig(**{**_ENCODER, "pad_token_id": 1}), _CLASSIFIER),
    "electra": (T.ElectraConfig(**_ENCODER, embedding_size=16), _CLASSIFIER),
    "distilbert": (
        T.DistilBertConfig(
            vocab_size=VOCAB, dim=HIDDEN, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=64
        ),
        _CLASSIFIER,
    ),
    "deberta-v2": (T.DebertaV2Config(**_ENCODER, **_DEBERTA, share_att_key=True), _CLASSIFIER),
    "deberta-v2/own": (
        T.DebertaV2Config(**_ENCODER, **_DEBERTA, share_att_key=False, conv_kernel_size=3),
        _CLASSIFIER,
    ),
    "modernbert": (
        T.ModernBertConfig(
            **_ENCODER, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=8
        ),
        _CLASSIFIER,
    ),
    "vit": (
        T.ViTConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        ),
        T.AutoModelForImageClassification,
    ),
    "gpt2": (
        T.GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=3,
            n_head=4,
            n_inner=64,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        _CAUSAL,
    ),
    "opt": (
        T.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=64,
            word_embed_proj_dim=HIDDEN,
            pad_token_id=0,
        ),
        _CAUSAL,
    ),
    "opt/post": (
        T.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
            pad_token_id=0,
        ),
        _CAUSAL,
    ),
    "gpt_neox": (T.GPTNeoXConfig(**_ENCODER), _CAUSAL),
    "gpt_neox/serial": (T.GPTNeoXConfig(**_ENCODER, use_parallel_residual=False), _CAUSAL),
    "llama": (T.LlamaConfig(**_DECODER), _CAUSAL),
    "mistral": (T.MistralConfig(**_DECODER, sliding_window=4), _CAUSAL),
    "qwen2": (T.Qwen2Config(**_DECODER), _CAUSAL),
    "qwen3": (T.Qwen3Config(**_DECODER), _CAUSAL),
    "gemma2": (T.Gemma2Config(**_DECODER, sliding_window=4), _CAUSAL),
    "gemma3_text": (T.Gemma3TextConfig(**_DECODER, sliding_window=4), _CAUSAL),
    "phi3": (T.Phi3Config(**_DECODER), _CAUSAL),
    "t5": (T.T5Config(**_T5), T.AutoModelForSeq2SeqLM),
    "t5/gated": (
        T.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        T.AutoModelForSeq2SeqLM,
    ),
    "bart": (T.BartConfig(**_SEQ2SEQ, bos_token_id=1, decoder_start_token_id=2), T.AutoModelForSeq2SeqLM),
    "marian": (T.MarianConfig(**_SEQ2SEQ, decoder_start_token_id=0), T.AutoModelForSeq2SeqLM),
    "whisper": (
        T.WhisperConfig(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        T.AutoModelForSpeechSeq2Seq,
    ),
}


def parameters_as_time(model: Any, inputs: Any, places: Any) -> tuple[float, dict[tuple[str, int], float]]:
    """In place of the clock of latency tables: a parameter takes a millisecond."""
    layers = {place: list(model.base_model.get_submodule("{}.{}".format(*place)).parameters()) for place in places}
    inside = {id(p) for parameters in layers.values() for p in parameters}  # copies of layers share some
    times = {place: float(sum(p.numel() for p in parameters)) for place, parameters in layers.items()}
    return sum(times.values()) + sum(p.numel() for p in model.parameters() if id(p) not in inside), times


def auto(name: str) -> Any:
    """The auto class of a family."""
    return FAMILIES[name][1]


DECODERS = [name for name, (_, auto) in FAMILIES.items() if auto is _CAUSAL]
SEQ2SEQ = [
    name for name, (_, auto) in FAMILIES.items() if auto in (T.AutoModelForSeq2SeqLM, T.AutoModelForSpeechSeq2Seq)
]


def tiny_model(name: str, auto: Any = None, seed: int = 1, **overrides: Any) -> Any:
    """A random model whose units all matter: weights large enough that each changes the output."""
    config, default = FAMILIES[name]
    config = copy.deepcopy(config)
    for key, value in overrides.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = (auto or default).from_config(config).eval()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "norm" not in key.lower():  # fixed sinusoidal positions stay as they are
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tiny_batch(
    name: str, size: int = 3, length: int = 9, seed: int = 0, padded: bool = False, labels: bool = False
) -> dict[str, torch.Tensor]:
    """A batch for a model of a family; with `padded`, the rows have different lengths; with `labels`, for a loss."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> torch.Tensor:
        return torch.randint(3, VOCAB, (size, n), generator=generator)

    family = name.partition("/")[0]
    if family == "vit":
        batch = {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)}
    elif family == "whisper":
        batch = {"input_features": torch.randn(size, 8, 20, generator=generator), "decoder_input_ids": ids(5)}
    else:
        batch = {"input_ids": ids(length), "attention_mask": torch.ones(size, length, dtype=torch.long)}
        if padded:
            for row in range(1, size):
                real = max(length - 2 * (row % 4), 1)
                batch["attention_mask"][row, real:] = 0
                batch["input_ids"][row, real:] = 1 if family == "roberta" else 0
        if name in SEQ2SEQ:
            batch["decoder_input_ids"] = ids(5)
    if labels and name in SEQ2SEQ:
        batch["labels"] = batch["decoder_input_ids"].roll(-1, 1)
    elif labels and name in DECODERS:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    elif labels:
        batch["labels"] = torch.arange(size) % 2
    return batch
