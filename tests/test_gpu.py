"""The whole road on a GPU. Skipped where there is none."""

import copy

import pytest
import torch
from tiny import FAMILIES, tiny_batch, tiny_model

import hf_prune

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "bart", "whisper", "vit"])
def test_prune_shrink_save_load(name, dtype, tmp_path):
    model = hf_prune.prunable(tiny_model(name).to("cuda", dtype))
    batch = {k: v.cuda() for k, v in tiny_batch(name, size=24, padded=True).items()}
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    mask = model.prune(hf_prune.KCMConfig(budget={"macs": 0.85}), [batch]).mask
    with torch.no_grad():
        masked = model(**batch).logits
        small = model.shrink()(**batch).logits
    assert torch.allclose(small, masked, atol=1e-4 if dtype == torch.float32 else 0.2)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cuda", dtype)}
    model.save_pretrained(tmp_path / "out")
    again = FAMILIES[name][1].from_pretrained(tmp_path / "out", device_map="cuda")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    if dtype == torch.float32:
        assert mask == hf_prune.prune(tiny_model(name), hf_prune.KCMConfig(budget={"macs": 0.85}), [batch]).mask


def test_latency_is_read_from_the_stream(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path))
    wide = tiny_model("llama", hidden_size=1024, head_dim=128, intermediate_size=8192).to("cuda", torch.bfloat16)
    table = hf_prune.latency_table(wide, batch_size=8, sequence_length=64)
    assert all(block.ms[-1] > 0 for block in table.blocks if block.kind == "neurons")
    assert 0.5 < table.total / table.measured < 2


def test_two_of_four_runs_on_sparse_kernels():
    options = dict(hidden_size=1024, head_dim=128, intermediate_size=4096, num_attention_heads=8)
    model = tiny_model("llama", **options).to("cuda", torch.bfloat16)
    batch = {"input_ids": torch.randint(3, 99, (8, 64), device="cuda")}
    result = hf_prune.prune(model, hf_prune.WandaConfig(pattern="2:4"), [batch])
    dense, one = copy.deepcopy(model), {key: value[:1] for key, value in batch.items()}
    times = hf_prune.accelerate_sparse(model, result.report, batch_size=8, sequence_length=64)
    assert all(time.p50_ms > 0 for time in times.values()) and "2:4 kernels for 21 matrices" in str(result.report)
    with torch.no_grad():
        gap = (model(**one).logits - dense(**one).logits).abs().max() / dense(**one).logits.abs().max()
    assert gap < 0.1
