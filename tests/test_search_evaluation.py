"""How wrong a sub-network is: metrics, losses, and errors that are not finite."""

import logging
import math
import reprlib

import numpy as np
import optuna
import pytest
import torch
from searches import DATA, MODEL, SPACE, journal, members, search, size_error
from tiny import FAMILIES, tiny_batch, tiny_model
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification

import hf_prune
from hf_prune.evaluation import Evaluator
from hf_prune.metrics import Accuracy, Matthews, compute_metrics_for


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
