"""`hf-prune prune`: what it writes and prints is what the library does."""

import json

import pytest
import torch
from folders import TEXTS, save_tiny
from tiny import parameters_as_time
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hf_prune
from hf_prune import benchmark, model_costs


def mask_of(folder) -> hf_prune.PruningMask:
    return hf_prune.PruningMask.load(folder)


class TestPrune:
    def test_report_reload_and_what_goes_where(self, run, dense, texts, tmp_path):
        out_dir = tmp_path / "out"
        argv = ["--method", "kcm", "--budget", "macs=0.9", "--dataset", texts, "--batch-size", "5"]
        code, out, err = run("prune", dense, *argv, "--output", out_dir)
        assert code == 0
        report = hf_prune.PruningReport.load(out_dir)
        assert out.startswith(
            f"{report}\nSaved to {out_dir}. This checkpoint loads with from_pretrained after `import hf_prune`."
        )
        assert "kcm: MACs" not in err and "Traceback" not in err
        # The snippet that is printed works.
        scope: dict = {}
        exec("\n".join(line.strip() for line in out.splitlines() if line.startswith("    ")), scope)
        assert type(scope["model"]).__name__ == "BertForSequenceClassification"
        assert AutoTokenizer.from_pretrained(out_dir)(TEXTS[0]) == AutoTokenizer.from_pretrained(dense)(TEXTS[0])

    def test_same_as_the_library(self, run, dense, texts, tmp_path):
        argv = ["--method", "kcm", "--budget", "macs=0.9", "--budget", "params=0.95", "--dataset", texts]
        argv += ["--set", "r2=iterated", "--set", "recover=scale", "--set", "sigma=0.5", "--set", "max_iterations=3"]
        argv += ["--multiple-of", 8, "--exclude", "encoder.layer.0.*", "--max-samples", 20, "--max-length", 6]
        code, out, _ = run("prune", dense, *argv, "--output", tmp_path / "out", "--json")
        done = json.loads(out)

        config = hf_prune.KCMConfig(
            budget={"macs": 0.9, "params": 0.95},
            r2="iterated",
            recover="scale",
            sigma=0.5,
            max_iterations=3,
            multiple_of=8,
            exclude=("encoder.layer.0.*",),
        )
        model = AutoModelForSequenceClassification.from_pretrained(dense)
        result = hf_prune.prune(
            model,
            config,
            TEXTS,
            processing_class=AutoTokenizer.from_pretrained(dense),
            max_samples=20,
            max_length=6,
        )
        expected = result.report.to_dict()
        assert code == 0
        assert done == {
            **expected,
            "seconds": done["seconds"],
            "verified": done["verified"],
            "output": str(tmp_path / "out"),
            "needs_hf_prune": True,
            "standalone": False,
        }
        assert done["calibration"]["samples"] == 20
        assert mask_of(tmp_path / "out") == result.mask
        reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        shrunk = hf_prune.shrink(model).state_dict()
        assert all(torch.equal(tensor, shrunk[key]) for key, tensor in reloaded.state_dict().items())
        length = done["sequence_lengths"]["encoder.layer"]
        assert model_costs(reloaded, sequence_length=length).macs == pytest.approx(done["after"]["macs"])

    def test_options_without_data(self, run, dense, tmp_path):
        masks = []
        for seed in (1, 1, 2):
            out_dir = tmp_path / f"{len(masks)}"
            argv = ["--method", "random", "--budget", "params=28_000", "--set", f"seed={seed}"]
            code, out, _ = run("prune", dense, *argv, "--sequence-length", 7, "--output", out_dir, "--json")
            done = json.loads(out)
            assert code == 0 and done["config"]["seed"] == seed and done["calibration"] is None
            assert done["config"]["budget"] == {"params": 28000} and done["after"]["params"] <= 28000
            assert done["sequence_lengths"] == {"encoder.layer": 7}
            masks.append(mask_of(out_dir))
        assert masks[0] == masks[1] != masks[2]

    def test_a_budget_of_latency(self, run, dense, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path))
        monkeypatch.setattr("hf_prune.layer_timing._clocked", parameters_as_time)
        argv = ["--method", "magnitude", "--budget", "latency=0.9", "--latency-batch-size", 2, "--sequence-length", 7]
        code, out, _ = run("prune", dense, *argv, "--output", tmp_path / "out", "--json")
        done = json.loads(out)
        assert code == 0 and done["after"]["latency"] <= 0.9 * done["before"]["latency"]
        assert done["latency"]["where"].startswith("batch 2 × 7 tokens, float32, ")
        assert done["latency"]["multiple_of"] == 32 and done["latency"]["after"] > 0

    def test_single_weights(self, run, dense, texts, tmp_path):
        out_dir = tmp_path / "out"
        argv = ["--method", "wanda", "--pattern", "2:4", "--dataset", texts, "--exclude", "encoder.layer.0.*"]
        code, out, _ = run("prune", dense, *argv, "--output", out_dir)
        assert code == 0 and "Zeros in dense tensors make a model neither smaller nor faster" in out
        assert out.startswith("wanda: 50.00% of 16,384 weights in 12 matrices are zero")
        assert "This checkpoint loads with plain transformers." in out and "import hf_prune" not in out
        model = AutoModelForSequenceClassification.from_pretrained(dense)
        config = hf_prune.WandaConfig(pattern="2:4", exclude=("encoder.layer.0.*",))
        result = hf_prune.prune(model, config, TEXTS, processing_class=AutoTokenizer.from_pretrained(dense))
        assert hf_prune.WeightMask.load(out_dir) == result.mask
        reloaded = AutoModelForSequenceClassification.from_pretrained(out_dir).state_dict()
        assert all(torch.equal(tensor, reloaded[key]) for key, tensor in model.state_dict().items())

    def test_excluded_patterns_add_up(self, run, dense, tmp_path):
        argv = ["--method", "magnitude", "--budget", "macs=0.8", "--output", tmp_path / "out", "--json"]
        argv += ["--exclude", "encoder.layer.0.*", "encoder.layer.1.output.*", "--exclude", "encoder.layer.2.output.*"]
        done = json.loads(run("prune", dense, *argv)[1])
        changed = {row["name"] for row in done["units"] if row["kept"] < row["size"]}
        assert changed and changed <= {f"encoder.layer.{i}.attention.output.dense" for i in (1, 2)}

    def test_uniform_loads_with_plain_transformers(self, run, tmp_path):
        llama = save_tiny(tmp_path / "llama", "llama", tokenizer=False)
        argv = ["--method", "magnitude", "--budget", "macs=0.7", "--allocation", "uniform", "--dtype", "bfloat16"]
        code, out, err = run("prune", llama, *argv, "--output", tmp_path / "out")
        assert code == 0
        assert "This checkpoint loads with plain transformers." in out and "import hf_prune" not in out
        assert "hf-prune: warning: no tokenizer or processor loads from" in err and "warning" not in out
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.dtype == torch.bfloat16 and not hasattr(model.config, "hf_prune")
        assert model.num_parameters() < AutoModelForCausalLM.from_pretrained(llama).num_parameters()

    def test_layers_are_dropped_first(self, run, dense, texts, tmp_path):
        argv = ["--method", "magnitude", "--budget", "macs=0.6", "--drop-layers", 1, "--output", tmp_path / "out"]
        done = json.loads(run("prune", dense, *argv, "--dataset", texts, "--json")[1])
        assert done["config"]["drop_layers"] == 1 and done["after"]["macs"] <= 0.6 * done["before"]["macs"]
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
        assert mask_of(tmp_path / "out").kept("layers") == 2
        code, out, err = run("prune", dense, *argv)
        assert (code, out) == (2, "") and "--drop-layers needs calibration data" in err
        code, out, err = run("prune", dense, *argv, "--set", "drop_layers=1")
        assert (code, out) == (2, "") and "drop_layers has a place of its own: --drop-layers" in err

    def test_standalone(self, run, dense, tmp_path):
        argv = ["--method", "magnitude", "--budget", "macs=0.7", "--standalone", "--output", tmp_path / "out"]
        assert "with an auto class and trust_remote_code=True" in run("prune", dense, *argv)[1]
        found = json.loads(run("inspect", tmp_path / "out", "--json")[1])
        assert (found["needs_hf_prune"], found["standalone"]) == (True, True)

    def test_compressed(self, run, dense, texts, tmp_path):
        argv = ["prune", dense, "--method", "wanda", "--sparsity", 0.75, "--dataset", texts, "--json"]
        sizes = []
        for extra in ([], ["--compressed"]):
            folder = tmp_path / f"out{len(extra)}"
            code, out, _ = run(*argv, *extra, "--output", folder)
            found = json.loads(out)
            assert code == 0 and (found["needs_hf_prune"], found["standalone"]) == (bool(extra), False)
            assert json.loads(run("inspect", folder, "--json")[1])["needs_hf_prune"] == bool(extra)
            sizes.append(benchmark.disk_bytes(folder))
        assert sizes[1] < 0.8 * sizes[0]
        code, out, err = run(*argv, "--compressed", "--standalone", "--output", tmp_path / "out")
        assert (code, out) == (2, "") and "exclude each other" in err

    def test_standalone_where_none_is_needed(self, run, dense, tmp_path):
        argv = ["--method", "magnitude", "--budget", "macs=0.9", "--allocation", "uniform", "--standalone"]
        done = json.loads(run("prune", dense, *argv, "--output", tmp_path / "out", "--json")[1])
        assert (done["needs_hf_prune"], done["standalone"]) == (False, False)

    def test_inspect_sees_the_pruned_shapes(self, run, dense, tmp_path):
        argv = ["--method", "random", "--budget", "macs=0.5", "--output", tmp_path / "out", "--json"]
        done = json.loads(run("prune", dense, *argv)[1])
        found = json.loads(run("inspect", tmp_path / "out", "--json")[1])
        kept = {row["name"]: row["kept"] for row in done["units"]}
        for block in found["stacks"][0]["blocks"]:
            assert block["units"] == [kept[f"encoder.layer.{i}.{block['site']}"] for i in range(3)]
        assert {m: found[m] for m in done["after"]} == pytest.approx(done["after"])
        assert found["needs_hf_prune"] and " to " in run("inspect", tmp_path / "out")[1]

    def test_another_task(self, run, dense, tmp_path):
        argv = ["--task", "base", "--method", "magnitude", "--budget", "macs=0.9", "--output", tmp_path / "out"]
        assert "from transformers import BertModel" in run("prune", dense, *argv)[1]
