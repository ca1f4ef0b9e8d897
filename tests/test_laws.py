"""The laws of the design, for methods x families."""

import copy

import pytest
import torch
from pruned import logits
from tiny import FAMILIES, tiny_batch, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_prune
from hf_prune import (
    AutoPruningConfig,
    FisherConfig,
    FLAPConfig,
    KCMConfig,
    KPruneConfig,
    LayerDropConfig,
    MagnitudeConfig,
    RandomConfig,
    RIAConfig,
    SparseGPTConfig,
    WandaConfig,
    WeightMagnitudeConfig,
)
from hf_prune.units import base_model

# One row a method: what it is called with, and the budget that every family can meet.
METHODS = {
    "auto": AutoPruningConfig(budget={"macs": 0.85}, held_out=4, candidates=("magnitude", "kcm")),
    "fisher": FisherConfig(budget={"macs": 0.8}),
    "fisher-paper": FisherConfig(budget={"params": 0.85}, per_sample=True, recover="scale"),
    "magnitude": MagnitudeConfig(budget={"macs": 0.7}),
    "magnitude-uniform": MagnitudeConfig(budget={"params": 0.8}, allocation="uniform"),
    "random": RandomConfig(budget={"params": 0.75, "macs": 0.8}, seed=3),
    "random-multiple": RandomConfig(budget={"memory": 0.8}, multiple_of=8),
    "kcm": KCMConfig(budget={"macs": 0.85}),
    "kprune": KPruneConfig(budget={"macs": 0.8}),
    "kprune-paper": KPruneConfig(budget={"params": 0.85}, kpred="paper", recover="scale"),
    "kcm-paper": KCMConfig(budget={"macs": 0.85}, r2="iterated", recover="scale"),
    "kprune-shallow": KPruneConfig(budget={"macs": 0.6}, drop_layers=1),
    "kcm-shallow": KCMConfig(budget={"macs": 0.63}, drop_layers=1),
    "flap": FLAPConfig(budget={"macs": 0.7}),
    "flap-shallow": FLAPConfig(budget={"params": 0.75, "macs": 0.6}, drop_layers=1),
    "layer_drop": LayerDropConfig(budget={"macs": 0.75}),
}
# The same for methods that zero single weights.
WEIGHT_METHODS = {
    "wanda": WandaConfig(sparsity=0.6),
    "wanda-pattern": WandaConfig(pattern="2:4"),
    "ria": RIAConfig(sparsity=0.5),
    "sparsegpt": SparseGPTConfig(sparsity=0.5, block_size=16),
    "sparsegpt-pattern": SparseGPTConfig(pattern="4:8"),
    "weight_magnitude": WeightMagnitudeConfig(sparsity=0.5),
}
KINDS = ("bert", "deberta-v2/own", "gpt2", "gpt_neox", "llama", "gemma2", "vit", "bart", "t5", "whisper")


def matrix(methods, families, kinds=KINDS):
    """All methods x all families. Variants of a method (`kcm-paper`) run by default on one family of each kind."""
    return [
        pytest.param(method, name, marks=pytest.mark.slow if "-" in method and name not in kinds else ())
        for method in methods
        for name in families
    ]


FREE = ("magnitude", "magnitude-uniform", "random", "random-multiple", "flap", "flap-shallow")


def three_ways(batch):
    """The same examples in one batch, one by one, and one by one without padding."""
    size = len(next(iter(batch.values())))
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(size)]
    cut = []
    for row in rows:
        real = int(row["attention_mask"].sum()) if "attention_mask" in row else None
        length = row["input_ids"].shape if "input_ids" in row else None
        cut.append({k: v[:, :real] if v.shape == length else v for k, v in row.items()})
    return [batch], rows, cut


@pytest.mark.parametrize(("method", "name"), matrix(METHODS, FAMILIES))
def test_pruned_is_shrunk_is_within_the_budget(method, name):
    config = METHODS[method]
    model = hf_prune.prunable(tiny_model(name))
    batches = [tiny_batch(name, size=4, padded=True, seed=seed, labels="fisher" in method) for seed in range(4)]
    dense = logits(model, batches[0])
    before = sum(p.numel() for p in model.parameters())

    result = model.prune(config, batches)
    masked = logits(model, batches[0])
    assert not torch.allclose(masked, dense, atol=1e-6)

    lengths = dict(zip(("sequence_length", "target_length"), result.report.sequence_lengths.values(), strict=False))
    limits = {m: ratio * result.report.before[m] for m, ratio in config.budget.items()}
    for metric, limit in limits.items():
        assert result.report.after[metric] <= limit
    table = hf_prune.CostTable(model, hf_prune.prunable_units(model), **lengths)
    if method == "layer_drop":  # no layer could have stayed
        for stack in table.units.stacks:
            for index in (~result.mask[stack]).nonzero().flatten():
                back = torch.arange(table.units[stack].size) == index
                more = hf_prune.PruningMask({**result.mask, stack: result.mask[stack] | back}, table.units)
                assert any(table.of(more)[m] > limit for m, limit in limits.items())
    # Fisher's search fills the budget with neurons behind the heads it takes: only they are at their limit.
    if config.allocation == "global" and config.multiple_of is None:
        kinds = ("heads", "neurons") if method in FREE else ("neurons",)
        pruned = [g for g in table.units.of_kind(*kinds) if not result.mask[g.name].all()]
        assert not any(
            all(result.report.after[m] + table.unit[g.name][m] <= limit for m, limit in limits.items()) for g in pruned
        )

    model.shrink()
    assert (logits(model, batches[0]) - masked).abs().max() <= 1e-5 * masked.abs().max().clamp_min(1)
    assert sum(p.numel() for p in model.parameters()) == result.report.after["params"] < before
    assert hf_prune.model_costs(model, **lengths).macs == pytest.approx(result.report.after["macs"])
    if config.allocation == "uniform" or method == "layer_drop":
        assert not hasattr(model.config, "hf_prune")


PADDED = ("bert", "distilbert", "gpt2", "llama", "t5", "whisper", "vit")


@pytest.mark.parametrize(("method", "name"), matrix(METHODS, PADDED, kinds=("bert", "llama")))
def test_batch_size_and_padding_do_not_change_the_mask(method, name):
    batch = tiny_batch(name, size=24, padded=True, labels="fisher" in method)
    _, rows, cut = three_ways(batch)
    masks, outputs = [], []
    # The code of the authors of Fisher and K-prune squares the gradients of batches: other batches, other scores.
    by_batch = method in ("fisher", "kprune-paper")
    for data in ([batch], [batch] if by_batch else rows, [batch] if by_batch else cut, iter([batch])):
        model = tiny_model(name)
        masks.append(hf_prune.prune(model, METHODS[method], data).mask)
        outputs.append(logits(model, batch))
    assert masks[0] == masks[1] == masks[2] == masks[3]
    # Reconstructed weights may differ along directions that the data hardly excite: the function may not.
    for other in outputs[1:]:
        assert torch.allclose(other, outputs[0], atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
@pytest.mark.parametrize("method", METHODS)
def test_bf16_models_are_pruned_in_their_dtype(method, name):
    model = hf_prune.prunable(tiny_model(name).to(torch.bfloat16))
    batch = tiny_batch(name, size=16, padded=True, labels="fisher" in method)
    model.prune(METHODS[method], [batch])
    masked = logits(model, batch)
    model.shrink()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.allclose(logits(model, batch), masked, atol=0.1)


@pytest.mark.parametrize(("method", "name"), matrix(WEIGHT_METHODS, FAMILIES))
def test_zeroed_is_what_was_asked_for_and_nothing_else(method, name):
    config, model = WEIGHT_METHODS[method], tiny_model(name)
    batches = [tiny_batch(name, size=12, padded=True, seed=seed) for seed in range(2)]
    before = copy.deepcopy(model.state_dict())
    dense = logits(model, batches[0])
    mask = hf_prune.prune(model, config, batches).mask
    mask.check(model)
    assert not torch.allclose(logits(model, batches[0]), dense, atol=1e-6)
    kept = [] if "sparsegpt" in method else list(mask)
    for key, value in model.state_dict().items():
        if key not in mask:
            assert torch.equal(value, before[key]), key
        elif key in kept:
            assert torch.equal(value, before[key] * mask[key]), key
    modules = {f"{key}.weight": module for key, module in model.named_modules()}
    inside = {
        id(module)
        for stack in hf_prune.prunable_units(model).stacks
        for module in base_model(model).get_submodule(stack).modules()
    }
    assert set(mask) == {key for key, m in modules.items() if id(m) in inside and isinstance(m, nn.Linear | Conv1D)}
    for key, keep in mask.items():
        keep = keep.T if isinstance(modules[key], Conv1D) else keep
        if config.pattern is not None:
            n, m = config.target
            assert keep.reshape(len(keep), -1, m).sum(-1).eq(n).all(), key
        elif method == "sparsegpt":
            assert all((~part).sum() == int(part.numel() * config.sparsity) for part in keep.split(16, 1)), key
        elif method == "ria":
            assert (~keep).sum() == int(keep.numel() * config.sparsity), key
        else:
            assert (~keep).sum(1).eq(int(keep.shape[1] * config.sparsity)).all(), key


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "gpt2", "opt", "llama", "t5", "whisper", "vit"])
@pytest.mark.parametrize("method", ["wanda", "wanda-pattern", "ria", "sparsegpt"])
def test_batch_size_and_padding_do_not_change_the_zeros(method, name):
    batch = tiny_batch(name, size=24, padded=True)
    masks = [hf_prune.prune(tiny_model(name), WEIGHT_METHODS[method], data).mask for data in three_ways(batch)]
    assert masks[0] == masks[1] == masks[2]


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "gpt2"])
@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_bf16_weights_are_zeroed_in_their_dtype(method, name):
    model = tiny_model(name).to(torch.bfloat16)
    mask = hf_prune.prune(model, WEIGHT_METHODS[method], [tiny_batch(name, size=16, padded=True)]).mask
    mask.check(model)
    assert mask.sparsity() > 0.45 and {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_entry_of_the_table_is_proven(name):
    model = tiny_model(name)
    state = copy.deepcopy(model.state_dict())
    hf_prune.verify_architecture(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_every_registered_family_is_in_the_matrix():
    assert set(hf_prune.known_model_types()) == {name.partition("/")[0] for name in FAMILIES}


def test_every_registered_method_is_in_the_matrix():
    configs = [*METHODS.values(), *WEIGHT_METHODS.values()]
    assert set(hf_prune.known_pruners()) == {config.method for config in configs}
