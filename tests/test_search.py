"""The search: what it finds, what it keeps, and what it refuses."""

import datetime
import logging
import math
import os
import reprlib
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from tiny import FAMILIES, tiny_batch, tiny_model
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

import hf_prune
from hf_prune.evaluation import Evaluator
from hf_prune.metrics import Accuracy, Matthews, compute_metrics_for
from hf_prune.search.front import pareto_optimal
from hf_prune.search.study import METHODS, SearchStudy

MODEL = tiny_model("bert")
SPACE = hf_prune.search_space("small", MODEL)


def size_error(model) -> float:
    """An error that falls with the size of a sub-network, and costs nothing."""
    return 1 / model.num_parameters()


def search(error=size_error, space=SPACE, **options):
    return hf_prune.search_subnetworks(MODEL, space, error, **{"num_samples": 8, **options})


def members(front):
    return [point.member for point in front.evaluated]


def journal(path):
    return optuna.load_study(
        study_name="hf_prune",
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path))),
    )


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


DATA = [tiny_batch("bert", 8, padded=True, labels=True, seed=seed) for seed in range(3)]


def reference(model, metric):
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in DATA]).numpy()
    labels = np.concatenate([batch["labels"] for batch in DATA])
    return metric.compute(predictions=logits.argmax(-1), references=labels)


class TestErrors:
    """How wrong a sub-network is."""

    @pytest.mark.parametrize(("name", "metric"), [("accuracy", Accuracy()), ("matthews", Matthews())])
    def test_named_metrics(self, name, metric):
        front = search(DATA, metric=name, num_samples=5)
        for index, point in enumerate(front):
            (value,) = reference(front.extract(index, MODEL), metric).values()
            assert point.error == pytest.approx(1 - value)

    @pytest.mark.parametrize("bounds", [{}, {"num_layers": (1, 2)}])
    def test_reports_tell_the_quality(self, bounds, tmp_path):
        space = hf_prune.search_space("small", MODEL, bounds=bounds)
        front = search(DATA, space, num_samples=5)
        (dense,) = reference(MODEL, Accuracy()).values()
        assert front.dense_error == pytest.approx(1 - dense)
        front.save(tmp_path)
        loaded = hf_prune.ParetoFront.load(tmp_path)
        for index, point in enumerate(front):
            (row,) = loaded.report(index, MODEL).evaluation
            assert row == {"metric": "accuracy", "n": 24} | {
                "before": pytest.approx(dense),
                "after": pytest.approx(1 - point.error),
            }
        assert front.plot(tmp_path / "front.png").axes[0].lines[-1].get_xydata().tolist() == [[1.0, front.dense_error]]
        (row,) = search(DATA, space, metric="loss", num_samples=3).report(0, MODEL).evaluation
        calibrator = hf_prune.Calibrator(MODEL, DATA, labels=True)
        assert row["metric"] == "loss" and row["before"] == pytest.approx(Evaluator(calibrator, "loss")(MODEL))
        (row,) = search(size_error, space, num_samples=3).report(0, MODEL).evaluation
        assert row["metric"] == "error" and row["before"] == 1 / MODEL.num_parameters()

    def test_compute_metrics(self):
        function = compute_metrics_for(Accuracy())
        stock = search(DATA, num_samples=5)
        own = search(DATA, compute_metrics=function, num_samples=5)
        lower = search(DATA, compute_metrics=function, greater_is_better=False, num_samples=5)
        assert [p.error for p in own.evaluated] == [p.error for p in stock.evaluated]
        by_member = {tuple(p.member.values()): p.error for p in lower.evaluated}
        for point in stock.evaluated:
            assert point.error == pytest.approx(1 - by_member[tuple(point.member.values())])
        with pytest.raises(hf_prune.ConfigError, match="Unknown metric 'f1'. .*accuracy"):
            search(DATA, metric="f1", compute_metrics=function)

    @pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "bart", "t5"])
    def test_the_loss_does_not_depend_on_the_batches(self, family):
        model = tiny_model(family)
        batch = tiny_batch(family, 8, padded=True, labels=True)
        whole = Evaluator(hf_prune.Calibrator(model, [batch], labels=True), "loss")(model)
        parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 3), slice(3, 8))]
        split = Evaluator(hf_prune.Calibrator(model, parts, labels=True), "loss")(model)
        with torch.no_grad():
            assert whole == pytest.approx(model(**batch).loss.item(), rel=1e-5)
        assert split == pytest.approx(whole, rel=1e-5)
        perplexity = Evaluator(hf_prune.Calibrator(model, parts, labels=True), "perplexity")(model)
        assert perplexity == pytest.approx(math.exp(whole), rel=1e-4)

    def test_regression(self):
        model = tiny_model("bert", num_labels=1, problem_type="regression")
        batches = [dict(batch, labels=torch.arange(8.0)) for batch in DATA]
        calibrator = hf_prune.Calibrator(model, batches, labels=True)
        with torch.no_grad():
            values = torch.cat([model(**batch).logits[:, 0] for batch in batches]).numpy()
        from scipy.stats import spearmanr

        labels = np.tile(np.arange(8.0), 3)
        assert Evaluator(calibrator, "spearman")(model) == pytest.approx(1 - spearmanr(values, labels).statistic)

    def test_tokens_and_spans(self):
        model = tiny_model("bert", AutoModelForTokenClassification)
        short, long = tiny_batch("bert", 4, 6), tiny_batch("bert", 4, 9)
        for batch in (short, long):
            batch["labels"] = batch["input_ids"] % 2
        error = Evaluator(hf_prune.Calibrator(model, [short, long], labels=True), "accuracy")(model)
        with torch.no_grad():
            hits = [(model(**batch).logits.argmax(-1) == batch["labels"]).float() for batch in (short, long)]
        assert error == pytest.approx(1 - torch.cat([h.flatten() for h in hits]).mean().item())

        model = tiny_model("bert", AutoModelForQuestionAnswering)
        batch = tiny_batch("bert", 4) | {"start_positions": torch.arange(4), "end_positions": torch.arange(4) + 1}
        seen = []

        def compute_metrics(prediction):
            seen.append(prediction)
            return {"exact": 0.25}

        calibrator = hf_prune.Calibrator(model, [batch], labels=True)
        assert Evaluator(calibrator, "exact", compute_metrics)(model) == 0.75
        (start, end), (first, last) = seen[0].predictions, seen[0].label_ids
        assert start.shape == end.shape == (4, 9) and first.tolist() == [0, 1, 2, 3] and last.tolist() == [1, 2, 3, 4]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_is_searched(self, family):
        model = tiny_model(family)
        metric = "loss" if model.can_generate() else "accuracy"
        space = hf_prune.search_space("medium", model)
        front = hf_prune.search_subnetworks(
            model, space, [tiny_batch(family, labels=True)], metric=metric, method="random", num_samples=5
        )
        assert len(front.evaluated) == 5 and all(math.isfinite(point.error) for point in front.evaluated)


class TestNotFinite:
    def test_a_sub_network_is_left_out_and_named(self, caplog, tmp_path):
        smallest = SPACE.smallest
        count = search(num_samples=3).evaluated[0].costs["params"]

        def error(model):
            return math.nan if model.num_parameters() == count else size_error(model)

        logging.getLogger("hf_prune").propagate = True
        with caplog.at_level(logging.WARNING):
            front = search(error, num_samples=8, storage=tmp_path / "log")
        assert smallest not in members(front) and len(front.evaluated) == 7
        failed = [t for t in journal(tmp_path / "log").trials if t.state == optuna.trial.TrialState.FAIL]
        assert len(failed) == 1
        reason = f"The sub-network {reprlib.repr(smallest)} has the error nan"
        assert failed[0].user_attrs["reason"] == reason and reason in caplog.text
        assert len(search(error, num_samples=10, storage=tmp_path / "log").evaluated) == 9  # it goes on

    def test_nan_in_the_logits_is_no_accuracy(self):
        model = tiny_model("bert")
        with torch.no_grad():
            model.classifier.bias[0] = math.nan
        for metric in ("accuracy", "loss"):
            with pytest.raises(hf_prune.CalibrationError, match="None of 3 sub-networks has a finite error"):
                hf_prune.search_subnetworks(
                    model, hf_prune.search_space("small", model), DATA, metric=metric, num_samples=3
                )


class TestStorage:
    @pytest.mark.parametrize(
        ("method", "kind"), [*((method, "journal") for method in METHODS), ("nsga2", "sqlite"), ("local", "sqlite")]
    )
    def test_a_search_goes_on(self, tmp_path, kind, method):
        storage = tmp_path / "search.log" if kind == "journal" else f"sqlite:///{tmp_path}/search.db"
        calls = Counter()

        def error(model):
            calls[model.num_parameters()] += 1
            return size_error(model)

        whole = search(method=method, num_samples=9)
        part = search(error, method=method, num_samples=5, storage=storage)
        assert len(part.evaluated) <= 5
        front = search(error, method=method, num_samples=9, storage=storage)
        assert members(front) == members(whole) and front.hypervolume() == whole.hypervolume()
        assert sum(calls.values()) == len(whole.evaluated)  # nothing was evaluated twice
        assert members(search(error, method=method, num_samples=2, storage=storage)) == members(whole)

    def test_large_members_are_kept(self, tmp_path):
        space = hf_prune.search_space("large", MODEL)
        whole = search(space=space, method="local", num_samples=6)
        search(space=space, method="local", num_samples=4, storage=tmp_path / "log")
        front = search(space=space, method="local", num_samples=6, storage=tmp_path / "log")
        assert members(front) == members(whole)

    def test_another_space_model_metric_or_data(self, tmp_path):
        options = {"storage": tmp_path / "log", "num_samples": 4}
        search(DATA, **options)
        before = [(trial.number, trial.state, trial.values) for trial in journal(tmp_path / "log").trials]
        other = tiny_model("bert", seed=2)
        batches = [tiny_batch("bert", 8, labels=True, seed=7)]
        attempts = {
            "space": lambda: search(DATA, hf_prune.search_space("medium", MODEL), **options),
            "metric": lambda: search(DATA, metric="loss", **options),
            "compute_metrics": lambda: search(DATA, compute_metrics=compute_metrics_for(Accuracy()), **options),
            "greater_is_better": lambda: search(DATA, greater_is_better=False, **options),
            "cost": lambda: search(DATA, cost="macs", **options),
            "data": lambda: search(batches, **options),
            "model": lambda: hf_prune.search_subnetworks(
                other, hf_prune.search_space("small", other), DATA, **options
            ),
        }
        for key, attempt in attempts.items():
            with pytest.raises(hf_prune.ConfigError, match=f"was begun with another {key}: .*study_name="):
                attempt()
        bounded = hf_prune.search_space("small", MODEL, bounds={"num_layers": (2, 3)})
        with pytest.raises(hf_prune.ConfigError, match="another space"):
            search(DATA, bounded, **options)
        after = [(trial.number, trial.state, trial.values) for trial in journal(tmp_path / "log").trials]
        assert after == before  # the study is as it was, and usable
        assert len(search(DATA, **(options | {"num_samples": 6})).evaluated) >= 5
        assert len(search(DATA, bounded, study_name="another", **options).evaluated) >= 3

    def test_a_study_of_something_else(self, tmp_path):
        storage = f"sqlite:///{tmp_path}/search.db"
        study = optuna.create_study(storage=storage, study_name="hf_prune")
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
        with pytest.raises(hf_prune.ConfigError, match="is no search of hf_prune"):
            search(storage=storage)

    @pytest.mark.parametrize("storage", ["sqlite:////no/such/folder/x.db", "nothing://x", "/proc/hf_prune/log"])
    def test_storages_that_cannot_be_opened(self, storage):
        with pytest.raises(hf_prune.ConfigError, match="Can't open the storage"):
            search(storage=storage)

    def test_errors_leave_the_study_usable(self, tmp_path):
        storage, broken = tmp_path / "log", []

        def error(model):
            if len(broken) == 2 and model.num_parameters() < MODEL.num_parameters():
                broken.append(1)
                raise RuntimeError("out of memory")
            broken.append(1)
            return size_error(model)

        with pytest.raises(RuntimeError, match="out of memory"):
            search(error, storage=storage)
        front = search(error, storage=storage)
        assert len(front.evaluated) >= 6 and hf_prune.current_mask(MODEL) is None
        assert [t.user_attrs["reason"] for t in journal(storage).trials if t.state.name == "FAIL"] == [
            "RuntimeError('out of memory')"
        ]

    def test_an_interrupted_sub_network_comes_again(self, tmp_path):
        storage, calls = tmp_path / "log", []

        def error(model):
            calls.append(model.num_parameters())
            if len(calls) == 5:
                raise KeyboardInterrupt
            return size_error(model)

        with pytest.raises(KeyboardInterrupt):
            search(error, storage=storage, method="random")
        front = search(error, storage=storage, method="random")
        assert calls[5] == calls[4]  # it comes first
        assert members(front) == members(search(method="random"))

    def test_a_killed_worker(self, tmp_path):
        script = """
import os, sys
from test_search import MODEL, SPACE, search, size_error
calls = []
def error(model):
    calls.append(model.num_parameters())
    if len(calls) == 5:
        os._exit(9)
    return size_error(model)
search(error, storage=sys.argv[1], method="random")
"""
        here = Path(__file__).parent
        env = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
        done = subprocess.run([sys.executable, "-c", script, tmp_path / "log"], env=env, capture_output=True)
        assert done.returncode == 9, done.stderr[-2000:]
        states = [trial.state.name for trial in journal(tmp_path / "log").trials]
        assert states == ["COMPLETE"] * 4 + ["RUNNING"]
        calls = []

        def error(model):
            calls.append(1)
            return size_error(model)

        front = search(error, storage=tmp_path / "log", method="random")
        assert len(calls) == 4  # of 8, with the one that was lost
        assert members(front) == members(search(method="random"))
        assert "RUNNING" not in [trial.state.name for trial in journal(tmp_path / "log").trials]

    def study(self, storage, **options):
        options = {"method": "random", "seed": 0, "name": "x", **options}
        return SearchStudy(SPACE, {"space": SPACE.describe()}, storage=storage, **options)

    def first(self, study, count=4):
        """The members that a study asks for, each told at once."""
        samples = []
        for _ in range(count):
            samples.append(study.ask())
            study.tell(samples[-1], 0.5, 0.5)
        return [sample.member for sample in samples]

    def test_a_worker_killed_before_its_mark(self, tmp_path):
        lost = self.study(tmp_path / "log")
        lost._study.ask(lost._distributions)
        assert SPACE.largest in self.first(self.study(tmp_path / "log"))
        trial = lost._study.trials[0]
        assert trial.state.name == "RUNNING"  # it may still be between the two
        trial.datetime_start -= datetime.timedelta(minutes=2)
        assert not hf_prune.search.study._is_alive(trial)

    @pytest.mark.parametrize("shift", [100, -100])
    def test_another_process_of_the_same_number(self, tmp_path, shift):
        before = self.study(tmp_path / "log")
        sample = before.ask()
        assert before._study.trials[0].user_attrs["worker"][:2] == [socket.gethostname(), os.getpid()]
        alive = self.study(tmp_path / "log")
        assert SPACE.largest not in self.first(alive, 1)  # the worker is this process
        host, process, start = before._study.trials[0].user_attrs["worker"]
        before._trials[sample.number].set_user_attr("worker", (host, process, start + shift))
        assert SPACE.largest in self.first(self.study(tmp_path / "log"))

    def test_two_workers_give_the_same_trial_back(self, tmp_path, monkeypatch):
        lost = self.study(tmp_path / "log")
        lost._trials[lost.ask().number].set_user_attr("worker", (socket.gethostname(), 2**22 + 1, 0.0))
        tell = optuna.Study.tell

        def late(study, number, **options):  # the other one is faster
            monkeypatch.setattr(optuna.Study, "tell", tell)
            self.study(tmp_path / "log")
            return tell(study, number, **options)

        monkeypatch.setattr(optuna.Study, "tell", late)
        found = self.first(self.study(tmp_path / "log"), 5)
        assert found.count(SPACE.largest) == 1

    def test_two_workers_with_the_same_trial(self, tmp_path, monkeypatch):
        one, two = (self.study(tmp_path / "log", pruner=optuna.pruners.NopPruner()) for _ in range(2))
        sample = one.ask()
        two._trials[sample.number] = optuna.Trial(two._study, one._trials[sample.number]._trial_id)
        one.tell(sample, 0.5, 0.5)
        finished = two._trials[sample.number]
        two.report(sample, 1, 0.7, 0.5)
        two.tell(sample, 0.7, 0.5)
        assert two.evaluated() == one.evaluated() == [(SPACE.largest, 0.5)]
        ask = optuna.Study.ask

        def same(study, distributions):
            monkeypatch.setattr(optuna.Study, "ask", ask)
            return finished

        monkeypatch.setattr(optuna.Study, "ask", same)
        assert two.ask().member == SPACE.smallest

    def test_a_worker_that_starts_at_the_same_moment(self, tmp_path, monkeypatch):
        trials = optuna.Study.get_trials

        def late(study, **options):  # another one creates the study between two reads of this one
            monkeypatch.setattr(optuna.Study, "get_trials", trials)
            self.study(tmp_path / "log")
            return trials(study, **options)

        monkeypatch.setattr(optuna.Study, "get_trials", late)
        assert self.first(self.study(tmp_path / "log"), 3) == [SPACE.largest, SPACE.smallest, SPACE.middle]

    @pytest.mark.parametrize("cut", [1, 20])
    def test_a_journal_that_was_cut(self, tmp_path, caplog, cut):
        path = tmp_path / "log"
        self.first(self.study(path))
        path.write_bytes(path.read_bytes()[:-cut])
        logging.getLogger("hf_prune").propagate = True
        with caplog.at_level(logging.WARNING):
            assert len(self.study(path)) == 3  # the last one was not told
        assert "The last line of" in caplog.text
        self.first(self.study(path), 2)
        caplog.clear()
        assert len(self.study(path)) == 5 and "incomplete" not in caplog.text

    @pytest.mark.parametrize("kind", ["sqlite", "journal"])
    def test_workers_at_the_same_time(self, tmp_path, kind):
        script = """
import os, sys, time
import hf_prune.search.study
from test_search import search, size_error
open(sys.argv[2] + f"/ready-{os.getpid()}", "w").close()
while len([name for name in os.listdir(sys.argv[2]) if name.startswith("ready")]) < 2:
    time.sleep(0.01)
front = search(size_error, storage=sys.argv[1], method="random", num_samples=12, seed=int(sys.argv[3]))
print(len(front.evaluated))
"""
        storage = f"sqlite:///{tmp_path}/search.db" if kind == "sqlite" else str(tmp_path / "log")
        here = Path(__file__).parent
        env = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", script, storage, tmp_path, str(seed)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for seed in (1, 2)
        ]
        for worker in workers:
            _, errors = worker.communicate(timeout=600)
            assert worker.returncode == 0, errors[-3000:]
        calls = []
        front = search(lambda model: calls.append(1) or size_error(model), storage=storage, num_samples=12)
        assert not calls and {tuple(m.values()) for m in members(front)} >= {
            tuple(m.values()) for m in (SPACE.largest, SPACE.smallest, SPACE.middle)
        }

    def test_workers_share_a_study(self, tmp_path):
        identity = {"space": SPACE.describe()}
        workers = [
            SearchStudy(SPACE, identity, method="random", seed=seed, storage=tmp_path / "log", name="shared")
            for seed in (1, 2)
        ]
        for _ in range(6):  # both are at work at the same time
            samples = [worker.ask() for worker in workers]
            assert samples[0].number != samples[1].number and samples[0].member != samples[1].member
            for worker, sample in zip(workers, samples, strict=True):
                worker.tell(sample, 0.5, 0.5)
        assert [len(worker) for worker in workers] == [12, 12]
        assert workers[0].evaluated() == workers[1].evaluated()
        found = [member for member, _ in workers[0].evaluated()]
        assert found[:3] == [SPACE.largest, SPACE.smallest, SPACE.middle]


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


class TestStandardNAS:
    def trainer(self, tmp_path, steps=8, **options):
        rows = [{key: value[i] for key, value in batch.items()} for batch in DATA for i in range(8)]
        made = []

        def make(model):
            args = TrainingArguments(
                str(tmp_path / "out"),
                max_steps=steps,
                per_device_train_batch_size=4,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                **{"eval_strategy": "steps", "eval_steps": 2, **options},
            )
            made.append(
                Trainer(
                    model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics_for(Accuracy())
                )
            )
            return made[-1]

        return make, made

    def test_trains_each_and_gives_up_early(self, tmp_path):
        make, made = self.trainer(tmp_path)
        front = hf_prune.standard_nas(
            MODEL, SPACE, make, metric="eval_accuracy", greater_is_better=True, num_samples=8, method="random"
        )
        assert len(made) == 8
        steps = [trainer.state.global_step for trainer in made]
        assert steps[0] == 8 and min(steps) < 8  # the first has nothing to be compared with, some are given up
        assert len(front.evaluated) == sum(step == 8 for step in steps)
        ends = {t.model.num_parameters(): t.state.log_history[-2]["eval_accuracy"] for t in made}
        for point in front.evaluated:
            assert point.error == pytest.approx(1 - ends[int(point.costs["params"])])
        # Each was trained from the weights of the model, which stays as it was.
        assert torch.equal(MODEL.classifier.weight, tiny_model("bert").classifier.weight)

    def test_goes_on(self, tmp_path):
        make, made = self.trainer(tmp_path, steps=2)
        options = {"storage": tmp_path / "log", "pruner": optuna.pruners.NopPruner()}
        hf_prune.standard_nas(MODEL, SPACE, make, num_samples=2, **options)
        front = hf_prune.standard_nas(MODEL, SPACE, make, num_samples=4, **options)
        assert len(made) == len(front.evaluated) == 4
        with pytest.raises(hf_prune.ConfigError, match="another metric"):
            hf_prune.standard_nas(MODEL, SPACE, make, metric="eval_accuracy", **options)

    def test_wrong_calls(self, tmp_path):
        make, _ = self.trainer(tmp_path, steps=1, eval_strategy="no")
        with pytest.raises(hf_prune.ConfigError, match="did not evaluate"):
            hf_prune.standard_nas(MODEL, SPACE, make)
        make, _ = self.trainer(tmp_path, steps=2)
        with pytest.raises(hf_prune.ConfigError, match="Unknown metric 'accuracy'. .*eval_accuracy"):
            hf_prune.standard_nas(MODEL, SPACE, make, metric="accuracy")

    def test_evaluations_of_something_else(self, tmp_path):
        make, made = self.trainer(tmp_path, steps=2)

        def several(model):
            trainer = make(model)
            trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
            return trainer

        front = hf_prune.standard_nas(MODEL, SPACE, several, metric="eval_a_loss", num_samples=1)
        (loss,) = [row["eval_a_loss"] for row in made[0].state.log_history if "eval_a_loss" in row]
        assert [point.error for point in front.evaluated] == [loss]

        def pruning(model):
            stock = make(model)
            args = hf_prune.PruningTrainingArguments(**stock.args.to_dict())
            return hf_prune.PruningTrainer(
                model, args, train_dataset=stock.train_dataset, eval_dataset=stock.eval_dataset
            )

        assert len(hf_prune.standard_nas(MODEL, SPACE, pruning, num_samples=1).evaluated) == 1

    def test_all_are_given_up(self, tmp_path):
        class Prune(optuna.pruners.BasePruner):
            def prune(self, study, trial):
                return True

        make, _ = self.trainer(tmp_path, steps=4)
        with pytest.raises(hf_prune.ConfigError, match="The pruner gave all 2 sub-networks up early"):
            hf_prune.standard_nas(MODEL, SPACE, make, num_samples=2, pruner=Prune())

    def test_trained_sub_networks_are_not_kept(self, tmp_path):
        make, _ = self.trainer(tmp_path, steps=2)
        front = hf_prune.standard_nas(MODEL, SPACE, make, num_samples=1)
        with pytest.raises(hf_prune.ConfigError, match="were not kept"):
            front.save_models(tmp_path / "front", MODEL)
        assert not (tmp_path / "front").exists() and not front.report(0, MODEL).evaluation


@pytest.mark.slow
def test_the_example(reader):
    root = Path(__file__).parents[1]
    options = "--model bert-sst2 --train_file train.jsonl --test_file train.jsonl --text_column text --max_steps 6"
    options += " --samples 8 --params 0.7 --output_dir out --report_to none --save_strategy no"
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, root / "examples" / "nas_glue.py", *options.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "evaluated sub-networks are on the front" in done.stdout and "Saved to out." in done.stdout
    front = hf_prune.ParetoFront.load("out")
    model = AutoModelForSequenceClassification.from_pretrained("out/model")
    assert model.num_parameters() == front[front.select({"params": 0.7})].costs["params"]
    assert Path("out/front.png").exists() and hf_prune.PruningReport.load("out/model").method == "nas"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [("--params 0.01", "nearest feasible budget"), ("--method grid", "Unknown search method 'grid'")],
)
def test_the_example_refuses_before_training(reader, options, message):
    options += " --model bert-sst2 --train_file train.jsonl --test_file train.jsonl --text_column text"
    options += " --output_dir out --report_to none"
    root = Path(__file__).parents[1]
    command = [sys.executable, root / "examples" / "nas_glue.py", *options.split()]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and not Path("out/supernet").exists()
