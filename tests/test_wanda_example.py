"""The example that zeroes weights of a language model, on a tiny one and text files."""

import runpy
import sys
from pathlib import Path

import pytest
import transformers as T
from test_saving import tokenizer
from tiny import tiny_model

import hf_prune

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = {
    "wanda": ["--ratios", "owl", "--recover", "2", "--compressed"],
    "sparsegpt": ["--pattern", "2:4"],
}


@pytest.mark.parametrize("method", METHODS)
def test_it_prunes_saves_and_reloads(method, tmp_path, monkeypatch, capsys):
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("good bad very film film good very bad good film " * 60)
    files = {"--model": "model", "--train": "text.txt", "--valid": "text.txt", "--output_dir": "out"}
    given = [part for name, file in files.items() for part in (name, str(tmp_path / file))]
    sizes = ["--samples", "4", "--length", "64", "--eval_tokens", "200", "--cache_dir", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", ["wanda_smollm.py", "--method", method, *METHODS[method], *given, *sizes])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "wanda_smollm.py"), run_name="__main__")
    cells = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.count("|") == 3]
    rows = dict(row for row in cells if len(row) == 2)
    assert ("recovered" in rows) == (method == "wanda")
    assert rows["reloaded"] == rows.get("recovered", rows["pruned"]) != rows["dense"]
    mask = hf_prune.WeightMask.load(tmp_path / "out")
    mask.check(T.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert mask.sparsity() == pytest.approx(0.5, abs=0.03)
    assert hf_prune.PruningReport.load(tmp_path / "out").method == method
