"""Tables of latency, and the masks that budgets of latency lead to. No test looks at the clock."""

import copy
import json
import math
from itertools import product

import numpy as np
import pytest
import torch
from tiny import FAMILIES, parameters_as_time, tiny_batch, tiny_model

import hf_prune
from hf_prune import (
    ConfigError,
    CostTable,
    InfeasibleBudgetError,
    LatencyTable,
    PruningError,
    latency,
    latency_table,
    layer_timing,
)
from hf_prune.latency import BlockTimes
from hf_prune.selection import Selector


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(latency, "_tables", {})
    monkeypatch.setattr(layer_timing, "_LEAST", 1)
    monkeypatch.setattr(layer_timing, "_MOST", 1)
    return tmp_path / "latency"


@pytest.fixture
def clock(monkeypatch):
    """Time is what the test says it is: the calls that were made."""
    calls = []

    def clocked(*args):
        calls.append(args)
        return parameters_as_time(*args)

    monkeypatch.setattr(layer_timing, "_clocked", clocked)
    return calls


# The table


@pytest.mark.parametrize("name", FAMILIES)
def test_a_table_of_parameters_counts_parameters(name, clock, random_mask):
    model = tiny_model(name)
    table = CostTable(model, latency=latency_table(model, sequence_length=9))
    assert table.of().latency == table.of().params == table.latency.total == table.latency.measured
    for seed, drop in product(range(3), (False, True)):
        costs = table.of(random_mask(table.units, seed, drop))
        assert costs.latency == pytest.approx(costs.params, rel=1e-12)
    assert LatencyTable.from_dict(json.loads(json.dumps(table.latency.to_dict()))) == table.latency


@pytest.mark.parametrize("name", FAMILIES)
def test_measuring_leaves_the_model_as_it_was(name):
    model = tiny_model(name).train()
    frozen = next(model.base_model.children()).eval()
    state, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    table = latency_table(model, batch_size=2, sequence_length=9)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training and not frozen.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    for group in hf_prune.prunable_units(model).of_kind("heads", "neurons"):
        if group.prunable:
            ms = table.units[group.name]
            assert len(ms) == group.size + 1 and ms[0] == 0 and (np.diff(ms) >= 0).all()
        else:
            assert group.name not in table.units
    assert type(model).__name__ in str(table) and "the table is off by" in str(table)


def test_more_units_never_take_less_time(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        layer_timing, "_clocked", lambda model, inputs, places: (99.0, {place: rng.uniform(1, 2) for place in places})
    )
    for seed in range(5):
        table = latency_table(tiny_model("bert"), sequence_length=9 + seed)
        assert all((np.diff(block.ms) >= 0).all() and block.ms[0] == 0 for block in table.blocks)


def test_layers_of_one_kind_share_their_measurement(clock):
    table = latency_table(tiny_model("modernbert"), sequence_length=9)  # its layers attend globally or locally
    assert sorted(len(block.names) for block in table.blocks) == [1, 1, 2, 2]
    model = tiny_model("bert")
    mask = torch.arange(64) < 40
    hf_prune.shrink(
        model, hf_prune.PruningMask({"encoder.layer.1.output.dense": mask}, hf_prune.prunable_units(model))
    )
    blocks = latency_table(model, sequence_length=9).blocks
    assert sorted(block.counts[-1] for block in blocks) == [4, 4, 40, 64]


def test_a_copy_shares_what_is_not_cut_and_owns_what_is():
    model = tiny_model("llama")
    layer = model.model.layers[0]
    units = hf_prune.prunable_units(model)
    copies = layer_timing.cut_copies(model.model, units, ("layers", 0), 32)
    small = copies["layers.0.mlp.down_proj", 64]  # whole, but not the same memory: all widths start cold
    assert small.self_attn.q_proj.weight is layer.self_attn.q_proj.weight
    assert small.mlp.up_proj.weight is not layer.mlp.up_proj.weight
    assert torch.equal(small.mlp.up_proj.weight, layer.mlp.up_proj.weight)
    assert set(copies) == {("layers.0.mlp.down_proj", n) for n in (0, 32, 64)} | {
        ("layers.0.self_attn.o_proj", n) for n in (0, 1, 2)
    }


def test_what_can_not_be_measured_is_said(random_mask):
    model = tiny_model("bert")
    hf_prune.apply_mask(model, random_mask(hf_prune.prunable_units(model)))
    with pytest.raises(ConfigError, match="carries a mask"):
        latency_table(model)
    with pytest.raises(ConfigError, match="batch_size must be a whole number of at least 1"):
        latency_table(tiny_model("bert"), batch_size=0)
    with pytest.raises(ConfigError, match="64 positions has no room for sequence_length=128"):
        latency_table(tiny_model("bert"))


# The cache


def test_a_table_is_measured_once(cache, clock, monkeypatch):
    first = latency_table(tiny_model("bert"), sequence_length=9)
    measured = len(clock)
    monkeypatch.setattr(latency, "_tables", {})  # another run
    assert latency_table(tiny_model("bert", seed=7), sequence_length=9) == first and len(clock) == measured
    assert len(list(cache.iterdir())) == 1
    for other in (
        dict(batch_size=2, sequence_length=9),
        dict(sequence_length=10),
        dict(model=tiny_model("bert", intermediate_size=96), sequence_length=9),
        dict(model=tiny_model("bert").to(torch.bfloat16), sequence_length=9),
        dict(model=tiny_model("roberta"), sequence_length=9),
    ):
        before = len(clock)
        latency_table(**{"model": tiny_model("bert"), **other})
        assert len(clock) > before
    assert len(list(cache.iterdir())) == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda data: "",
        lambda data: json.dumps(data)[:-9],
        lambda data: "[1]",
        lambda data: json.dumps({**data, "version": 0}),
        lambda data: json.dumps({**data, "blocks": data["blocks"][1:]}),
        lambda data: json.dumps({**data, "blocks": [{**data["blocks"][0], "ms": [0, 2, 1, 3, 4]}, data["blocks"][1]]}),
        lambda data: json.dumps({**data, "blocks": [{**data["blocks"][0], "ms": []}, data["blocks"][1]]}),
        lambda data: json.dumps({**data, "rest": float("nan")}),
        lambda data: json.dumps({**data, "layers": {"encoder.layer": [1.0]}}),
        lambda data: json.dumps({**data, "setting": {**data["setting"], "torch": "1.0"}}),
    ],
)
def test_a_corrupt_table_is_measured_again(change, cache, clock, monkeypatch):
    good = latency_table(tiny_model("bert"), sequence_length=9)
    (path,) = cache.iterdir()
    path.write_text(change(json.loads(path.read_text())))
    monkeypatch.setattr(latency, "_tables", {})
    before = len(clock)
    assert latency_table(tiny_model("bert"), sequence_length=9) == good
    assert len(clock) > before
    assert LatencyTable.from_dict(json.loads(path.read_text())) == good


def test_a_table_that_can_not_be_kept_serves_the_run(cache, clock, monkeypatch):
    cache.parent.joinpath("file").write_text("")
    monkeypatch.setenv("HF_PRUNE_CACHE", str(cache.parent / "file"))
    first = latency_table(tiny_model("bert"), sequence_length=9)
    assert latency_table(tiny_model("bert"), sequence_length=9) is first


def test_a_table_of_another_version_is_refused():
    with pytest.raises(PruningError, match="version 2"):
        LatencyTable.from_dict({"version": 2})
    with pytest.raises(PruningError, match="Not a latency table: KeyError"):
        LatencyTable.from_dict({"version": 1})


# Selection


def stairs(model, seed=0):
    """A made-up table: stairs, plateaus and units for nothing, as devices have them."""
    units, rng = hf_prune.prunable_units(model), np.random.default_rng(seed)
    blocks, layers = [], {stack: [0.1] * units[stack].size for stack in units.stacks}
    for group in units.of_kind("heads", "neurons"):
        if group.prunable:
            counts = (0, *sorted({int(n) for n in rng.integers(1, group.size, 5)}), group.size)
            ms = np.cumsum([0.0, *rng.choice([0.0, 0.2, 1.5], len(counts) - 1)])
            blocks.append(BlockTimes((group.name,), group.kind, counts, tuple(ms.tolist())))
            layers[group.stack][group.layer] += float(ms[-1])
    return LatencyTable({"batch_size": 1}, tuple(blocks), layers, 0.7, 9.0, 8)


def scores_for(selector, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.size, generator=generator) * selector.unit_weight(g) for g in selector.groups}


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "whisper"])
@pytest.mark.parametrize("how", ["select", "search", "uniform"])
def test_a_mask_meets_the_table_and_nothing_more_does(how, name, multiple):
    model = tiny_model(name)
    tried = 0
    for seed, limits in product(range(4), ({}, {"params": 0.85}, {"macs": 0.8, "params": 0.9})):
        table = CostTable(model, latency=stairs(model, seed))
        dense = table.of()
        for ratio in (0.55, 0.7, 0.85):
            budget = {"latency": ratio, **limits}
            try:
                selector = Selector(
                    table,
                    budget,
                    allocation="uniform" if how == "uniform" else "global",
                    multiple_of=multiple,
                    config=model.config,
                )
            except InfeasibleBudgetError:
                continue
            tried += 1
            scores = scores_for(selector, seed)
            mask = selector.search(scores) if how == "search" else selector.select(scores)
            costs = table.of(mask)
            assert all(costs[metric] <= budget[metric] * dense[metric] for metric in budget)
            for group in selector.groups:
                kept = int(mask[group.name].sum())
                assert kept == group.size or group.kind == "heads" or kept % multiple == 0
                assert kept >= 1
                if how == "select" and kept < group.size:  # the best are kept, and the next ones don't fit
                    assert scores[group.name][mask[group.name]].min() >= scores[group.name][~mask[group.name]].max()
                    step = multiple if group.kind == "neurons" else 1
                    more = kept + step if kept + 2 * step <= group.size else group.size
                    wider = costs - table.several(group.name, kept) + table.several(group.name, more)
                    assert any(wider[metric] > budget[metric] * dense[metric] for metric in budget)
    assert tried > 8


def test_units_that_take_no_time_stay():
    model = tiny_model("bert")
    table = stairs(model)
    free = tuple(
        BlockTimes(b.names, b.kind, (0, b.counts[-1]), (0.0, 0.0 if b.kind == "heads" else 3.0)) for b in table.blocks
    )
    table = LatencyTable(table.setting, free, {"encoder.layer": [3.1] * 3}, 0.7, 10.0, 8)
    selector = Selector(CostTable(model, latency=table), {"latency": 0.5})
    for method in (selector.select, selector.search):
        mask = method({g.name: torch.rand(g.size) + 0.1 for g in selector.groups})
        assert mask.density("heads") == 1 and 0.4 < mask.density("neurons") < 0.5


def test_dropped_layers_take_no_time():
    model = tiny_model("bert")
    table = CostTable(model, latency=stairs(model))
    drop = hf_prune.PruningMask({"encoder.layer": torch.tensor([True, False, True])}, table.units)
    gone = table.latency.layers["encoder.layer"][1]
    assert table.of(drop).latency == pytest.approx(table.of().latency - gone)


def test_milliseconds_are_ratios_in_other_words():
    model = tiny_model("bert")
    table = CostTable(model, latency=stairs(model))
    dense = table.of().latency
    by_ratio, by_ms = Selector(table, {"latency": 0.7}), Selector(table, {"latency": 0.7 * dense})
    assert by_ratio.select(scores_for(by_ratio)) == by_ms.select(scores_for(by_ratio))
    with pytest.raises(ConfigError, match=rf"\['latency'\] = 99.5 is more than the {dense:.3f} ms of the model"):
        Selector(table, {"latency": 99.5})
    with pytest.raises(ConfigError, match="or milliseconds above 1, got -3"):
        hf_prune.MagnitudeConfig(budget={"latency": -3})
    with pytest.raises(ConfigError, match=r"needs CostTable\(model, latency=latency_table\(model\)\)"):
        Selector(CostTable(model), {"latency": 0.7})


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_budget_below_the_floor_names_a_feasible_one(allocation):
    model = tiny_model("llama")
    table = CostTable(model, latency=stairs(model))
    with pytest.raises(InfeasibleBudgetError, match=r"the least is [\d.]+ ms, nearest feasible budget") as error:
        Selector(table, {"latency": 0.02}, allocation=allocation, multiple_of=8, config=model.config)
    ratio = float(str(error.value).rpartition(": ")[2].strip("}."))
    assert ratio > 0.02
    selector = Selector(table, {"latency": ratio}, allocation=allocation, multiple_of=8, config=model.config)
    assert table.of(selector.select(scores_for(selector))).latency <= ratio * table.of().latency


def test_a_table_of_another_model_is_refused(clock):
    table = latency_table(tiny_model("bert"), sequence_length=9)
    with pytest.raises(ConfigError, match="is for another model"):
        CostTable(tiny_model("bert", intermediate_size=48), latency=table)


# The whole road

WIDE = dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "hidden_dim"), 128)


@pytest.mark.parametrize(
    "config",
    [
        hf_prune.MagnitudeConfig(budget={"latency": 0.8}),
        hf_prune.MagnitudeConfig(budget={"latency": 0.8}, allocation="uniform", multiple_of=4),
        hf_prune.KCMConfig(budget={"latency": 0.8, "macs": 0.9}, latency_batch_size=2, recover="none"),
        hf_prune.FisherConfig(
            budget={"latency": 0.8, "params": 0.75}, multiple_of=1, sequence_length=8.2, recover="none"
        ),
    ],
    ids=lambda config: config.method,
)
@pytest.mark.parametrize("name", ["llama", "bart", "gpt2", "distilbert"])
def test_prune_reports_predicted_and_measured_latency(name, config, clock, tmp_path):
    model = hf_prune.prunable(tiny_model(name, **WIDE))
    batches = [tiny_batch(name, size=4, padded=True, labels=True, seed=seed) for seed in range(4)]
    result = model.prune(config, batches)
    report = result.report
    step = config.multiple_of or 32
    assert all(row["kept"] % step == 0 for row in report.units if row["kind"] == "neurons")
    assert report.ratio("latency") <= 0.8 and not all(vector.all() for vector in result.mask.values())
    assert report.latency["multiple_of"] == step
    assert report.latency["before"] > 0 and report.latency["after"] > 0
    tokens = math.ceil(config.sequence_length or next(iter(report.sequence_lengths.values())))
    assert report.latency["where"].startswith(f"batch {config.latency_batch_size} × {tokens} ")
    report.save(tmp_path)
    assert hf_prune.PruningReport.load(tmp_path) == report
    assert "Latency: predicted" in str(report) and ", measured " in str(report) and "bench" not in str(report)
    model.shrink()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(report.after["latency"])


def test_reports_without_latency_load_as_before():
    report = hf_prune.prune(tiny_model("bert"), hf_prune.MagnitudeConfig(budget={"macs": 0.8})).report
    assert report.latency is None and "latency" not in {**report.before, **report.after} and "bench" in str(report)
    old = report.to_dict()
    del old["latency"]
    assert hf_prune.PruningReport.from_dict(old) == report


def test_a_result_survives_a_measurement_that_fails(clock, monkeypatch):
    def too_much(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("hf_prune.latency.measure_latency", too_much)
    model = tiny_model("bert", intermediate_size=128)
    report = hf_prune.prune(model, hf_prune.MagnitudeConfig(budget={"latency": 0.8}, sequence_length=9)).report
    assert report.latency["after"] is None and "measured" not in str(report)
    assert hf_prune.current_mask(model) is not None


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, None])
def test_the_batch_size_is_checked(wrong):
    with pytest.raises(ConfigError, match="latency_batch_size must be a whole number of at least 1"):
        hf_prune.MagnitudeConfig(budget={"latency": 0.8}, latency_batch_size=wrong)


@pytest.mark.parametrize("name", ["bert", "gpt2", "whisper"])
@pytest.mark.parametrize("method", ["kprune", "flap", "layer_drop", "auto"])
def test_depth_and_search_by_sublayer_meet_a_budget_of_latency(method, name, clock):
    depth = {} if method == "layer_drop" else {"drop_layers": 1}
    options = {"method": method, "budget": {"latency": 0.7}, **depth}
    if method == "auto":
        options["candidates"] = ("flap", "magnitude")
    model = tiny_model(name, **WIDE)
    data = [tiny_batch(name, size=24, padded=True, seed=seed) for seed in range(3)]
    report = hf_prune.prune(model, hf_prune.PruningConfig.from_dict(options), data).report
    assert report.after["latency"] <= 0.7 * report.before["latency"]
    assert report.latency["after"] is not None
