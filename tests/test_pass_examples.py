"""The examples that prune heads in training, for two steps on tiny data."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import transformers as T
from folders import tokenizer
from tiny import tiny_model

import hf_prune

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch, example, folder, *arguments):
    given = ["--use_cpu", "true", "--max_steps", 2, "--save_strategy", "no", "--output_dir", folder, *arguments]
    monkeypatch.setattr(sys, "argv", [example, *map(str, given)])
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")


def heads(model):
    return sum(group.size for group in hf_prune.prunable_units(model).of_kind("heads"))


def test_a_classifier(tmp_path, monkeypatch, capsys):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"sentence": "good film" if i % 2 else "bad film", "label": i % 2} for i in range(16)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    files = {"--model": "model", "--train_file": "rows.json", "--test_file": "rows.json"}
    data = [part for name, file in files.items() for part in (name, tmp_path / file)]
    run(monkeypatch, "pass_glue.py", tmp_path / "out", *data, "--num_heads", 5)
    assert heads(T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")) == 5
    printed = capsys.readouterr().out
    assert "before: loss" in printed and "after: loss" in printed and "accuracy" in printed


def test_a_translator(tmp_path, monkeypatch):
    pytest.importorskip("sacrebleu")
    (tmp_path / "rows.tsv").write_text("de\ten\n" + "ein guter Film\ta good film\nein Haus\ta house\n" * 8)
    data = ["--train_file", tmp_path / "rows.tsv", "--test_file", tmp_path / "rows.tsv"]
    sizes = ["--vocab_size", 300, "--hidden_size", 32, "--max_length", 16, "--num_heads", 20]
    run(monkeypatch, "pass_translation.py", tmp_path / "out", *data, *sizes, "--eval_strategy", "epoch")
    assert heads(T.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")) == 20
    assert hf_prune.PruningReport.load(tmp_path / "out").facts["metrics"]["after"].keys() == {"loss", "bleu"}
