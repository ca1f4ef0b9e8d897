"""Cutting: projections, shapes, what must stay, and what is refused before anything changes."""

import copy

import pytest
import torch
import transformers as T
from pruned import logits
from tiny import FAMILIES, tiny_batch, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_prune
from hf_prune import MaskError, PruningMask
from hf_prune.selection import Selector
from hf_prune.surgery import cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.Linear(6, 5, bias=False), lambda: Conv1D(5, 6)])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_cut_keeps_what_it_is_told(make, side, dtype):
    module = make().to(dtype)
    module.weight.requires_grad_(False)
    dense, index = copy.deepcopy(module), torch.tensor([0, 3, 4])
    cut(module, index, side)
    x = torch.randn(2, 6, dtype=dtype)
    if side == "inputs":
        chosen = torch.zeros(6, dtype=dtype).index_fill(0, index, 1)
        assert torch.allclose(module(x[:, index]), dense(x * chosen), atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    else:
        assert torch.allclose(module(x), dense(x)[:, index], atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert module.weight.dtype == dtype and not module.weight.requires_grad and module.weight.is_contiguous()
    assert module.bias is None or module.bias.requires_grad
    if isinstance(module, nn.Linear):
        assert (module.out_features, module.in_features) == tuple(module.weight.shape)
    else:
        assert (module.nx, module.nf) == tuple(module.weight.shape)


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_is_shrunk_with_dropped_layers_in_two_steps(name, random_mask):
    model, batch = tiny_model(name), tiny_batch(name, padded=True)
    units = hf_prune.prunable_units(model)
    mask = random_mask(units, seed=5, drop=True)
    hf_prune.apply_mask(model, mask)
    assert hf_prune.current_mask(model) == mask
    masked = logits(model, batch)
    assert hf_prune.shrink(model) is model
    assert torch.allclose(logits(model, batch), masked, atol=1e-5)
    assert hf_prune.current_mask(model) is None

    # A shrunk model is pruned as any other.
    hf_prune.apply_mask(model, random_mask(hf_prune.prunable_units(model), seed=6))
    masked = logits(model, batch)
    hf_prune.shrink(model)
    assert torch.allclose(logits(model, batch), masked, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_heads_or_no_neurons_are_exact(name):
    batch = tiny_batch(name, padded=True)
    for kind in ("heads", "neurons"):
        model = tiny_model(name)
        units = hf_prune.prunable_units(model)
        group = next(g for g in units.of_kind(kind) if g.layer == 1)
        mask = PruningMask({group.name: torch.zeros(group.size, dtype=torch.bool)}, units)
        if not group.prunable:
            with pytest.raises(MaskError, match="can't be pruned"):
                hf_prune.shrink(model, mask)
            continue
        hf_prune.apply_mask(model, mask)
        masked = logits(model, batch)
        hf_prune.shrink(model)
        assert torch.allclose(logits(model, batch), masked, atol=1e-5)


def test_nothing_else_changes(random_mask):
    model = tiny_model("llama", tie_word_embeddings=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" not in name)
    model.train()
    units = hf_prune.prunable_units(model)
    hf_prune.shrink(model, random_mask(units))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(p.requires_grad != ("layers.1" in name) for name, p in model.named_parameters())
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    assert type(model).__name__ == "LlamaForCausalLM"


def test_gates_are_independent_after_deepcopy_and_leave_no_trace(random_mask):
    model, batch = tiny_model("bert"), tiny_batch("bert")
    dense, keys = logits(model, batch), set(model.state_dict())
    units = hf_prune.prunable_units(model)
    hf_prune.apply_mask(model, random_mask(units, 1))
    assert set(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    masked = logits(twin, batch)
    hf_prune.remove_mask(model)
    assert torch.equal(logits(model, batch), dense) and torch.equal(logits(twin, batch), masked)
    hf_prune.apply_mask(twin, random_mask(units, 2))  # replaces the first mask
    hf_prune.apply_mask(model, random_mask(units, 2))
    assert torch.equal(logits(twin, batch), logits(model, batch))
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(**batch).logits, logits(model, batch), atol=1e-6)


def test_masked_units_get_no_gradient():
    model, batch = tiny_model("bert"), tiny_batch("bert")
    units = hf_prune.prunable_units(model)
    hf_prune.apply_mask(model, PruningMask({"encoder.layer.0.output.dense": torch.arange(64) < 10}, units))
    model.gradient_checkpointing_enable()
    model.train()
    model(**batch, labels=torch.zeros(3, dtype=torch.long)).loss.backward()
    gradient = model.bert.encoder.layer[0].output.dense.weight.grad
    assert not gradient[:, 10:].any() and gradient[:, :10].any()


REFUSED = {
    "absent": (lambda units: None, "nothing to shrink"),
    "other model": (
        lambda units: PruningMask({}, hf_prune.prunable_units(tiny_model("roberta"))),
        "is for a roberta model",
    ),
    "other shape": (
        lambda units: PruningMask({}, hf_prune.prunable_units(tiny_model("bert", intermediate_size=32))),
        "another shape",
    ),
    "all layers": (
        lambda units: PruningMask({"encoder.layer": torch.zeros(3, dtype=torch.bool)}, units),
        "drops all layers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_masks_change_nothing(case):
    make, message = REFUSED[case]
    model = tiny_model("bert")
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(MaskError, match=message):
        hf_prune.shrink(model, make(hf_prune.prunable_units(model)))
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name, stack", [("t5", "encoder.block"), ("modernbert", "layers"), ("deberta-v2", "encoder.layer")]
)
def test_layers_on_which_others_depend_stay(name, stack):
    model = tiny_model(name)
    units = hf_prune.prunable_units(model)
    with pytest.raises(MaskError, match=f"Layer 0 of {stack} can't be dropped"):
        hf_prune.shrink(model, PruningMask({stack: torch.tensor([False, True, True])}, units))


def test_heads_of_t5_stay():
    model = tiny_model("t5")
    units = hf_prune.prunable_units(model)
    name = "encoder.block.0.layer.0.SelfAttention.o"
    with pytest.raises(MaskError, match="share one position bias"):
        hf_prune.shrink(model, PruningMask({name: torch.tensor([True, False, True, True])}, units))


def test_a_failing_description_changes_nothing(random_mask, monkeypatch):
    model = tiny_model("bert")
    mask = random_mask(hf_prune.prunable_units(model))
    before = copy.deepcopy(model.state_dict())

    def fail(*_):
        raise hf_prune.LayoutError("no config can say that")

    monkeypatch.setattr("hf_prune.surgery.record", fail)
    with pytest.raises(hf_prune.LayoutError):
        hf_prune.shrink(model, mask)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_heads_that_a_config_refuses_are_recorded_in_a_layout(tmp_path):
    config = T.LlamaConfig(**{**FAMILIES["llama"][0].to_dict(), "hidden_size": 64, "num_attention_heads": 8})
    config.num_key_value_heads = 4
    model = T.LlamaForCausalLM(copy.deepcopy(config))  # no stock config takes the 6 heads of three KV groups
    units = hf_prune.prunable_units(model)
    keep = {f"layers.{i}.self_attn.o_proj": torch.arange(4) < 3 for i in range(3)}
    hf_prune.shrink(model, hf_prune.PruningMask(keep, units)).save_pretrained(tmp_path)
    again = T.LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].self_attn.q_proj.out_features == 48 and again.config.num_attention_heads == 8

    model = T.LlamaForCausalLM(config)
    selector = Selector(hf_prune.CostTable(model), {"macs": 0.6}, allocation="uniform", config=model.config)
    assert selector.classes["num_attention_heads"][1] == [1, 2, 4]


@pytest.mark.parametrize("name", ["llama", "phi3", "bert", "vit"])
def test_the_first_layer_may_lose_all_heads(name, tmp_path):
    model = tiny_model(name)
    units = hf_prune.prunable_units(model)
    group = units.of_kind("heads")[0]
    hf_prune.apply_mask(model, hf_prune.PruningMask({group.name: torch.zeros(group.size, dtype=torch.bool)}, units))
    batch = tiny_batch(name)
    with torch.no_grad():
        masked = model(**batch).logits
        shrunk = hf_prune.shrink(model)(**batch).logits
        hf_prune.save_pretrained(model, tmp_path)
        again = type(model).from_pretrained(tmp_path)(**batch).logits
    assert torch.allclose(shrunk, masked, atol=1e-5) and torch.equal(again, shrunk)
