"""The whole road on a GPU. Skipped where there is none."""

import copy
import dataclasses

import accelerate
import pytest
import torch
from tiny import FAMILIES, tiny_batch, tiny_model

import hf_prune

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of convolutions, on by default


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
    table = hf_prune.latency_table(wide, batch_size=64, sequence_length=64)  # work that takes longer than launching it
    assert all(block.ms[-1] > 0 for block in table.blocks if block.kind == "neurons")
    assert 0.5 < table.total / table.measured < 2


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        hf_prune.WandaConfig(sparsity=0.5),
        hf_prune.SparseGPTConfig(pattern="2:4"),
        hf_prune.RIAConfig(sparsity=0.5, ratios="owl"),
    ],
    ids=lambda config: config.method,
)
def test_zeros_are_those_of_the_cpu(config, offloaded, tmp_path):
    batches = [tiny_batch("llama", size=16, padded=True, seed=seed) for seed in range(2)]
    expected = hf_prune.prune(tiny_model("llama"), config, batches).mask
    if offloaded:
        model = accelerate.cpu_offload(tiny_model("llama"), 0)
        config = dataclasses.replace(config, offload_folder=str(tmp_path))
    else:
        model = tiny_model("llama").to("cuda")
    mask = hf_prune.prune(model, config, batches).mask
    mask.check(model)
    assert mask.sparsity() == pytest.approx(expected.sparsity(), abs=1e-3)
    agreed = sum(int((mask[name] == expected[name]).sum()) for name in mask) / mask.total()
    assert agreed > 0.995  # what rounding decides: scores that are nearly equal


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs sparse tensor cores"
)
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
