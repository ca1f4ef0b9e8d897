"""`hf-prune bench`: costs and quality, in a table and as JSON."""

import json
from pathlib import Path

import pytest
import torch
from folders import TEXTS, WORDS, save_tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertTokenizerFast

import hf_prune
from hf_prune import benchmark, model_costs


class TestBench:
    @pytest.fixture(autouse=True)
    def peak(self, monkeypatch):
        """A process for each checkpoint takes seconds; benchmark's own tests start them."""
        monkeypatch.setattr(benchmark, "peak_memory", lambda *_, **__: 10**6)

    @pytest.fixture
    def small(self, tmp_path):
        return save_tiny(tmp_path / "small", tokenizer=False, intermediate_size=16)

    def test_table(self, run, dense, small):
        code, out, err = run(
            "bench", small, "--against", dense, "--repeats", 2, "--sequence-length", 8, "--threads", 2
        )
        assert code == 0
        header, _, *rows = out.splitlines()
        assert header == "|  | dense | small | small vs dense |"
        assert [row.split("|")[1].strip() for row in rows if "latency p50" in row] == [
            "latency p50, batch 1",
            "latency p50, batch 8",
        ]
        assert "CPU, 2 threads" in rows[-1] and "8 tokens" in rows[-1]

    def test_json(self, run, dense, small, tmp_path):
        twin = save_tiny(tmp_path / "other" / "dense", tokenizer=False)
        argv = ["--batch-size", 2, 3, "--repeats", 1, "--sequence-length", 8, "--json"]
        code, out, _ = run("bench", dense, twin, small, *argv)
        rows = json.loads(out)
        assert code == 0
        assert [row["name"] for row in rows] == [dense, twin, small]  # folders of one name keep their paths
        model = AutoModelForSequenceClassification.from_pretrained(small)
        assert rows[2]["parameters"] == model.num_parameters()
        assert rows[2]["macs"] == model_costs(model, sequence_length=8).macs
        assert [run["batch_size"] for run in rows[2]["latency"]] == [2, 3]

    def test_quality(self, run, dense, tmp_path):
        valid = tmp_path / "valid.tsv"
        valid.write_text("text\tlabel\n" + "".join(f"{text}\t{n % 2}\n" for n, text in enumerate(TEXTS)))
        small = save_tiny(tmp_path / "small", intermediate_size=16)
        argv = ["--repeats", 1, "--batch-size", 1, "--sequence-length", 8, "--dataset", valid]
        code, out, _ = run("bench", small, "--against", dense, *argv, "--json")
        rows = json.loads(out)
        assert code == 0
        for row, folder in zip(rows, (dense, small), strict=True):
            model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
            tokens = BertTokenizerFast.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
            right = model(**tokens).logits.argmax(-1) == torch.arange(len(TEXTS)) % 2
            assert row["scores"] == {"accuracy": pytest.approx(right.float().mean().item())}
            assert row["scored_on"]["samples"] == len(TEXTS) and row["scored_on"]["dataset"] == "valid.tsv"
        code, out, _ = run("bench", small, "--against", dense, *argv, "--metric", "f1", "--max-samples", 3)
        assert code == 0 and out.splitlines()[2].startswith("| f1 |")

        folder = tmp_path / "pruned"
        assert run("prune", dense, "--method", "magnitude", "--budget", "macs=0.9", "--output", folder)[0] == 0
        (tmp_path / "bench.json").write_text(json.dumps(rows))
        assert run("card", folder, "--bench", tmp_path / "bench.json")[0] == 0
        (row,) = hf_prune.PruningReport.load(folder).evaluation
        assert (row["before"], row["after"]) == tuple(row["scores"]["accuracy"] for row in rows)
        assert (row["n"], row["dataset"]) == (len(TEXTS), "valid.tsv")

    def test_perplexity_of_plain_text(self, run, texts, tmp_path):
        model = save_tiny(tmp_path / "gpt", "gpt2", vocab_size=5 + len(WORDS))
        argv = ["--repeats", 1, "--batch-size", 1, "--sequence-length", 8, "--dataset", texts, "--max-length", 16]
        folder = tmp_path / "pruned"
        assert run("prune", model, "--method", "magnitude", "--budget", "macs=0.9", "--output", folder)[0] == 0
        code, out, _ = run("bench", folder, "--against", model, *argv, "--metric", "perplexity", "--json")
        assert code == 0
        tokenizer = BertTokenizerFast.from_pretrained(model)
        dense, pruned = (
            hf_prune.metrics.estimate_perplexity(
                AutoModelForCausalLM.from_pretrained(path), tokenizer, TEXTS, window=16
            )
            for path in (model, folder)
        )
        rows = json.loads(out)
        assert [row["scores"] for row in rows] == [{"perplexity": pytest.approx(x.value)} for x in (dense, pruned)]
        about = {"dataset": Path(texts).name, "samples": len(TEXTS), "predicted": dense.n, "windows": dense.windows}
        assert rows[1]["scored_on"] == about and dense.windows > 1

        (tmp_path / "bench.json").write_text(out)
        assert run("card", folder, "--bench", tmp_path / "bench.json")[0] == 0
        (row,) = hf_prune.PruningReport.load(folder).evaluation
        assert (row["n"], row["windows"]) == (dense.n, dense.windows)
        assert row["interval_before"] == pytest.approx(dense.interval)
        assert row["interval_after"] == pytest.approx(pruned.interval)
        assert f"perplexity (n = {dense.n:,} tokens in {dense.windows} windows)" in (folder / "README.md").read_text()

    def test_quality_without_labels(self, run, dense, texts):
        code, out, err = run("bench", dense, "--dataset", texts)
        assert (code, out) == (1, "") and "labels" in err

    def test_models_of_the_hub_are_downloaded(self, run, small, monkeypatch):
        asked = []

        def snapshot_download(name, **options):
            asked.append((name, options))
            return small

        monkeypatch.setattr("hf_prune.cli.bench.snapshot_download", snapshot_download)
        code, out, _ = run("bench", "me/bert-60", "--repeats", 1, "--batch-size", 1, "--sequence-length", 8)
        assert code == 0 and out.startswith("|  | bert-60 |")
        assert asked[0][0] == "me/bert-60" and not {"*.bin", "*.pt", "*.onnx"} & {*asked[0][1]["allow_patterns"]}

    def test_too_long_for_the_model(self, run, dense):
        code, out, err = run("bench", dense, "--sequence-length", 65)
        assert (code, out) == (1, "") and "has no room for sequence_length=65" in err

    def test_failure_in_the_fresh_process(self, run, dense, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("Measuring the memory failed")

        monkeypatch.setattr(benchmark, "peak_memory", fail)
        code, out, err = run("bench", dense, "--repeats", 1, "--batch-size", 1, "--sequence-length", 8)
        assert (code, out) == (1, "") and "hf-prune: error: Can't measure" in err and "memory failed" in err
