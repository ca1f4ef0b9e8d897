"""The search: what it finds, and what it refuses."""

import math
from collections import Counter

import optuna
import pytest
from searches import DATA, MODEL, SPACE, members, search, size_error
from tiny import tiny_batch, tiny_model

import hf_prune
from hf_prune.search.front import pareto_optimal
from hf_prune.search.study import METHODS


class TestSearch:
    @pytest.mark.parametrize(
        ("method", "name"),
        [(method, name) for method in METHODS for name in ("small", "medium") if (method, name) != ("gp", "medium")],
    )
    def test_methods_and_spaces(self, method, name):
        space = hf_prune.search_space(name, MODEL)
        front = search(space=space, method=method, num_samples=12)
        found = members(front)
        assert {tuple(m.values()) for m in found} >= {
            tuple(m.values()) for m in (space.largest, space.smallest, space.middle)
        }
        assert len(found) == len({tuple(member.values()) for member in found}) <= 12  # each once
        for point in front.evaluated:
            assert point.mask == space.mask(point.member)
            assert point.error == pytest.approx(1 / point.costs["params"])
        assert front[-1].member == space.largest and [p.error for p in front] == sorted(
            (p.error for p in front), reverse=True
        )
        assert hf_prune.current_mask(MODEL) is None and not MODEL.training

    @pytest.mark.parametrize("method", METHODS)
    def test_a_seed_gives_a_search(self, method):
        first, again, other = (members(search(method=method, seed=seed)) for seed in (1, 1, 2))
        assert first == again != other

    def test_the_front_is_what_no_evaluated_point_beats(self):
        front = search(lambda model: math.sin(model.num_parameters()), method="random", num_samples=12)
        points = [(p.costs["params"], p.error) for p in front.evaluated]
        best = [point for point, optimal in zip(points, pareto_optimal(points), strict=True) if optimal]
        assert [(p.costs["params"], p.error) for p in front] == best

    @pytest.mark.parametrize("cost", ["params", "macs", "memory"])
    def test_costs_are_those_of_the_extracted_model(self, cost):
        front = search(cost=cost, table=hf_prune.CostTable(MODEL, sequence_length=16))
        assert front.cost == cost
        for index, point in enumerate(front):
            costs = hf_prune.model_costs(front.extract(index, MODEL), sequence_length=16)
            assert costs[cost] == pytest.approx(point.costs[cost])

    def test_latency(self, monkeypatch, tmp_path):
        from tiny import parameters_as_time

        monkeypatch.setattr("hf_prune.layer_timing._clocked", parameters_as_time)
        monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path))
        front = search(DATA, cost="latency", metric="loss")
        assert {"latency", "params"} <= set(front[0].costs)
        assert front.select({"latency": front[0].costs["latency"] / front.dense["latency"]}) == 0
        milliseconds = [point.costs["latency"] for point in front]
        assert milliseconds == sorted(milliseconds) and "latency" in front.table()
        report = front.report(0, MODEL)
        assert report.latency["before"] is None and report.latency["where"] and report.latency["table"]
        assert report.after["latency"] == milliseconds[0]
        assert any("measured as a whole" in line for line in report.latency["table"])
        card = (front.save_models(tmp_path / "front", MODEL)[0] / "README.md").read_text()
        row = next(line for line in card.splitlines() if line.startswith("| latency, predicted"))
        assert f"| {milliseconds[0] / front.dense['latency']:.2f}× |" in row
        assert "Latency was not measured" not in card and report.latency["where"] in card

    def test_duplicates_are_not_evaluated_again(self):
        calls = Counter()

        def error(model):
            calls[model.num_parameters()] += 1
            return 0.5

        space = hf_prune.search_space("layer", MODEL, bounds={"layer_2": (0, 0)})
        front = search(error, space, method="random", num_samples=20)
        assert space.size == 4 and len(front.evaluated) <= 4
        assert calls.pop(MODEL.num_parameters()) == 1  # the whole model, which is not in the space
        assert sum(calls.values()) == len(front.evaluated)

    def test_members_with_the_same_mask_are_evaluated_once(self):
        space = hf_prune.search_space("layer", MODEL)
        empty = dict.fromkeys(space.parameters, 0)
        assert space.mask(empty) == space.mask(space.smallest) and empty != space.smallest
        calls = Counter()

        def error(model):
            calls[model.num_parameters()] += 1
            return size_error(model)

        front = search(error, space, method="random", num_samples=60)
        masks = [point.mask for point in front.evaluated]
        assert sum(calls.values()) == len(masks) == sum(mask == other for mask in masks for other in masks)

    def test_local_search_changes_one_number_of_a_point_of_the_front(self):
        front = search(method="local", num_samples=12, seed=3)
        design = [SPACE.largest, SPACE.smallest, SPACE.middle]
        seen = [tuple(member.values()) for member in members(front)]
        for member in members(front):
            if member not in design:
                distances = [sum(a != b for a, b in zip(member.values(), other, strict=True)) for other in seen]
                assert 1 in distances

    def test_a_budget_of_the_space_holds(self):
        space = hf_prune.search_space("medium", MODEL, budget={"params": 0.6})
        for method in METHODS:
            front = search(space=space, method=method, num_samples=6)
            assert all(point.costs["params"] <= 0.6 * front.dense["params"] for point in front.evaluated)

    def test_large_spaces(self, monkeypatch):
        space = hf_prune.search_space("large", MODEL)
        monkeypatch.setattr("hf_prune.search.study._MOST", {"nsga2": 100, "tpe": 100, "gp": 100})
        assert len(space.parameters) > 100
        for method in ("random", "local"):
            front = search(space=space, method=method, num_samples=8)
            assert len(front.evaluated) == 8  # duplicates are all but impossible
        for method in ("nsga2", "tpe", "gp"):
            with pytest.raises(hf_prune.ConfigError, match="search with 'random' or 'local', or in a smaller space"):
                search(space=space, method=method)

    def test_optuna_stays_as_it_was(self):
        optuna.logging.set_verbosity(optuna.logging.INFO)
        search(method="random", num_samples=4)
        assert optuna.logging.get_verbosity() == optuna.logging.INFO


class TestWrongCalls:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "grid"}, "Unknown search method 'grid'"),
            ({"cost": "flops"}, "Unknown cost 'flops'"),
            ({"num_samples": 0}, "num_samples must be a whole number of at least 1"),
            ({"num_samples": 2.5}, "num_samples must be"),
            ({"cost": "latency", "table": hf_prune.CostTable(MODEL)}, "needs a table of it"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(hf_prune.ConfigError, match=message):
            search(**options)

    def test_metrics(self):
        with pytest.raises(hf_prune.ConfigError, match="Unknown metric 'acuracy'. Did you mean 'accuracy'"):
            search(DATA, metric="acuracy")

    def test_data_without_labels(self):
        with pytest.raises(hf_prune.CalibrationError, match="needs labels"):
            search([tiny_batch("bert")])
        with pytest.raises(hf_prune.ConfigError, match="with labels=True"):
            search(hf_prune.Calibrator(MODEL, DATA))

    def test_a_space_of_another_model(self):
        space = hf_prune.search_space("small", tiny_model("bert", intermediate_size=32))
        with pytest.raises(hf_prune.MaskError, match="another shape"):
            search(space=space)

    def test_a_masked_model(self):
        model = tiny_model("bert")
        space = hf_prune.search_space("small", model)
        hf_prune.apply_mask(model, space.mask(space.smallest))
        with pytest.raises(hf_prune.ConfigError, match="carries a mask"):
            hf_prune.search_subnetworks(model, space, size_error)
