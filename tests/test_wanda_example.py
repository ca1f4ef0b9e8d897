"""The example that zeroes weights of a language model, on a tiny one and text files."""

import runpy
import sys
from pathlib import Path

import pytest
import transformers as T
from folders import tokenizer
from tiny import tiny_model

import hf_prune

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = {
    "wanda": ["--ratios", "owl", "--recover", "2", "--compressed"],
    "sparsegpt": ["--pattern", "2:4"],
}


def run(monkeypatch, capfd, *arguments):
    """The rows of the table that the example prints."""
    monkeypatch.setattr(sys, "argv", ["wanda_smollm.py", *map(str, arguments)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "wanda_smollm.py"), run_name="__main__")
    cells = [line.strip("| ").split(" | ") for line in capfd.readouterr().out.splitlines() if line.count("|") == 3]
    return dict(row for row in cells if len(row) == 2)


@pytest.mark.parametrize("method", METHODS)
def test_it_prunes_saves_and_reloads(method, tmp_path, monkeypatch, capfd):
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("good bad very film film good very bad good film " * 120)
    files = {"--model": "model", "--train": "text.txt", "--valid": "text.txt", "--output_dir": "out"}
    given = [part for name, file in files.items() for part in (name, tmp_path / file)]
    sizes = ["--samples", 4, "--length", 64, "--eval_tokens", 1197, "--cache_dir", tmp_path / "cache"]
    rows = run(monkeypatch, capfd, "--method", method, *METHODS[method], *given, *sizes)
    assert ("recovered" in rows) == (method == "wanda")
    assert rows["reloaded"] == rows.get("recovered", rows["pruned"]) != rows["dense"]
    mask = hf_prune.WeightMask.load(tmp_path / "out")
    mask.check(T.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert mask.sparsity() == pytest.approx(0.5, abs=0.03)
    report = hf_prune.PruningReport.load(tmp_path / "out")
    assert report.method == method
    (row,) = report.evaluation
    assert (f"{row['before']:.2f}", f"{row['after']:.2f}") == (rows["dense"], rows["reloaded"])
    assert (row["n"], row["windows"]) == (1197 - 2, 2) and row["interval_before"][0] < row["before"]


@pytest.mark.slow
def test_smollm_from_its_package(tmp_path, monkeypatch, capfd):
    pytest.importorskip("gguf")
    sizes = ["--samples", 4, "--length", 128, "--eval_tokens", 512, "--compressed"]
    rows = run(monkeypatch, capfd, *sizes, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out")
    assert 5 < float(rows["dense"]) < float(rows["pruned"]) < 500 and rows["reloaded"] == rows["pruned"]
    assert (tmp_path / "out/model.safetensors").stat().st_size < 0.7 * 538e6
