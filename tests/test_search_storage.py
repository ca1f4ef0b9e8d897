"""The studies that a search keeps: they go on, survive their workers, and are shared."""

import datetime
import logging
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import optuna
import pytest
from searches import DATA, MODEL, SPACE, journal, members, search, size_error
from tiny import tiny_batch, tiny_model

import hf_prune
from hf_prune.metrics import Accuracy, compute_metrics_for
from hf_prune.search.study import METHODS, SearchStudy


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
from searches import MODEL, SPACE, search, size_error
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
from searches import search, size_error
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
