"""Scores and budgets to masks."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny import FAMILIES, tiny_model

import hf_prune
from hf_prune import ConfigError, InfeasibleBudgetError
from hf_prune.selection import Selector, resolve_budget


def table_for(name, sequence_length=9):
    model = tiny_model(name)
    return model, hf_prune.CostTable(model, hf_prune.prunable_units(model), sequence_length=sequence_length)


def random_scores(selector, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.size, generator=generator) * selector.unit_weight(g) for g in selector.groups}


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["bert", "llama", "t5/gated", "whisper"]),
    macs=st.floats(0.62, 1.0),
    params=st.floats(0.75, 1.0),
    multiple=st.sampled_from([1, 8, 7]),
    length=st.floats(1, 500),
    seed=st.integers(0, 5),
)
def test_a_global_mask_fits_and_nothing_more_does(name, macs, params, multiple, length, seed):
    _, table = table_for(name, sequence_length=length)
    budget = {"macs": macs, "params": params}
    try:
        selector = Selector(table, budget, multiple_of=multiple)
    except InfeasibleBudgetError:
        return
    scores = random_scores(selector, seed)
    mask = selector.select(scores)
    costs, dense = table.of(mask), table.of()
    assert costs.macs <= macs * dense.macs and costs.params <= params * dense.params
    for group in selector.groups:
        kept = int(mask[group.name].sum())
        step = multiple if group.kind == "neurons" else 1
        assert kept == group.size or kept % step == 0 and kept >= step
        if 0 < kept < group.size:
            assert scores[group.name][mask[group.name]].min() >= scores[group.name][~mask[group.name]].max()
        if kept < group.size:
            more = min(step, group.size - kept)
            wider = costs + table.unit[group.name] * (more if more == step else step + more)
            full = kept + step > group.size - step  # the last block takes the remainder
            assert full or wider.macs > macs * dense.macs or wider.params > params * dense.params


def test_units_compete_by_score_per_cost():
    model, table = table_for("bert", sequence_length=9)
    selector = Selector(table, {"macs": 0.8})
    cheap_first = {g.name: torch.full((g.size,), 1.0) for g in selector.groups}
    mask = selector.select(cheap_first)  # equal scores: a neuron costs less than a head
    assert mask.density("neurons") == 1.0 and mask.density("heads") < 1.0
    fair = selector.select(random_scores(selector))  # proportional to the cost
    assert fair.density("neurons") < 1.0 and fair.density("heads") < 1.0


def test_the_best_units_of_all_layers_are_kept():
    _, table = table_for("bert")
    selector = Selector(table, {"macs": 0.7}, ("neurons",))
    scores = random_scores(selector)
    mask = selector.select(scores)
    kept = torch.cat([scores[g.name][mask[g.name]] for g in selector.groups])
    lost = torch.cat([scores[g.name][~mask[g.name]] for g in selector.groups])
    assert kept.min() >= lost.max()


def test_every_layer_keeps_one_unit():
    _, table = table_for("bert")
    selector = Selector(table, {"macs": 0.4})
    scores = random_scores(selector)
    scores["encoder.layer.1.output.dense"] = torch.full((64,), -1.0)
    scores["encoder.layer.1.attention.output.dense"] = torch.full((4,), -1.0)
    mask = selector.select(scores)
    assert mask["encoder.layer.1.output.dense"].sum() == 1
    assert mask["encoder.layer.1.attention.output.dense"].sum() == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_uniform_masks_have_one_width_per_stack(name):
    model, table = table_for(name)
    selector = Selector(table, {"macs": 0.8}, allocation="uniform", multiple_of=4, config=model.config)
    mask = selector.select(random_scores(selector))
    assert table.of(mask).macs <= 0.8 * table.of().macs
    for stack in table.units.stacks.values():
        for kind in ("heads", "neurons"):
            groups = [g for g in table.units.of_kind(kind) if g.stack == stack.layers]
            assert len({int(mask[g.name].sum()) for g in groups if g.block.cross} if kind == "heads" else {0}) <= 1
            assert len({int(mask[g.name].sum()) for g in groups}) == 1
            assert kind == "heads" or int(mask[groups[0].name].sum()) % 4 == 0


@pytest.mark.parametrize("budget", [{"macs": 0.05}, {"params": 0.1}, {"macs": 100}, {"macs": 0.9, "memory": 0.2}])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_an_infeasible_budget_names_the_nearest_feasible_one(budget, allocation):
    model, table = table_for("llama")
    with pytest.raises(InfeasibleBudgetError, match="nearest feasible budget") as error:
        Selector(table, budget, allocation=allocation, config=model.config)
    metric, _, ratio = str(error.value).rpartition("{")[2].strip("}.").partition(": ")
    feasible = {**budget, metric.strip("'"): float(ratio)}
    if len(feasible) == 1:
        selector = Selector(table, feasible, allocation=allocation, config=model.config)
        assert selector.select(random_scores(selector)).kept("neurons") > 0


@pytest.mark.parametrize(
    "budget, message",
    [
        ({}, "must be a dict such as"),
        (0.5, "must be a dict such as"),
        ({"mac": 0.5}, "Did you mean 'macs'"),
        ({"macs": 0}, r"in \(0, 1\]"),
        ({"macs": -0.5}, r"in \(0, 1\]"),
        ({"macs": 1.5}, r"in \(0, 1\]"),
        ({"macs": float("nan")}, r"in \(0, 1\]"),
        ({"macs": float("inf")}, r"in \(0, 1\]"),
        ({"macs": True}, r"in \(0, 1\]"),
        ({"macs": "0.5"}, r"in \(0, 1\]"),
        ({"params": 10**12}, "is more than the"),
    ],
)
def test_malformed_budgets(budget, message):
    _, table = table_for("bert")
    with pytest.raises(ConfigError, match=message):
        resolve_budget(budget, table.of())


def test_absolute_budgets_are_ratios_in_other_words():
    _, table = table_for("bert")
    dense = table.of()
    assert resolve_budget({"macs": 0.5}, dense) == resolve_budget({"macs": int(dense.macs / 2)}, dense)
    assert resolve_budget({"params": 1.0}, dense) == {"params": dense.params}


def test_a_budget_of_one_prunes_nothing():
    _, table = table_for("bert", sequence_length=25.16)
    selector = Selector(table, {"macs": 1.0})
    assert selector.select(random_scores(selector)) == hf_prune.PruningMask({}, table.units)


def test_exclude_keeps_groups_whole_and_must_match():
    model, table = table_for("bert")
    selector = Selector(table, {"macs": 0.7}, exclude=("encoder.layer.0.*", "*.attention.*"))
    mask = selector.select(random_scores(selector))
    assert mask["encoder.layer.0.output.dense"].all() and mask.density("heads") == 1.0
    with pytest.raises(ConfigError, match="Unknown pattern in exclude 'layers.99'"):
        Selector(table, {"macs": 0.7}, exclude=("layers.99",))
    with pytest.raises(ConfigError, match="exclude leaves no heads and neurons"):
        Selector(table, {"macs": 0.7}, exclude=("*",))
    with pytest.raises(ConfigError, match="'uniform' needs all"):
        Selector(
            table, {"macs": 0.7}, exclude=("encoder.layer.0.output.*",), allocation="uniform", config=model.config
        )


def test_what_the_stock_config_can_not_hold_is_said():
    model, table = table_for("bert")
    with pytest.raises(ConfigError, match="can't hold fewer heads: use allocation='global'"):
        Selector(table, {"macs": 0.7}, ("heads",), allocation="uniform", config=model.config)
    model, table = table_for("t5")
    with pytest.raises(ConfigError, match="no heads to prune in this t5 model: .*position bias"):
        Selector(table, {"macs": 0.7}, ("heads",))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_name_the_layer(value):
    _, table = table_for("bert")
    selector = Selector(table, {"macs": 0.7})
    scores = random_scores(selector)
    scores["encoder.layer.1.output.dense"][3] = value
    with pytest.raises(hf_prune.CalibrationError, match="scores of encoder.layer.1.output.dense are not finite"):
        selector.select(scores)
