"""The mathematics of FLAP against closed forms, and bias compensation at the end of every method."""

import copy

import pytest
import torch
from tiny import tiny_batch, tiny_model

import hf_prune
from hf_prune import Calibrator, FLAPConfig
from hf_prune.methods.flap import fluctuation, standardised
from hf_prune.reconstruction import compensate, reconstruct
from hf_prune.selection import Selector
from hf_prune.statistics import Moments


def moments_of(model, data, groups):
    moments = {g.name: Moments(g.size * g.width, torch.device("cpu")) for g in groups}
    Calibrator(model, data).collect(moments)
    return moments


def outputs_of(model, name, batch):
    """What the projection `name` puts out for the real tokens of a batch."""
    seen = []
    handle = model.base_model.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0].flatten(0, -2)[batch["attention_mask"].bool().flatten()].double()


def test_the_variance_is_the_sample_variance():
    x = torch.randn(57, 6, dtype=torch.float64) + torch.arange(6) * 10
    moments = Moments(6, torch.device("cpu"))
    for rows in x.split(10):
        moments.update(rows.float())
    assert torch.allclose(moments.variance, x.var(0), rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_a_constant_has_no_variance(value):
    moments = Moments(1, torch.device("cpu"))
    for _ in range(7):
        moments.update(torch.full((11, 1), value))
    assert moments.variance.item() == 0


def test_fluctuation_and_z_scores():
    matrix = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    score = fluctuation(torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64), matrix)
    assert score.tolist() == [50.0, 0.0, 4.0]
    z = standardised(score)
    assert z.mean().abs() < 1e-12 and z.square().mean().item() == pytest.approx(1)
    assert torch.allclose(standardised(7 * score + 3), z)
    assert standardised(torch.full((4,), 2.5)).tolist() == [0.0] * 4
    assert standardised(torch.tensor([5.0])).tolist() == [0.0]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_units_are_kept_in_the_order_of_their_z_scores(name):
    """Whatever their cost, and across layers and kinds: a unit of a lower score only fills what is left over."""
    model, data = tiny_model(name), [tiny_batch(name, size=16, padded=True)]
    units = hf_prune.prunable_units(model)
    groups = units.of_kind("heads", "neurons")
    moments, z = moments_of(model, data, groups), {}
    for group in groups:
        weight = model.base_model.get_submodule(group.name).weight.detach().double()
        norms = (weight if name == "gpt2" else weight.T).square().sum(1)
        score = moments[group.name].variance * norms
        score = (score - score.mean()) / score.std(correction=0)
        z[group.name] = torch.stack([columns.mean() for columns in score.split(group.width)])

    budget = {"macs": 0.75}
    mask = hf_prune.prune(model, FLAPConfig(budget=budget, recover="none"), data).mask
    table = Selector(hf_prune.CostTable(model, units), budget).table
    lost = [
        (z[g.name][i].item(), table.unit[g.name].macs) for g in groups for i in (~mask[g.name]).nonzero().flatten()
    ]
    best_lost, cost = max(lost)
    fillers = 0.0
    for group in groups:
        kept = z[group.name][mask[group.name]]
        assert kept.min() > z[group.name][~mask[group.name]].max() if len(kept) < group.size else True
        if kept.max() >= best_lost:  # else the one unit that every layer keeps
            fillers += float((kept < best_lost - 1e-9).sum()) * table.unit[group.name].macs
    assert len(lost) > 10 and fillers < cost


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt"])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_compensation_keeps_the_mean_output(name, kind):
    model, data = tiny_model(name), [tiny_batch(name, size=12, padded=True)]
    units = hf_prune.prunable_units(model)
    group = units.of_kind(kind)[2]
    mask = hf_prune.PruningMask({group.name: torch.arange(group.size) % 3 == 0}, units)
    dense = outputs_of(model, group.name, data[0])
    bare = copy.deepcopy(model)
    hf_prune.apply_mask(bare, mask)
    compensate(model, units, mask, Calibrator(model, data))
    hf_prune.apply_mask(model, mask)
    pruned = outputs_of(model, group.name, data[0])
    assert torch.allclose(pruned.mean(0), dense.mean(0), atol=1e-5)
    assert not torch.allclose(outputs_of(bare, group.name, data[0]).mean(0), dense.mean(0), atol=1e-3)
    assert not torch.allclose(pruned, dense, atol=1e-3)


def test_constant_inputs_are_pruned_first_in_each_layer_and_at_no_cost():
    model, data = tiny_model("bert"), [tiny_batch("bert", size=12, padded=True)]
    dead = torch.arange(64) % 4 == 1
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight[dead] = 0
        dense = model(**data[0]).logits
    table = hf_prune.CostTable(model, sequence_length=9)
    sixteenth = 3 * 16 * table.unit["encoder.layer.0.output.dense"].params
    config = FLAPConfig(budget={"params": int(table.of().params - sixteenth)}, allocation="uniform")
    mask = hf_prune.prune(model, config, data).mask
    assert all(torch.equal(mask[f"encoder.layer.{i}.output.dense"], ~dead) for i in range(3))
    with torch.no_grad():
        assert torch.allclose(model(**data[0]).logits, dense, atol=1e-5)
        hf_prune.remove_mask(model)
        assert not torch.allclose(model(**data[0]).logits, dense, atol=1e-3)  # the biases have taken over


@pytest.mark.parametrize("method", ["kcm", "fisher", "magnitude", "flap"])
def test_every_method_can_end_with_it(method):
    data = [tiny_batch("bert", size=12, padded=True, labels=True)]
    model, twin = tiny_model("bert"), tiny_model("bert")
    options = {"method": method, "budget": {"macs": 0.8}}
    mask = hf_prune.prune(model, hf_prune.PruningConfig.from_dict({**options, "recover": "bias"}), data).mask
    assert hf_prune.prune(twin, hf_prune.PruningConfig.from_dict({**options, "recover": "none"}), data).mask == mask
    hf_prune.remove_mask(twin)
    reconstruct(twin, hf_prune.prunable_units(twin), mask, Calibrator(twin, data), "bias")
    state = {key.replace(".hf_prune_gate", ""): value for key, value in model.state_dict().items()}
    changed = {key for key, value in tiny_model("bert").state_dict().items() if not torch.equal(value, state[key])}
    assert changed == {f"bert.{name}.bias" for name, keep in mask.items() if not keep.all()}
    assert all(torch.equal(value, state[key]) for key, value in twin.state_dict().items())


def test_without_biases_least_squares_takes_over():
    data = [tiny_batch("llama", size=16, padded=True)]
    models = [tiny_model("llama") for _ in range(2)]
    for model, recover in zip(models, ("bias", "lstsq"), strict=True):
        facts = hf_prune.prune(model, FLAPConfig(budget={"macs": 0.8}, recover=recover), data).report.facts
        assert ("without a bias" in facts.get("recover", "")) == (recover == "bias")
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    model = tiny_model("llama")
    units = hf_prune.prunable_units(model)
    mask = hf_prune.PruningMask({"layers.1.mlp.down_proj": torch.arange(64) > 2}, units)
    with pytest.raises(hf_prune.ConfigError, match="layers.1.mlp.down_proj has no bias.*recover='lstsq'"):
        reconstruct(model, units, mask, Calibrator(model, data), "bias")


def test_what_never_varies_is_an_error_and_changes_nothing():
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight.zero_()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(hf_prune.CalibrationError, match="No input of encoder.layer.1.output.dense varies"):
        hf_prune.prune(model, FLAPConfig(budget={"macs": 0.8}), [tiny_batch("bert")])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(
        hf_prune.ConfigError,
        match="recover must be one of 'lstsq', 'lstsq_outputs', 'scale', 'bias', 'none', got 'mean'",
    ):
        FLAPConfig(budget={"macs": 0.8}, recover="mean")
