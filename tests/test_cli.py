"""The command line as a whole: its processes, how it fails, and what it loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from folders import save_tiny

import hf_prune
from hf_prune.cli import loading, main

ROOT = Path(hf_prune.__file__).parents[1]


class TestProcess:
    def run(self, *argv: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHONPATH": str(Path(hf_prune.__file__).parents[1])}
        return subprocess.run([sys.executable, "-m", "hf_prune", *argv], capture_output=True, text=True, env=env)

    def test_help(self):
        done = self.run("--help")
        assert done.returncode == 0 and done.stderr == ""
        for word in ("inspect", "prune", "bench", "examples:", "exit codes:"):
            assert word in done.stdout

    def test_inspect(self, dense):
        done = self.run("inspect", dense, "--json")
        assert done.returncode == 0
        assert json.loads(done.stdout)["class"] == "BertForSequenceClassification"

    def test_help_imports_no_torch(self):
        code = (
            "import hf_prune.cli, sys\ntry: hf_prune.cli.main(['--help'])\nfinally: sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and "examples:" in done.stdout


class TestErrors:
    @pytest.mark.parametrize("command", ["inspect", "bench", "prune"])
    def test_no_such_model(self, run, tmp_path, command):
        options = ["--method", "random", "--budget", "macs=0.5", "--output", tmp_path / "out"]
        code, out, err = run(command, tmp_path / "nothing", *(options if command == "prune" else []))
        assert code == (2 if command == "prune" else 1) and out == ""
        assert "error: There is no folder" in err and "Traceback" not in err

    def test_a_folder_without_a_model(self, run, tmp_path):
        code, out, err = run("inspect", tmp_path)
        assert (code, out) == (1, "") and err.startswith("hf-prune: error: Can't load the model")
        code, out, err = run("bench", tmp_path)
        assert (code, out) == (1, "") and "has no config.json" in err

    def test_broken_weights(self, run, tmp_path):
        folder = save_tiny(tmp_path, tokenizer=False)
        (tmp_path / "model.safetensors").write_bytes(b"nothing")
        code, out, err = run("inspect", folder)
        assert (code, out) == (1, "") and "hf-prune: error: Can't load the model" in err and "Traceback" not in err

    def test_unknown_family(self, run, tmp_path):
        config = transformers.MobileBertConfig(num_hidden_layers=1, vocab_size=9, hidden_size=8, embedding_size=8)
        transformers.MobileBertModel(config).save_pretrained(tmp_path)
        code, out, err = run("inspect", tmp_path)
        assert (code, out) == (1, "") and "hf-prune: error: Unknown model_type 'mobilebert'" in err

    def test_infeasible_budget(self, run, dense, tmp_path):
        argv = ["--method", "random", "--budget", "macs=0.001", "--output", tmp_path / "out"]
        code, out, err = run("prune", dense, *argv)
        assert (code, out) == (1, "") and "nearest feasible budget {'macs': " in err
        assert not (tmp_path / "out").exists()

    def test_exclude_that_matches_nothing(self, run, dense, tmp_path):
        argv = ["--method", "random", "--budget", "macs=0.9", "--exclude", "layer.9.*", "--output", tmp_path / "out"]
        code, _, err = run("prune", dense, *argv)
        assert code == 1 and "Unknown pattern in exclude 'layer.9.*'" in err

    @pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that nobody can write to")
    def test_a_folder_that_cannot_be_written(self, run, dense):
        argv = ["--method", "random", "--budget", "macs=0.9", "--output", "/proc/hf_prune/out"]
        code, out, err = run("prune", dense, *argv)
        assert (code, out) == (1, "") and "hf-prune: error: Can't write beside" in err

    def test_debug_shows_the_traceback(self, run, tmp_path):
        code, out, err = run("inspect", tmp_path, "--debug")
        assert (code, out) == (1, "") and "Traceback" in err and "ValueError" in err
        assert err.splitlines()[-1].startswith("hf-prune: error: Can't load the model")

    def test_interrupt(self, run, dense, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("hf_prune.cli.inspect.load_model", interrupted)
        assert run("inspect", dense) == (130, "", "hf-prune: interrupted\n")

    def test_what_libraries_print_is_no_result(self, run, dense, monkeypatch):
        def load_model(*args):
            print("loading")
            return loading.load_model(*args)

        monkeypatch.setattr("hf_prune.cli.inspect.load_model", load_model)
        _, out, err = run("inspect", dense, "--json")
        assert json.loads(out) and "loading\n" in err

    def test_errors_of_the_program_are_not_hidden(self, dense, monkeypatch):
        monkeypatch.setattr("hf_prune.cli.inspect.load_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["inspect", dense])


class TestLoading:
    @pytest.mark.parametrize("name", ["/no/model", "./model", "../model", "out/models/bert", "~/no-such-model"])
    def test_paths_are_not_looked_up_on_the_hub(self, name):
        with pytest.raises(hf_prune.ConfigError, match="There is no folder"):
            loading.resolve(name)

    @pytest.mark.parametrize("name", ["bert-base-uncased", "google-bert/bert-base-uncased"])
    def test_ids(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert loading.resolve(name) == name

    def test_tokenizers_that_transformers_makes_up(self, dense, tmp_path, capsys):
        assert loading.load_processor(dense) is not None
        for family in ("bert", "deberta-v2", "gpt2", "t5", "vit"):
            assert loading.load_processor(save_tiny(tmp_path / family, family, tokenizer=False)) is None
            assert capsys.readouterr().err.count("hf-prune: warning: no tokenizer or processor loads from") == 1
