"""Block Influence against closed forms, dropping to a budget, and depth and width together."""

import copy
import math

import pytest
import torch
from pruned import fail_at, logits
from tiny import tiny_batch, tiny_model

import hf_prune
from hf_prune import Calibrator, ConfigError, LayerDropConfig
from hf_prune.depth import BlockInfluence, block_influence, drop_to_budget
from hf_prune.reconstruction import reconstruct

WIDTH = ("kcm", "fisher", "magnitude", "flap", "random")


def config(method, **options):
    return hf_prune.PruningConfig.from_dict({"method": method, **options})


def batches(name, count=2, size=12):
    return [tiny_batch(name, size=size, padded=True, seed=seed, labels=True) for seed in range(count)]


def dropped(mask, stack="encoder.layer"):
    return (~mask[stack]).nonzero().flatten().tolist()


def test_block_influence_of_two_tokens():
    influence = BlockInfluence(torch.device("cpu"))
    influence.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    influence.update(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 1.0]]))
    assert influence.mean == pytest.approx((1 - math.sqrt(0.5)) / 2, abs=1e-7)
    assert influence.mean == pytest.approx(0.1464466, abs=1e-7)


def test_it_is_that_of_the_real_tokens_between_the_layers():
    model, data = tiny_model("bert"), batches("bert")
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True).hidden_states for batch in data]
    real = torch.cat([batch["attention_mask"].bool().flatten() for batch in data])
    hidden = [torch.cat([state[i].flatten(0, 1) for state in states])[real].double() for i in range(4)]
    expected = [1 - torch.cosine_similarity(*pair, dim=1).mean() for pair in zip(hidden, hidden[1:], strict=False)]
    found = block_influence(Calibrator(model, data))["encoder.layer"]
    assert found == pytest.approx(torch.stack(expected).tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "gpt2"])
def test_the_layers_of_lowest_influence_go(name):
    model, data = tiny_model(name), batches(name)
    (stack, influence), *_ = block_influence(Calibrator(model, data)).items()
    order = sorted(range(3), key=influence.__getitem__)
    for count in (1, 2):
        mask = hf_prune.prune(copy.deepcopy(model), LayerDropConfig(budget={"macs": 1 - count / 3 + 1e-6}), data).mask
        assert dropped(mask, stack) == sorted(order[:count])


def test_what_still_fits_comes_back():
    model = tiny_model("bart")
    table = hf_prune.CostTable(model, sequence_length=9)
    influence = {"encoder.layers": [0.1, 0.3, 0.9], "decoder.layers": [0.2, 0.8, 0.9]}
    decoder = table.layer["decoder.layers"][0].params + sum(
        table.unit[g.name].params * g.size for g in table.units.of_layer("decoder.layers", 0)
    )
    mask = drop_to_budget(table, influence, {"params": int(table.of().params - decoder)})
    assert (dropped(mask, "encoder.layers"), dropped(mask, "decoder.layers")) == ([], [0])
    mask = drop_to_budget(table, influence, {"params": int(table.of().params - decoder - 1)})
    assert (dropped(mask, "encoder.layers"), dropped(mask, "decoder.layers")) == ([0], [0])


@pytest.mark.parametrize("name", ["bert", "t5", "bart", "modernbert"])
def test_the_floor_is_named_and_can_be_met(name):
    model, data = hf_prune.prunable(tiny_model(name)), batches(name)
    with pytest.raises(hf_prune.InfeasibleBudgetError, match="by dropping layers .*nearest feasible budget") as error:
        model.prune(LayerDropConfig(budget={"macs": 0.1}), data)
    assert hf_prune.current_mask(model) is None
    feasible = float(str(error.value).rpartition(": ")[2].strip("}."))
    result = model.prune(LayerDropConfig(budget={"macs": feasible}), data)
    stacks = hf_prune.prunable_units(model).stacks
    assert all(int(result.mask[name].sum()) == 1 for name in stacks)
    assert all(result.mask[name][list(spec.fixed_layers)].all() for name, spec in stacks.items())
    assert all(math.isfinite(x) for values in result.report.facts["block_influence"].values() for x in values)


def test_exclude_keeps_the_layer_of_a_group():
    model, data = tiny_model("bert"), batches("bert")
    for keep in range(3):
        budget = LayerDropConfig(budget={"macs": 0.4}, exclude=(f"encoder.layer.{keep}.output.dense",))
        assert dropped(hf_prune.prune(copy.deepcopy(model), budget, data).mask) == sorted({0, 1, 2} - {keep})
    with pytest.raises(hf_prune.InfeasibleBudgetError, match=r"'macs': 1.0"):
        hf_prune.prune(model, LayerDropConfig(budget={"macs": 0.4}, exclude=("encoder.layer",)), data)


@pytest.mark.parametrize("options", [{"drop_layers": 1}, {"multiple_of": 8}])
def test_options_of_other_methods_are_refused(options):
    with pytest.raises(ConfigError, match=f"leave {next(iter(options))} at"):
        LayerDropConfig(budget={"macs": 0.5}, **options)


# Depth and width


SHALLOW = {"bert": {"macs": 0.6}, "llama": {"macs": 0.6}, "bart": {"macs": 0.75}, "t5": {"macs": 0.75}}


def without_layers(model, mask):
    """The model without the layers that a mask drops, and what the mask says of the other units."""
    units = hf_prune.prunable_units(model)
    small = hf_prune.shrink(model, hf_prune.PruningMask({stack: mask[stack] for stack in units.stacks}, units))
    kept = [mask[g.name] for g in units.of_kind("heads", "neurons") if not mask.drops(g)]
    left = hf_prune.prunable_units(small)
    groups = left.of_kind("heads", "neurons")
    return small, hf_prune.PruningMask({g.name: keep for g, keep in zip(groups, kept, strict=True)}, left)


@pytest.mark.parametrize("name", ["bert", "bart"])
@pytest.mark.parametrize("method", WIDTH)
def test_the_rest_is_pruned_as_if_the_layers_had_never_been(method, name):
    model, data = tiny_model(name), batches(name)
    limit = SHALLOW[name]["macs"] * hf_prune.CostTable(model, sequence_length=9).of().macs
    options = {"budget": {"macs": int(limit)}, "sequence_length": 9}
    options |= {} if method == "random" else {"recover": "none"}
    result = hf_prune.prune(model, config(method, drop_layers=1, **options), data)
    assert result.mask.kept("layers") == result.mask.total("layers") - 1
    assert result.report.after["macs"] <= limit
    rows = {row["name"]: row for row in result.report.units}
    for group in hf_prune.prunable_units(model).of_kind("heads", "neurons"):
        assert (rows[group.name]["kept"] == 0) == result.mask.drops(group)

    shallow, expected = without_layers(tiny_model(name), result.mask)
    assert expected.density("heads") < 1 or expected.density("neurons") < 1
    assert hf_prune.prune(shallow, config(method, **options), data).mask == expected


@pytest.mark.parametrize("name", SHALLOW)
@pytest.mark.parametrize("recover", ["lstsq", "scale"])
def test_the_teacher_of_the_refit_has_all_layers(name, recover):
    data = batches(name, size=24)
    model, clean = tiny_model(name), tiny_model(name)
    mask = hf_prune.prune(model, config("kcm", budget=SHALLOW[name], drop_layers=1, recover=recover), data).mask
    assert mask.density("layers") < 1 and mask.density("neurons") < 1
    reconstruct(clean, hf_prune.prunable_units(clean), mask, Calibrator(clean, data), recover)
    hf_prune.remove_mask(model)
    assert all(torch.equal(value, clean.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_the_layers_above_make_up_for_a_dropped_one(name):
    data = batches(name, size=32)
    dense, gap = logits(tiny_model(name), data[0]), {}
    # Heads don't compete: this says only that the layers between the first and the last may go.
    options = {"budget": SHALLOW[name], "drop_layers": 1, "exclude": ("*.0.*attn*", "*.2.*attn*")}
    if name == "bert":
        options["exclude"] = ("*.0.attention.*", "*.2.attention.*")
    for recover in ("none", "lstsq"):
        model = tiny_model(name)
        mask = hf_prune.prune(model, config("kcm", recover=recover, **options), data).mask
        gap[recover] = (logits(model, data[0]) - dense).square().mean()
    small, rest = without_layers(tiny_model(name), mask)
    reconstruct(small, hf_prune.prunable_units(small), rest, Calibrator(small, data))
    hf_prune.apply_mask(small, rest)
    gap["shallow teacher"] = (logits(small, data[0]) - dense).square().mean()
    assert gap["lstsq"] < min(gap["none"], gap["shallow teacher"])


def test_uniform_widths_and_dropped_layers_make_a_stock_model():
    model, data = hf_prune.prunable(tiny_model("bert")), batches("bert")
    model.prune(config("kcm", budget={"macs": 0.5}, drop_layers=1, allocation="uniform"), data)
    model.shrink()
    assert not hasattr(model.config, "hf_prune")
    assert model.config.num_hidden_layers == 2 and model.config.intermediate_size < 64


def test_layers_alone_may_meet_the_budget():
    model, data = tiny_model("bert"), batches("bert")
    mask = hf_prune.prune(model, config("kcm", budget={"macs": 0.7}, drop_layers=1), data).mask
    assert mask.density("layers") == pytest.approx(2 / 3) and mask.density("neurons") == 1


@pytest.mark.parametrize("method", WIDTH)
def test_layers_go_by_data_alone(method):
    model = tiny_model("bert")
    with pytest.raises(hf_prune.CalibrationError, match=f"{method} with these options needs calibration data"):
        hf_prune.prune(model, config(method, budget={"macs": 0.6}, drop_layers=1))


@pytest.mark.parametrize("value", [-1, 1.0, True, "1", None])
def test_malformed_numbers_of_layers(value):
    with pytest.raises(ConfigError, match="drop_layers must be a whole number of at least 0"):
        config("magnitude", budget={"macs": 0.6}, drop_layers=value)


@pytest.mark.parametrize(
    ("name", "count", "exclude", "most"),
    [
        ("bert", 3, (), 2),
        ("t5", 5, (), 4),
        ("bert", 2, ("encoder.layer.[01].*",), 1),
        ("bert", 1, ("encoder.layer",), 0),
    ],
)
def test_layers_that_can_not_go(name, count, exclude, most):
    model, data = tiny_model(name), batches(name)
    options = {"budget": {"macs": 0.9}, "drop_layers": count, "exclude": exclude}
    with pytest.raises(ConfigError, match=f"drop_layers is {count}, but of the . layers .* at most {most} can be"):
        hf_prune.prune(model, config("magnitude", **options), data)


@pytest.mark.parametrize("method", ["kcm", "flap", "fisher"])
def test_a_failure_on_the_way_changes_nothing(method, monkeypatch):
    model, data = tiny_model("bert"), [tiny_batch("bert", size=8, labels=True)]
    state = copy.deepcopy(model.state_dict())
    options = {"budget": {"macs": 0.4}, "drop_layers": 1, "recover": "lstsq"}
    with pytest.raises(hf_prune.InfeasibleBudgetError):
        hf_prune.prune(model, config(method, **{**options, "budget": {"macs": 0.01}}), data)
    fail_at(monkeypatch, 1)
    with pytest.raises(hf_prune.CalibrationError, match="is not finite"):
        hf_prune.prune(model, config(method, **options), data)
    assert hf_prune.current_mask(model) is None
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_hidden_states_that_are_not_finite_name_the_layer():
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[:, 0] = math.nan
    with pytest.raises(hf_prune.CalibrationError, match=r"inputs of encoder.layer.0 are NaN"):
        hf_prune.prune(model, LayerDropConfig(budget={"macs": 0.7}), batches("bert"))
