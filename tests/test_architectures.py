"""The table of families, entries of users, and the models that are refused."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from tiny import tiny_batch, tiny_model
from torch import nn

import hf_prune
from hf_prune import Architecture, MagnitudeConfig, UnsupportedModelError, register_architecture
from hf_prune.architectures import registry

BERT = registry._ARCHITECTURES["bert"]


@pytest.fixture
def family(monkeypatch):
    """A family that the table does not know, built like BERT; returns a model of it."""
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    model = tiny_model("bert")
    model.config.model_type = "newbert"
    return model


def test_an_unknown_family_says_how_to_add_it(family):
    for call in (hf_prune.prunable_units, lambda m: hf_prune.prune(m, MagnitudeConfig(budget={"macs": 0.5}))):
        with pytest.raises(UnsupportedModelError, match="Unknown model_type 'newbert'.*bert.*register_architecture"):
            call(family)


def test_a_registered_family_is_pruned(family, monkeypatch):
    monkeypatch.setattr(transformers.BertConfig, "model_type", "newbert")
    register_architecture("newbert", BERT)
    hf_prune.prune(family, MagnitudeConfig(budget={"macs": 0.6}))
    hf_prune.shrink(family)
    with pytest.raises(hf_prune.ConfigError, match="registered already"):
        register_architecture("newbert", BERT)
    register_architecture("newbert", BERT, exist_ok=True)
    with pytest.raises(hf_prune.ConfigError, match="takes an Architecture, got dict"):
        register_architecture("other", {})


def entry(**changes):
    """The entry of BERT with one mistake."""
    (stack,) = BERT.stacks
    attention = {k.removeprefix("attention_"): v for k, v in changes.items() if k.startswith("attention_")}
    feed_forward = {k.removeprefix("ffn_"): v for k, v in changes.items() if k.startswith("ffn_")}
    others = {k: v for k, v in changes.items() if not k.startswith(("attention_", "ffn_"))}
    stack = replace(
        stack,
        attention=(replace(stack.attention[0], **attention),),
        feed_forward=replace(stack.feed_forward, **feed_forward),
        **others,
    )
    return Architecture((stack,))


WRONG = {
    "no such projection": entry(attention_query="queery"),
    "no such stack": entry(layers="encoder.layers"),
    "no such head size": entry(attention_head_dim="head_dim"),
    "not the projection behind the heads": entry(attention_output="intermediate.dense"),
    "not the projection behind the neurons": entry(ffn_output="attention.output.dense"),
    "the neurons are written elsewhere": entry(ffn_inputs=("attention.self.query",)),
    "the neurons are written nowhere": entry(ffn_inputs=()),
    "query and value are one": entry(attention_value="query"),
    "blocks are interleaved": entry(attention_fused="query", attention_fused_order="interleaved"),
    "a gate that is none": entry(ffn_fused_gate=True),
    "no such depth": entry(config_depth="num_layer"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_verification_finds_a_wrong_entry(mistake, monkeypatch):
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    register_architecture("bert", WRONG[mistake], exist_ok=True)
    with pytest.raises((UnsupportedModelError, hf_prune.SaveError)):
        hf_prune.verify_architecture(tiny_model("bert"))


def test_verification_finds_a_counter_that_is_not_updated(monkeypatch):
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    (stack,) = registry._ARCHITECTURES["gpt2"].stacks
    stack = replace(stack, attention=(replace(stack.attention[0], width=()),))
    register_architecture("gpt2", Architecture((stack,)), exist_ok=True)
    with pytest.raises(UnsupportedModelError, match="heads can't be cut as the entry says"):
        hf_prune.verify_architecture(tiny_model("gpt2"))


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def with_adapters(model):
    model.add_adapter(__import__("peft").LoraConfig(target_modules=["query"]))
    return model


def peft_model(model):
    peft = __import__("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))


def offloaded(model):
    accelerate = __import__("accelerate")
    return accelerate.cpu_offload(model, execution_device="cpu")


def quantised(model):
    model.hf_quantizer = object()
    layer = model.bert.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return model


def adapter_on_a_projection(model):
    layer = model.bert.encoder.layer[1].output
    layer.dense = nn.Sequential(layer.dense)
    return model


def cross_attention(model):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, is_decoder=True, add_cross_attention=True
    )
    return transformers.BertModel(config)


def shared(model):
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    return model


def inverse_layer_scaling(model):
    return tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)


def broken(model):
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    return model


REFUSED = {
    peft_model: "merge_and_unload",
    with_adapters: "carries PEFT adapters",
    offloaded: "is offloaded",
    quantised: "is quantised",
    adapter_on_a_projection: "is a Sequential, no plain Linear",
    cross_attention: "cross-attention",
    shared: "share one weight",
    inverse_layer_scaling: "depend on its position",
    broken: "weights of encoder.layer.1.output.dense.weight are NaN",
    Wrapped: "pass model.module",
    torch.compile: "pass model._orig_mod",
    lambda model: model.to("meta"): "is on the meta device",
    lambda model: model.bert.encoder: "prunes transformers.PreTrainedModel, got BertEncoder",
    lambda model: "bert-base-cased": "prunes transformers.PreTrainedModel, got str",
}


@pytest.mark.parametrize("wrap", REFUSED, ids=lambda wrap: getattr(wrap, "__name__", "?"))
def test_models_that_can_not_be_pruned_say_why(wrap):
    model = wrap(tiny_model("bert"))
    with pytest.raises(UnsupportedModelError, match=REFUSED[wrap]):
        hf_prune.prune(model, MagnitudeConfig(budget={"macs": 0.6}))


def test_unit_groups_are_named_by_their_site():
    units = hf_prune.prunable_units(tiny_model("llama"))
    group = units["layers.1.self_attn.o_proj"]
    assert (group.kind, group.size, group.width, group.layer) == ("heads", 2, 16, 1)  # KV groups of two query heads
    assert units["layers.2.mlp.down_proj"].size == 64 and units["layers"].size == 3
    assert repr(units) == "PrunableUnits(llama: 6 heads, 192 neurons, 3 layers)"


def test_names_do_not_depend_on_the_head():
    heads = [transformers.AutoModel, transformers.AutoModelForTokenClassification, transformers.AutoModelForMaskedLM]
    assert len({tuple(hf_prune.prunable_units(tiny_model("bert", head))) for head in heads}) == 1


def test_one_sided_classes_of_an_encoder_decoder():
    config = tiny_model("t5").config
    encoder = transformers.T5EncoderModel(copy.deepcopy(config)).eval()
    assert list(hf_prune.prunable_units(encoder).stacks) == ["encoder.block"]
    decoder = transformers.BartForCausalLM(tiny_model("bart").config).eval()
    units = hf_prune.prunable_units(decoder)
    assert list(units.stacks) == ["decoder.layers"]
    for model in (encoder, decoder):
        hf_prune.prune(model, MagnitudeConfig(budget={"params": 0.9}))
        batch = tiny_batch("bert")
        with torch.no_grad():
            masked = model(**batch)[0]
            assert torch.allclose(hf_prune.shrink(model)(**batch)[0], masked, atol=1e-5)


@pytest.mark.parametrize(
    "config, message",
    [
        ("kcm", "config must be the config of a method"),
        (hf_prune.PruningConfig, "config must be the config of a method"),
        (None, "config must be the config of a method"),
    ],
)
def test_a_config_is_a_config_of_a_method(config, message):
    with pytest.raises(hf_prune.ConfigError, match=message):
        hf_prune.prune(tiny_model("bert"), config)


def test_a_masked_model_is_not_pruned_again():
    model = tiny_model("bert")
    hf_prune.prune(model, MagnitudeConfig(budget={"macs": 0.6}))
    with pytest.raises(hf_prune.ConfigError, match="carries a mask already"):
        hf_prune.prune(model, MagnitudeConfig(budget={"macs": 0.6}))
