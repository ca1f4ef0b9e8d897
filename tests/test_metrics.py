import socket

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from hf_prune.errors import ConfigError
from hf_prune.metrics import F1, Accuracy, Matthews, Spearman, compute_metrics_for


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*args):
        raise AssertionError("A metric asked for the network.")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))


PREDICTIONS, REFERENCES = (
    [1, 1, 1, 0, 0, 0, 0, 0],
    [1, 1, 0, 1, 0, 0, 0, 0],
)  # 2 true, 1 false positive, 1 false negative


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (Accuracy(), {"accuracy": 6 / 8}),
        (F1(), {"f1": 2 / 3}),
        (Matthews(), {"matthews_correlation": (2 * 4 - 1 * 1) / (3 * 3 * 5 * 5) ** 0.5}),
    ],
)
def test_classification(metric, expected):
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES) == pytest.approx(expected)
    assert all(type(value) is float for value in metric.compute(predictions=[0, 1], references=[0, 1]).values())


def test_spearman_is_about_ranks():
    assert Spearman().compute(predictions=[0.1, 0.2, 5.0], references=[-1.0, 0.0, 0.5]) == {"spearmanr": 1.0}
    assert Spearman().compute(predictions=[3.5, 2.5, 1.5], references=[1, 2, 3])["spearmanr"] == pytest.approx(-1.0)


def test_f1_of_several_classes():
    f1 = F1().compute(predictions=[0, 1, 2, 2], references=[0, 1, 2, 1], average="macro")
    assert f1["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_batches_add_up():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[1, 1], references=[1, 1])
    assert metric.compute() == {"accuracy": 0.75}


def test_they_combine_with_others():
    combined = evaluate.combine([Accuracy(), F1()])
    assert combined.compute(predictions=[1, 0], references=[1, 0]) == {"accuracy": 1.0, "f1": 1.0}


class TestComputeMetrics:
    def test_the_highest_logit_is_the_class(self):
        logits = np.array([[2.0, -1.0], [0.1, 0.2], [3.0, 1.0]])
        results = compute_metrics_for(Accuracy(), F1())(EvalPrediction(logits, np.array([0, 1, 1])))
        assert results == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3})

    def test_logits_stand_first_in_a_tuple(self):
        outputs = (np.array([[0.0, 1.0], [1.0, 0.0]]), np.zeros((2, 5, 16)))
        assert compute_metrics_for(Accuracy())(EvalPrediction(outputs, np.array([1, 0]))) == {"accuracy": 1.0}

    def test_one_logit_is_the_prediction(self):
        prediction = EvalPrediction(np.array([[0.5], [1.5], [4.0]], dtype=np.float32), np.array([1.0, 2.0, 3.0]))
        assert compute_metrics_for(Spearman())(prediction) == {"spearmanr": 1.0}

    def test_ignored_tokens_dont_count(self):
        logits = np.array([[[1.0, 0.0], [0.0, 1.0], [9.0, 0.0]], [[0.0, 1.0], [9.0, 0.0], [9.0, 0.0]]])
        labels = np.array([[0, 1, -100], [0, -100, -100]])
        assert compute_metrics_for(Accuracy())(EvalPrediction(logits, labels)) == pytest.approx({"accuracy": 2 / 3})

    def test_logits_that_dont_fit_the_labels_are_refused(self):
        with pytest.raises(ConfigError, match=r"shape \(3, 4\) don't fit labels of shape \(3, 4\)"):
            compute_metrics_for(Accuracy())(EvalPrediction(np.zeros((3, 4)), np.zeros((3, 4))))

    def test_no_metric_is_refused(self):
        with pytest.raises(ConfigError, match="at least one metric"):
            compute_metrics_for()
