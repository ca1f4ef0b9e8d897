import json
import math
import socket
import sys

import datasets
import evaluate
import numpy as np
import pytest
import torch
from folders import tokenizer
from pruned import shrunk
from tiny import tiny_batch, tiny_model
from transformers import AutoModelForCausalLM, EvalPrediction

import hf_prune
from hf_prune import save_pretrained
from hf_prune.errors import CalibrationError, ConfigError, PruningError, UnsupportedModelError
from hf_prune.evaluation import Evaluator
from hf_prune.metrics import (
    F1,
    Accuracy,
    Matthews,
    Perplexity,
    Spearman,
    compute_metrics_for,
    estimate_perplexity,
    lm_eval,
    perplexity,
)


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


class Letters:
    """A tokenizer: one token a character."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) % 90 + 3 for letter in text]}


TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. " * 2


class TestPerplexity:
    def ids(self, text=TEXT):
        return torch.tensor(Letters()(text)["input_ids"])

    @pytest.mark.parametrize("window, stride", [(16, 16), (16, 5), (16, 1), (17, 4), (64, 64), (2, 2), (2, 1)])
    def test_a_loop_over_tokens_finds_the_same(self, window, stride):
        model, ids = tiny_model("llama"), self.ids()
        losses = []
        for token in range(1, len(ids)):
            begin = max(0, -(-(token + 1 - window) // stride)) * stride  # of the first window with this token
            if token > begin:
                with torch.no_grad():
                    logits = model(ids[None, begin:token]).logits[0, -1]
                losses.append(-logits.log_softmax(-1)[ids[token]].item())
        expected = math.exp(sum(losses) / len(losses))
        assert len(losses) == len(ids) - (1 if stride < window else -(-len(ids) // window))
        assert perplexity(model, Letters(), [TEXT], window=window, stride=stride) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_windows_that_do_not_overlap_are_averaged(self, name):
        model, windows = tiny_model(name), self.ids()[:128].view(4, 32)
        with torch.no_grad():
            losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
        found = perplexity(model.train(), Letters(), [TEXT], window=32, max_tokens=128)
        assert found == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5) and model.training

    @pytest.mark.parametrize(
        ("window", "stride", "tokens"), [(16, 16, 160), (16, 16, 165), (16, 5, 100), (80, 80, 160)]
    )
    def test_an_interval_over_windows(self, window, stride, tokens):
        model, ids = tiny_model("llama", max_position_embeddings=80), self.ids()[:tokens]
        sums, counts, end = [], [], 0
        for begin in range(0, len(ids), stride):
            part = ids[begin : begin + window]
            with torch.no_grad():
                losses = -model(part[None]).logits[0, :-1].log_softmax(-1)[range(len(part) - 1), part[1:]]
            losses = losses[max(end - begin - 1, 0) :].double()
            if len(losses):
                sums.append(losses.sum().item())
                counts.append(len(losses))
            if (end := begin + len(part)) == len(ids):
                break
        found = estimate_perplexity(model, Letters(), [TEXT], window=window, stride=stride, max_tokens=tokens)
        k, mean = len(sums), sum(sums) / sum(counts)
        assert (found.n, found.windows) == (sum(counts), k)
        assert found.value == perplexity(model, Letters(), [TEXT], window=window, stride=stride, max_tokens=tokens)
        assert found.value == pytest.approx(math.exp(mean), rel=1e-5)
        # Student's quantiles as tables have them.
        t = {10: 2.262157, 11: 2.228139, 2: 12.706205, 18: 2.109816}[k]
        spread = sum((a - mean * n) ** 2 for a, n in zip(sums, counts, strict=True)) / (k - 1)
        half = t * math.sqrt(k * spread) / sum(counts)
        assert found.interval == pytest.approx((math.exp(mean - half), math.exp(mean + half)), rel=1e-4)
        if len(set(counts)) == 1:  # then it is the textbook's
            deviation = np.std(np.array(sums) / counts[0], ddof=1)
            assert half == pytest.approx(t * deviation / math.sqrt(k))

    def test_no_interval_of_one_window_or_infinity(self):
        model = tiny_model("llama")
        assert estimate_perplexity(model, Letters(), [TEXT], window=64, max_tokens=64).interval is None
        model.lm_head.weight.data *= 1e6
        assert estimate_perplexity(model, Letters(), [TEXT], window=16).interval is None

    def test_texts_of_any_kind(self, tmp_path):
        model, texts = tiny_model("llama"), [TEXT[:70], TEXT[70:]]
        (tmp_path / "text.txt").write_text("\n\n".join(texts))
        column = datasets.Dataset.from_dict({"text": texts})["text"]
        sources = [str(tmp_path / "text.txt"), tmp_path / "text.txt", texts, column, (text for text in texts)]
        results = {perplexity(model, Letters(), source, window=32) for source in sources}
        metric = Perplexity()
        metric.add_batch(predictions=texts[:1])
        metric.add_batch(predictions=texts[1:])
        results |= set(metric.compute(model=model, tokenizer=Letters(), window=32).values())
        assert len(results) == 1

    def test_a_path_is_no_list_of_texts(self, tmp_path):
        (tmp_path / "text.txt").write_text(TEXT)
        with pytest.raises(ConfigError, match="give a list of texts.*perplexity\\(model, tokenizer, path\\)"):
            Perplexity().compute(
                predictions=str(tmp_path / "text.txt"), model=tiny_model("llama"), tokenizer=Letters()
            )

    def test_a_wrecked_model_is_infinitely_perplexed(self):
        model = tiny_model("llama")
        model.lm_head.weight.data *= 1e6
        assert perplexity(model, Letters(), [TEXT], window=64) == float("inf")

    def test_bfloat16(self):
        model = tiny_model("llama")
        exact = perplexity(model, Letters(), [TEXT], window=64)
        assert perplexity(model.bfloat16(), Letters(), [TEXT], window=64) == pytest.approx(exact, rel=0.1)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"window": 65}, "window must be a whole number from 2 to 64, got 65"),
            ({"window": 1}, "window must be"),
            ({"window": 8, "stride": 9}, "stride must be a whole number from 1 to 8"),
            ({"window": 8, "stride": 0}, "stride must be"),
            ({"window": 8, "max_tokens": 1}, "max_tokens must be a whole number at least 2"),
        ],
    )
    def test_options_out_of_range(self, options, message):
        with pytest.raises(ConfigError, match=message):
            perplexity(tiny_model("llama"), Letters(), [TEXT], **options)

    def test_texts_and_models_without_one(self, tmp_path):
        model = tiny_model("llama")
        for texts, message in (
            (tmp_path / "missing.txt", "is no text file"),
            (TEXT * 20, "is no text file"),
            ([], "0 tokens"),
            (["x"], "1 tokens"),
        ):
            with pytest.raises(CalibrationError, match=message):
                perplexity(model, Letters(), texts, window=8)
        for name in ("bert", "t5"):
            with pytest.raises(UnsupportedModelError, match="causal language models"):
                perplexity(tiny_model(name), Letters(), [TEXT], window=8)


class TestLmEval:
    """The harness on a task of our own, with local data."""

    @pytest.fixture
    def tasks(self, tmp_path):
        pytest.importorskip("lm_eval")
        rows = [{"question": "good very", "choices": ["good", "bad"], "label": n % 2} for n in range(4)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        folder = tmp_path / "tasks"
        folder.mkdir()
        (folder / "choice.yaml").write_text(
            f"""
task: choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "rows.jsonl"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
"""
        )
        return folder

    def test_a_pruned_checkpoint_runs_unchanged(self, tasks, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        model = shrunk("llama")
        save_pretrained(model, tmp_path / "model")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        words = tokenizer()
        words.eos_token = "[SEP]"
        found = lm_eval(again, words, ["choice"], include_path=tasks, batch_size=2)
        assert found["choice"]["acc"] == 0.5  # the four questions are one, with both answers
        assert lm_eval(again, words, ["choice"], include_path=tasks, limit=1)["choice"]["acc"] in (0, 1)
        with pytest.raises(ConfigError, match="Did you mean 'choice'"):
            lm_eval(again, words, ["choise"], include_path=tasks)

    def test_without_the_harness(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(ConfigError, match=r"pip install \"hf_prune\[eval\]\""):
            lm_eval(tiny_model("llama"), tokenizer(), ["choice"])


def test_metrics_without_their_packages_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "hf_prune.metrics")
    monkeypatch.delattr(hf_prune, "metrics")
    with pytest.raises(PruningError, match=r"evaluate: pip install 'hf_prune\[examples\]'"):
        Evaluator(hf_prune.Calibrator(tiny_model("bert"), [tiny_batch("bert", labels=True)], labels=True), "accuracy")
