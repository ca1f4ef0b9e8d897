"""Layers that lost all heads, all neurons, or both."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from pruned import logits
from tiny import DECODERS, FAMILIES, tiny_batch, tiny_model
from torch.testing import assert_close

import hf_prune
from hf_prune import PruningMask
from hf_prune.emptied import Emptied

OWN = [name for name in FAMILIES if not name.startswith("t5")]  # with a forward pass of ours
EMPTY = (0, 1)


def emptied(name, kinds=("heads", "neurons"), **overrides):
    """A model whose first two layers are left with nothing in each block, masked and shrunk."""
    model = tiny_model(name, **overrides)
    units = hf_prune.prunable_units(model)
    groups = [g for g in units.of_kind(*kinds) if g.layer in EMPTY and g.prunable]
    mask = PruningMask({g.name: torch.zeros(g.size, dtype=torch.bool) for g in groups}, units)
    masked = copy.deepcopy(model)
    hf_prune.apply_mask(masked, mask)
    return masked, hf_prune.shrink(model, mask)


@pytest.mark.parametrize("kinds", [("heads",), ("neurons",), ("heads", "neurons")])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_computes_what_the_masked_model_does(name, kinds):
    masked, small = emptied(name, kinds)
    batch = tiny_batch(name, padded=True)
    assert_close(logits(small, batch), logits(masked, batch), atol=1e-5, rtol=1e-5)
    units = hf_prune.prunable_units(small)
    assert all(g.size == 0 for g in units.of_kind(*kinds) if g.layer in EMPTY and g.prunable)


@pytest.mark.parametrize("name", OWN)
def test_half_precision(name):
    masked, small = emptied(name)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny_batch(name, padded=True).items()}
    expected, found = (logits(model.bfloat16(), batch) for model in (masked, small))
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (logits(model.float(), tiny_batch(name)) for model in (small, masked))
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", OWN)
def test_copies_and_checkpoints(name, tmp_path):
    masked, small = emptied(name)
    batch = tiny_batch(name)
    expected = logits(masked, batch)
    assert any(isinstance(module, Emptied) for module in small.modules())
    hf_prune.save_pretrained(small, tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), loaded):
        assert_close(logits(other, batch), expected, atol=1e-5, rtol=1e-5)
        assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in small.modules()]
    assert_close(logits(hf_prune.subnetwork(*dense_and_mask(masked)), batch), expected, atol=1e-5, rtol=1e-5)


def test_code_that_travels_with_a_checkpoint(tmp_path):
    code = """
import sys, torch, transformers
sys.modules["hf_prune"] = None
for name, auto in (("gpt2", "AutoModelForCausalLM"), ("whisper", "AutoModelForSpeechSeq2Seq")):
    model = getattr(transformers, auto).from_pretrained(name, trust_remote_code=True)
    batch, expected = torch.load(name + ".pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)
"""
    for name in ("gpt2", "whisper"):
        _, small = emptied(name)
        hf_prune.save_pretrained(small, tmp_path / name, standalone=True)
        torch.save((tiny_batch(name), logits(small, tiny_batch(name))), tmp_path / f"{name}.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def dense_and_mask(masked):
    mask = hf_prune.current_mask(masked)
    hf_prune.remove_mask(masked)
    return masked, mask


@pytest.mark.parametrize("name", OWN)
def test_each_parameter_takes_part_in_training(name):
    masked, small = emptied(name)
    batch = tiny_batch(name, labels=True)
    small.train()
    small(**batch).loss.backward()
    trained = {key for key, p in tiny_with_gradients(name, batch) if p.grad is not None}
    assert {key for key, p in small.named_parameters() if p.grad is not None} == trained


def tiny_with_gradients(name, batch):
    model = tiny_model(name).train()
    model(**batch).loss.backward()
    return model.named_parameters()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", [name for name in OWN if name in DECODERS or name == "whisper"])
def test_generation_with_a_cache(name, cache):
    masked, small = emptied(name)
    inputs = {k: v for k, v in tiny_batch(name, size=2).items() if k != "decoder_input_ids"}
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = masked.generate(**inputs, use_cache=False, **options)
    assert torch.equal(small.generate(**inputs, cache_implementation=cache, **options), expected)


@pytest.mark.parametrize("name", OWN)
def test_attention_weights_have_no_heads(name):
    _, small = emptied(name, ("heads",))
    if "deberta" not in name:
        small.set_attn_implementation("eager")
    found = small(**tiny_batch(name), output_attentions=True)
    for key in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        weights = found.get(key) or ()
        for index, layer in enumerate(weights):
            assert layer.shape == (3, 0 if index in EMPTY else 4, *weights[-1].shape[2:])
    assert any(found.get(key) for key in ("attentions", "encoder_attentions"))
