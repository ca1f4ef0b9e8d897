"""Costs of masks against counted forward passes and against the figures of the papers."""

import pytest
import torch
import transformers
from tiny import FAMILIES, tiny_batch, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import hf_prune


def counted_macs(model, batch, stacks):
    """MACs of the matrix products inside the layers, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    ends = tuple(f".{stack}.{index}" for stack in stacks for index in range(9))
    return sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith(ends)) / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_macs_and_parameters_of_a_mask_are_those_of_the_shrunk_model(name, random_mask):
    model, batch = tiny_model(name), tiny_batch(name, size=1)
    if model._supports_sdpa:  # fused attention hides its products from the counter
        model.set_attn_implementation("eager")
    units = hf_prune.prunable_units(model)
    target = batch["decoder_input_ids"].shape[1] if "decoder_input_ids" in batch else None
    table = hf_prune.CostTable(model, units, sequence_length=9, target_length=target)
    assert table.of().macs == counted_macs(model, batch, units.stacks)
    assert table.of().params == sum(p.numel() for p in model.parameters())

    for seed, drop in ((0, False), (1, True)):
        small, mask = tiny_model(name), random_mask(units, seed, drop)
        if small._supports_sdpa:
            small.set_attn_implementation("eager")
        costs = table.of(mask)
        hf_prune.shrink(small, mask)
        assert costs.macs == counted_macs(small, batch, units.stacks)
        assert costs.params == sum(p.numel() for p in small.parameters())
        assert costs.memory == sum(p.numel() * p.element_size() for p in small.parameters())


def on_meta(**config):
    with torch.device("meta"):
        return transformers.BertModel(transformers.BertConfig(**config))


@pytest.mark.parametrize(
    "length, head, neuron, total",
    [
        (25.16, 5.0277e6, 38_646, 2.1486e9),
        (128, 27_262_976, 196_608, 11_173_625_856),
        (170, 37.1226e6, 261_120, 14.9716e9),
    ],
)
def test_bert_base_costs_what_the_papers_count(length, head, neuron, total, monkeypatch):
    # The costs of shapes do not need weights; only for pruning are models without weights refused.
    monkeypatch.setattr("hf_prune.units.refuse_unprunable", lambda model: None)
    model = on_meta()
    table = hf_prune.CostTable(model, hf_prune.prunable_units(model), sequence_length=length)
    assert table.unit["encoder.layer.0.attention.output.dense"].macs == pytest.approx(head, rel=1e-4)
    assert table.unit["encoder.layer.0.output.dense"].macs == pytest.approx(neuron, rel=1e-4)
    assert table.of().macs == pytest.approx(total, rel=1e-4)


def test_minilm_counts(monkeypatch):
    monkeypatch.setattr("hf_prune.units.refuse_unprunable", lambda model: None)
    model = on_meta(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    table = hf_prune.CostTable(model, hf_prune.prunable_units(model), sequence_length=25.16)
    assert table.unit["encoder.layer.0.attention.output.dense"].macs == pytest.approx(1_277_178, abs=1)
    assert table.unit["encoder.layer.0.output.dense"].macs == pytest.approx(19_322.9, abs=0.1)


def test_tied_weights_count_once_and_mixed_dtypes_in_bytes():
    model = tiny_model("llama", tie_word_embeddings=True)
    model.model.embed_tokens.to(torch.bfloat16)
    costs = hf_prune.model_costs(model)
    assert costs.params == sum(p.numel() for p in set(model.parameters()))
    assert costs.memory == sum(p.numel() * p.element_size() for p in set(model.parameters()))


def test_model_costs_follow_the_mask_that_a_model_carries(random_mask):
    model = tiny_model("bert")
    mask = random_mask(hf_prune.prunable_units(model))
    expected = hf_prune.model_costs(model, mask)
    assert expected.macs < hf_prune.model_costs(model).macs
    hf_prune.apply_mask(model, mask)
    assert hf_prune.model_costs(model) == expected


@pytest.mark.parametrize("length", [0, -1, float("nan"), float("inf")])
def test_a_length_must_be_positive(length):
    with pytest.raises(hf_prune.ConfigError, match="sequence_length must be a positive number"):
        hf_prune.model_costs(tiny_model("bert"), sequence_length=length)
