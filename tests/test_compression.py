"""Checkpoints in which a zero takes one bit: they load as others do, and never as something else."""

import json

import pytest
import torch
import transformers as T
from pruned import equal, shrunk
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_batch, tiny_model

from hf_prune import (
    ConfigError,
    LayoutError,
    SaveError,
    WandaConfig,
    WeightMagnitudeConfig,
    WeightMask,
    layout,
    prunable,
    prune,
    save_pretrained,
)
from hf_prune.compression import compressed, expanded


def saved(name, folder, sparsity=0.5, dtype=torch.float32, **options):
    """A pruned model, and what its checkpoint holds."""
    model = tiny_model(name).to(dtype)
    prune(model, WeightMagnitudeConfig(sparsity=sparsity))
    save_pretrained(model, folder, compressed=True, **options)
    return model, {key: value for path in folder.glob("model*.safetensors") for key, value in load_file(path).items()}


@pytest.mark.parametrize("name", ["bert", "deberta-v2/own", "gpt2", "gpt_neox", "phi3", "t5", "whisper", "vit"])
def test_families_reload_to_the_bit(name, tmp_path):
    model, stored = saved(name, tmp_path)
    assert any(key.endswith(".hf_prune_bits") for key in stored)
    assert equal(FAMILIES[name][1].from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype, share", [(torch.float32, 0.53125), (torch.bfloat16, 0.5625)])
def test_size(dtype, share, tmp_path):
    model = tiny_model("llama", vocab_size=8, hidden_size=128, head_dim=32, intermediate_size=512).to(dtype)
    result = prune(model, WandaConfig(sparsity=0.5), [{"input_ids": tiny_batch("llama")["input_ids"] % 8}])
    model.save_pretrained(tmp_path / "dense")
    save_pretrained(model, tmp_path / "small", compressed=True)
    stored = load_file(tmp_path / "small/model.safetensors")
    dense = sum(tensor.nbytes for tensor in (model.get_parameter(name) for name in result.mask))
    parts = sum(stored[name].nbytes + stored[f"{name}.hf_prune_bits"].nbytes for name in result.mask)
    assert parts == share * dense
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("small", "dense")]
    assert sizes[0] <= 0.7 * sizes[1]


def test_what_would_not_shrink_is_stored_as_it_is(tmp_path):
    _, stored = saved("llama", tmp_path, sparsity=0.02)
    assert not any("hf_prune" in key for key in stored)
    odd = {"bias": torch.zeros(64), "ids": torch.zeros(8, 8, dtype=torch.long), "full": torch.ones(8, 8)}
    assert compressed(odd) == odd


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7, 2, 3), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_parts_make_the_whole(shape, dtype):
    whole = {"x": torch.randn(shape).to(dtype) * (torch.rand(shape) < 0.2)}
    again = expanded(compressed(whole))
    assert again.keys() == whole.keys() and torch.equal(again["x"][...], whole["x"]) and again["x"].dtype == dtype


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"variant": "sparse"}])
@pytest.mark.parametrize("how", ["plain", "bfloat16", "cpu", "auto", "no mmap", "disk"])
def test_roads_into_memory(options, how, tmp_path):
    model, _ = saved("llama", tmp_path / "model", **options)
    index = next((tmp_path / "model").glob("*.index*.json"), None)
    assert ("max_shard_size" in options) == (index is not None)
    if index is not None:
        stored = {file.name: load_file(file) for file in index.parent.glob("*.safetensors")}
        index = json.loads(index.read_text())
        assert index["weight_map"] == {key: file for file, tensors in stored.items() for key in tensors}
        assert index["metadata"]["total_size"] == sum(t.nbytes for f in stored.values() for t in f.values())
    extra = {
        "plain": {},
        "bfloat16": {"dtype": torch.bfloat16},
        "cpu": {"device_map": "cpu"},
        "auto": {"device_map": "auto"},
        "no mmap": {"disable_mmap": True},
        "disk": {
            "device_map": {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
            | dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
            "offload_folder": str(tmp_path / "offload"),
        },
    }[how]
    variant = {key: value for key, value in options.items() if key == "variant"}
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **extra, **variant)
    if how == "disk":
        with torch.no_grad():
            assert torch.allclose(*(m(**tiny_batch("llama")).logits for m in (again, model)), atol=1e-5)
    else:
        assert equal(again, model.to(again.dtype)) and again.dtype == extra.get("dtype", torch.float32)


def test_disk_offloading_needs_a_folder(tmp_path):
    saved("llama", tmp_path)
    with pytest.raises(ValueError, match="offload_folder"):
        T.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "disk"})


def test_tied_weights_with_zeros(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, ::2] = 0
        model.model.layers[1].mlp.up_proj.weight[:] = 0  # no value is left
    save_pretrained(model, tmp_path, compressed=True)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight.hf_prune_bits" in stored and "lm_head.weight" not in stored
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert equal(again, model) and again.lm_head.weight is again.model.embed_tokens.weight


def test_shrunk_and_compressed(tmp_path):
    model = shrunk("llama")
    result = prune(model, WeightMagnitudeConfig(sparsity=0.6))
    save_pretrained(model, tmp_path, compressed=True, mask=result.mask, report=result.report)
    again = prunable(T.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert equal(again, model)
    WeightMask.load(tmp_path).check(again)
    again.save_pretrained(tmp_path)  # and back to plain files
    assert load_file(tmp_path / "model.safetensors").keys() == again.state_dict().keys()


def test_without_hf_prune_it_does_not_load(tmp_path):
    saved("llama", tmp_path)
    layout.disable()
    try:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            T.AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        layout.enable()


def test_standalone_code_does_not_read_it(tmp_path):
    with pytest.raises(ConfigError, match="choose one"):
        save_pretrained(tiny_model("llama"), tmp_path / "out", compressed=True, standalone=True)
    assert not (tmp_path / "out").exists()


def test_it_is_verified(tmp_path, monkeypatch):
    from hf_prune.hub import saving

    def wrong(tensors):
        parts = compressed(tensors)
        name = next(key for key in parts if key.endswith("_bits"))
        return parts | {name: parts[name].flip(0)}

    monkeypatch.setattr(saving.compression, "compressed", wrong)
    with pytest.raises(SaveError):
        saved("llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda parts: parts.pop(f"{NAME}.hf_prune_shape"), "without"),
        (lambda parts: parts.pop(NAME), "without"),
        (lambda parts: parts.update({NAME: parts[NAME][:-1].clone()}), "the values of its bits"),
        (lambda parts: parts.update({NAME: parts[NAME][:, None].clone()}), "the values of its bits"),
        (lambda parts: parts[f"{NAME}.hf_prune_bits"].fill_(255), "the values of its bits"),
        (lambda parts: parts.update({f"{NAME}.hf_prune_bits": torch.zeros(3).byte()}), "bits of its shape"),
        (lambda parts: parts.update({f"{NAME}.hf_prune_bits": torch.zeros(256)}), "bits of its shape"),
        (lambda parts: parts[f"{NAME}.hf_prune_shape"].fill_(2**40), "bits of its shape"),
        (lambda parts: parts[f"{NAME}.hf_prune_shape"].neg_(), "bits of its shape"),
        (lambda parts: parts.update({f"{NAME}.hf_prune_shape": torch.tensor([64.0, 32.0])}), "bits of its shape"),
        (lambda parts: parts.update({f"{NAME}.hf_prune_shape": torch.tensor(2048)}), "bits of its shape"),
    ],
)
def test_damaged(change, message, tmp_path):
    _, parts = saved("llama", tmp_path)
    change(parts)
    save_file(parts, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LayoutError, match=message):
        T.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_another_shape_is_refused(tmp_path):
    _, parts = saved("llama", tmp_path)
    parts[f"{NAME}.hf_prune_shape"] = parts[f"{NAME}.hf_prune_shape"].flip(0).contiguous()
    save_file(parts, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatched"):
        T.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_card_says_that_hf_prune_reads_it(tmp_path):
    model = tiny_model("bert")
    result = prune(model, WeightMagnitudeConfig(sparsity=0.5))
    for compressed_, needed in ((False, False), (True, True)):
        folder = tmp_path / str(compressed_)
        save_pretrained(model, folder, mask=result.mask, report=result.report, compressed=compressed_)
        card = (folder / "README.md").read_text()
        assert ("import hf_prune" in card.partition("## Before")[0]) == needed
        assert ("| transformers alone | no |" in card) == needed
        assert "these lines were run on the saved files" in card
