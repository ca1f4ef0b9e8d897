import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal

import pytest
import torch
import transformers
from tiny import parameters_as_time, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast

import hf_prune
from hf_prune import benchmark, cli, known_pruners, model_costs
from hf_prune.cli import loading, main, prune
from hf_prune.costs import CostTable
from hf_prune.errors import InfeasibleBudgetError
from hf_prune.methods import get_pruner
from hf_prune.selection import Selector

ROOT = Path(hf_prune.__file__).parents[1]
WORDS = "the a film plot actor was is good bad very not dull bright long and but".split()
TEXTS = [" ".join(WORDS[(i * k) % 16] for k in range(1, 5 + i % 4)) for i in range(1, 25)]


def save_tiny(folder: Path, family: str = "bert", tokenizer: bool = True, **options) -> str:
    tiny_model(family, **options).save_pretrained(folder)
    if tokenizer:
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        (folder / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
        BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    return str(path)


def mask_of(folder) -> hf_prune.PruningMask:
    return hf_prune.PruningMask.load(folder)


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


class TestUsage:
    def test_version(self, run):
        assert run("--version") == (0, f"hf_prune {hf_prune.__version__}\n", "")

    def test_a_command_is_required(self, run):
        code, out, err = run()
        assert (code, out) == (2, "") and "COMMAND" in err

    @pytest.mark.parametrize("command", ["inspect", "bench"])
    def test_help_of_a_command(self, run, command):
        code, out, err = run(command, "--help")
        assert (code, err) == (0, "") and "examples:" in out

    def test_help_of_prune_lists_every_method_with_its_options(self, run):
        code, out, err = run("prune", "--help")
        assert (code, err) == (0, "")
        shared = prune.FLAGS
        for name in known_pruners():
            assert f"\n  {name}: " in out
            for field in fields(get_pruner(name).config_class):
                assert f"\n    {field.name} (" in out or field.name in shared
        for name in shared:
            assert f"--{name.replace('_', '-')} " in out
        assert out.count("Needs no data.") == sum(not get_pruner(name).needs_data for name in known_pruners())

    def test_tasks_are_auto_classes_that_can_be_prunable(self):
        for name in loading.TASKS.values():
            assert getattr(hf_prune, name.replace("Auto", "AutoPrunable")).auto_class == name
            assert hasattr(transformers, name)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--budget", "macs"], "is no METRIC=LIMIT: give the ratio to keep, in (0, 1], such as macs=0.6"),
            (["--budget", "macs=60%"], "'macs=60%' is no METRIC=LIMIT"),
            (["--budget", "macs=1.5"], "budget['macs'] must be the ratio to keep, in (0, 1], or"),
            (["--budget", "macs=nan"], "got nan"),
            (["--budget", "mac=0.5"], "Unknown metric in budget 'mac'. Did you mean 'macs'?"),
            (["--budget", "macs=0.6", "--budget", "macs=0.5"], "--budget macs= is given twice"),
            (["--method", "magnitud"], "Unknown pruning method 'magnitud'. Did you mean 'magnitude'? Known: "),
            (["--method", "kcm"], "kcm needs calibration data: give examples like those of the task with --dataset"),
            (["--set", "seed"], "'seed' is no KEY=VALUE"),
            (["--set", "=3"], "'=3' is no KEY=VALUE"),
            (["--set", "sead=3"], "Unknown option of random 'sead'. Did you mean 'seed'?"),
            (["--set", "seed=three"], "--set seed= takes a whole number, got 'three'"),
            (["--set", "seed=-1"], "seed must be a whole number of at least 0, got -1"),
            (["--set", "seed=1", "--set", "seed=2"], "--set seed= is given twice"),
            (["--set", "multiple_of=8"], "multiple_of has a place of its own: --multiple-of"),
            (["--method", "wanda"], "wanda takes no --budget. It takes --sparsity, --pattern, --exclude."),
            (["--sparsity", "0.5"], "random takes no --sparsity. It takes --budget, --exclude, --allocation,"),
            (["--sparsity", "half"], "argument --sparsity: invalid float value: 'half'"),
            (["--method", "kcm", "--set", "r2=exact"], "--set r2= takes density or iterated, got 'exact'"),
            (["--method", "kcm", "--set", "sigma=wide"], "--set sigma= takes a number or median, got 'wide'"),
            (["--multiple-of", "0"], "argument --multiple-of: must be a whole number of at least 1, got '0'"),
            (["--max-samples", "1e3"], "argument --max-samples: must be a whole number of at least 1, got '1e3'"),
            (["--device", "gpu"], "Can't run on the device 'gpu'"),
            (["--task", "summarize"], "invalid choice: 'summarize'"),
            (["--shrink"], "unrecognized arguments: --shrink"),
        ],
    )
    def test_wrong_calls_of_prune(self, run, dense, tmp_path, argv, message):
        defaults = {"--budget": "macs=0.6", "--method": "random"}
        argv = [*argv, *(part for pair in defaults.items() if pair[0] not in argv for part in pair)]
        code, out, err = run("prune", dense, "--output", tmp_path / "out", *argv)
        assert (code, out) == (2, "")
        assert message in " ".join(err.split())
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("text", "hint", "value"),
        [
            ("3", int, 3),
            ("1e-3", float, 1e-3),
            ("3", float | Literal["median"], 3.0),
            ("median", float | Literal["median"], "median"),
            ("none", float | None, None),
            ("true", bool, True),
            ("a.*,b", tuple[str, ...], ("a.*", "b")),
            ("2", Literal[1, 2], 2),
            ("x=y", str, "x=y"),
        ],
    )
    def test_values_of_settings_have_the_type_of_their_field(self, text, hint, value):
        found = prune._value("key", text, hint)
        assert found == value and type(found) is type(value)

    @pytest.mark.parametrize(
        ("hint", "legal"), [(bool, "true or false"), (int | None, "a whole number or none"), (tuple[str, ...], "a,b")]
    )
    def test_legal_values_are_named(self, hint, legal):
        assert prune._legal(hint).startswith(legal)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["random"], "random needs --budget."),
            (["wanda"], "Give either sparsity, such as 0.5, or pattern, such as '2:4'"),
            (["wanda", "--sparsity", "0.5", "--pattern", "2:4"], "Give either sparsity"),
            (["wanda", "--sparsity", "1"], "sparsity must be a number in [0, 1)"),
            (["wanda", "--pattern", "5:4"], "pattern 'N:M' keeps N of M weights"),
            (["wanda", "--sparsity", "0.5", "--allocation", "uniform"], "wanda takes no --allocation"),
            (["wanda", "--sparsity", "0.5", "--set", "ratios=half"], "--set ratios= takes uniform or owl"),
            (["wanda", "--sparsity", "0.5"], "wanda needs calibration data"),
        ],
    )
    def test_how_much_is_pruned(self, run, dense, tmp_path, argv, message):
        code, out, err = run("prune", dense, "--output", tmp_path / "out", "--method", *argv)
        assert (code, out) == (2, "") and message in " ".join(err.split())

    def test_required_options_of_prune(self, run, dense):
        code, _, err = run("prune", dense)
        assert code == 2 and "the following arguments are required: --method, --output" in err

    def test_the_model_is_not_overwritten(self, run, dense):
        code, _, err = run("prune", dense, "--method", "random", "--budget", "macs=0.6", "--output", dense + "/.")
        assert code == 2 and "would overwrite the model that is pruned" in err

    def test_the_output_is_no_file(self, run, dense, texts):
        code, _, err = run("prune", dense, "--method", "random", "--budget", "macs=0.6", "--output", texts)
        assert code == 2 and "is a file: give a folder" in err

    @pytest.mark.parametrize("option", ["--split", "--dataset-config"])
    def test_a_file_has_no_splits(self, run, dense, texts, tmp_path, option):
        argv = ["--method", "kcm", "--budget", "macs=0.9", "--dataset", texts, option, "test"]
        code, _, err = run("prune", dense, *argv, "--output", tmp_path / "out")
        assert code == 2 and "are for datasets of the Hub" in err

    def test_one_model_is_not_measured_twice(self, run, dense):
        code, _, err = run("bench", dense, "--against", dense)
        assert code == 2 and "is given twice" in err


class TestRunFile:
    """`--config`: the same arguments from a file."""

    @pytest.fixture
    def parse(self, tmp_path, capsys):
        """The arguments of a command, or the error, given the text of a file and what stands on the command line."""

        def call(command: str, text: str, *argv: object):
            path = tmp_path / "run.yaml"
            path.write_text(text, encoding="utf-8")
            try:
                return vars(cli._parse([command, "--config", str(path), *map(str, argv)]))
            except SystemExit as exit:
                assert exit.code == 2
                return " ".join(capsys.readouterr().err.split())

        return call

    PRUNE = """
model: ./bert
method: wanda
pattern: 2:4
set: {ratios: owl, targets: [a, b], seed: 3}
max-samples: 64
exclude: [embeddings, "*.0.*"]
output: ./out
json: true
"""
    FLAGS = (
        "prune ./bert --method wanda --pattern 2:4 --set ratios=owl --set targets=a,b --set seed=3 --max-samples 64 "
        "--exclude embeddings *.0.* --output ./out --json"
    )

    @staticmethod
    def same(found, flags):
        expected = vars(cli._parse(flags.split()))
        skip = ("config", "error")
        assert {k: v for k, v in found.items() if k not in skip} == {
            k: v for k, v in expected.items() if k not in skip
        }

    def test_a_file_equals_flags(self, parse):
        self.same(parse("prune", self.PRUNE), self.FLAGS)

    @pytest.mark.parametrize(
        ("text", "flags"),
        [
            ("models: [a, b]\nbatch-size: [1, 32]", "bench a b --batch-size 1 32"),
            ("models: a\nbatch_size: 4", "bench a --batch-size 4"),
            ("models: [a]\ndevice: cpu", "bench a --device cpu"),
        ],
    )
    def test_lists(self, parse, text, flags):
        self.same(parse("bench", text), flags)

    def test_the_command_line_wins(self, parse):
        argv = ["./other", "--pattern", "1:4", "--set", "seed=4", "--exclude", "x"]
        found = parse("prune", self.PRUNE, *argv)
        assert (found["model"], found["pattern"], found["set"]) == ("./other", "1:4", [("seed", "4")])
        assert (found["exclude"], found["method"]) == (["x"], "wanda")

    def test_every_limit_of_a_budget(self, parse):
        text = "model: m\nmethod: kcm\noutput: o\nbudget: {macs: 0.6, params: 40000000}"
        assert parse("prune", text)["budget"] == [("macs", 0.6), ("params", 40_000_000)]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("modle: m", "run.yaml: Unknown key 'modle'. Did you mean 'model'? Known: allocation,"),
            ("config: other.yaml", "Unknown key 'config'"),
            ("method: [kcm, wanda]", "run.yaml: method can't be ['kcm', 'wanda']"),
            ("output: {a: b}", "run.yaml: output can't be {'a': 'b'}"),
            ("budget: {macs: {low: 1}}", "is no METRIC=LIMIT"),
            ("budget: {macs: }", "is no METRIC=LIMIT"),
            ("task:", "run.yaml: task has no value"),
            ("json: 1", "run.yaml: json takes true or false, got '1'"),
            ("multiple-of: 0", "argument --multiple-of: must be a whole number of at least 1, got '0'"),
            ("task: sing", "invalid choice: 'sing'"),
            ("model: m\nmethod: kcm", "the following arguments are required: --output"),
            ("method: kcm", "the following arguments are required: MODEL, --output"),
            ("- model", "must hold `key: value` lines"),
            ("", "must hold `key: value` lines"),
            ("model: m\nmethod: kcm\nmethod: wanda", "'method' is given twice"),
            ("set: {seed: 1, seed: 2}", "'seed' is given twice"),
            ("max_samples: 5\nmax-samples: 6", "'max_samples' and 'max-samples' are the same key, give it once"),
            ("a: [", "can't read the arguments in"),
            ("a: !!python/object/apply:os.getcwd []", "Unknown key 'a'"),
        ],
    )
    def test_bad_files(self, parse, text, message):
        assert message in parse("prune", text)

    def test_no_such_file(self, run, tmp_path):
        code, _, err = run("prune", "--config", tmp_path / "none.yaml")
        assert code == 2 and "can't read the arguments in" in err

    def test_flags_are_not_abbreviated(self, run):
        code, _, err = run("bench", "model", "--thread", 2)
        assert code == 2 and "unrecognized arguments: --thread" in err

    def test_a_run(self, run, dense, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text(f"model: {dense}\nmethod: random\nbudget: {{macs: 0.8}}\nset: {{seed: 3}}\njson: true")
        code, out, err = run("prune", "--config", path, "--output", tmp_path / "out")
        assert code == 0, err
        report = json.loads(out)
        assert report["config"]["seed"] == 3 and report["config"]["budget"] == {"macs": 0.8}
        assert hf_prune.PruningReport.load(tmp_path / "out").to_dict().items() <= report.items()


class TestInspect:
    def test_figures_are_those_of_the_library(self, run, dense):
        code, out, _ = run("inspect", dense, "--sequence-length", 20, "--json")
        found, model = json.loads(out), AutoModelForSequenceClassification.from_pretrained(dense)
        table = CostTable(model, sequence_length=20)
        assert code == 0
        assert {m: found[m] for m in ("macs", "params", "memory")} == table.of().to_dict()
        assert found["params"] == model.num_parameters() and found["memory"] == 4 * found["params"]
        assert found["sequence_lengths"] == {"encoder.layer": 20}
        heads = sum(table.unit[g.name].macs * g.size for g in table.units.of_kind("heads"))
        assert found["shares"]["attention"]["macs"] == pytest.approx(heads / table.of().macs)
        assert found["shares"]["attention"]["macs"] + found["shares"]["feed_forward"]["macs"] == pytest.approx(1)
        [stack] = found["stacks"]
        attention, feed_forward = stack["blocks"]
        assert (stack["name"], stack["layers"], stack["config"]) == ("encoder.layer", 3, "num_hidden_layers")
        assert (attention["units"], attention["heads_per_unit"], attention["config"]) == ([4, 4, 4], 1, "")
        assert (feed_forward["units"], feed_forward["config"]) == ([64] * 3, "intermediate_size")
        assert (found["needs_hf_prune"], found["standalone"]) == (False, False)

    def test_lowest_budgets_are_feasible_and_no_lower_ones(self, run, dense):
        lowest = json.loads(run("inspect", dense, "--json")[1])["lowest_macs"]
        model = AutoModelForSequenceClassification.from_pretrained(dense)
        assert sorted(lowest) == [name for name in known_pruners() if get_pruner(name).kinds]
        for name, ratio in lowest.items():
            kinds = get_pruner(name).kinds
            if kinds == ("layers",):
                assert 0 <= ratio - 1 / 3 <= 1e-4  # one of three
                continue
            Selector(CostTable(model), {"macs": ratio}, kinds)
            with pytest.raises(InfeasibleBudgetError):
                Selector(CostTable(model), {"macs": ratio - 2e-4}, kinds)

    def test_text(self, run, dense):
        code, out, err = run("inspect", dense)
        assert code == 0
        assert out.startswith(f"BertForSequenceClassification (bert) from {dense}\n")
        for part in ("n = 128 tokens", "64 a layer  intermediate_size", "4 a layer   -", "plain transformers.\n"):
            assert part in out
        assert out not in err

    def test_grouped_queries(self, run, tmp_path):
        out = run("inspect", save_tiny(tmp_path, "llama", tokenizer=False))[1]
        assert "KV groups of 2 heads  self_attn.o_proj  2 a layer   num_attention_heads" in out

    def test_units_that_stay(self, run, tmp_path):
        folder = save_tiny(tmp_path, "t5", tokenizer=False)
        lowest = json.loads(run("inspect", folder, "--json")[1])["lowest_macs"]
        assert (
            len({ratio for name, ratio in lowest.items() if name != "layer_drop"}) == 1
        )  # methods that prune heads elsewhere get no further than the others
        out = run("inspect", folder)[1]
        assert "layer.1.EncDecAttention.o  4 a layer (fixed)" in out
        assert "\nt5: feed-forward neurons and layers; its heads share one position bias and stay.\n" in out

    def test_config_without_a_class(self, run, tmp_path):
        folder = save_tiny(tmp_path, tokenizer=False)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
        code, out, err = run("inspect", folder)
        assert (code, out) == (1, "") and "say what the model is for with --task, one of base, causal-lm" in err
        assert json.loads(run("inspect", folder, "--task", "base", "--json")[1])["class"] == "BertModel"


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


class TestData:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def prune(self, run, dense, tmp_path, data, *argv):
        options = ["--method", "kcm", "--budget", "macs=0.9", "--set", "recover=none", "--dataset", data, *argv]
        return run("prune", dense, *options, "--output", tmp_path / "out", "--json")

    def fingerprint(self, dense, texts) -> str:
        model, tokenizer = (
            auto.from_pretrained(dense) for auto in (AutoModelForSequenceClassification, AutoTokenizer)
        )
        return hf_prune.Calibrator(model, texts, processing_class=tokenizer).fingerprint

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv"])
    def test_files(self, run, dense, tmp_path, suffix):
        lines = {
            ".txt": ["", *TEXTS, "  "],
            ".jsonl": [json.dumps({"sentence": text, "label": i % 2}) for i, text in enumerate(TEXTS)],
            ".csv": ["sentence,label", *(f'"{text}",{i % 2}' for i, text in enumerate(TEXTS))],
            ".tsv": ["label\tsentence", *(f'{i % 2}\t"{text}' for i, text in enumerate(TEXTS))],  # a lone quote
        }
        path = tmp_path / f"data{suffix}"
        path.write_text("\n".join(lines[suffix]) + "\n", encoding="utf-8")
        code, out, err = self.prune(run, dense, tmp_path, path)
        assert code == 0, err
        expected = [f'"{text}' for text in TEXTS] if suffix == ".tsv" else TEXTS
        assert json.loads(out)["calibration"]["sha256"] == self.fingerprint(dense, expected)

    def test_text_column(self, run, dense, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(json.dumps({"id": f"no {i}", "text": t}) for i, t in enumerate(TEXTS)))
        code, out, err = self.prune(run, dense, tmp_path, path)
        assert (code, out) == (1, "") and "several columns of text (id, text)" in err
        code, out, _ = self.prune(run, dense, tmp_path, path, "--text-column", "text", "--max-samples", 5)
        assert json.loads(out)["calibration"]["sha256"] == self.fingerprint(dense, TEXTS[:5])
        code, out, err = self.prune(run, dense, tmp_path, path, "--text-column", "txt")
        assert code == 1 and "text_column 'txt' is not in the data: id, text" in err

    def test_the_hub(self, run, dense, tmp_path, monkeypatch):
        import datasets

        calls = []

        def load_dataset(*args, **options):
            calls.append((args, options))
            return datasets.Dataset.from_dict({"text": TEXTS})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert self.prune(run, dense, tmp_path, "me/reviews")[0] == 0
        options = ["--dataset-config", "plain", "--split", "test[:10]"]
        assert self.prune(run, dense, tmp_path, "me/reviews", *options)[0] == 0
        assert calls == [(("me/reviews", None), {"split": "train"}), (("me/reviews", "plain"), {"split": "test[:10]"})]

    def test_no_such_dataset(self, run, dense, tmp_path, monkeypatch):
        def load_dataset(*args, **options):
            raise ConnectionError("the Hub is far away")

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        code, out, err = self.prune(run, dense, tmp_path, "me/reviews")
        assert (code, out) == (1, "")
        assert "hf-prune: error: Can't read the data 'me/reviews': the Hub is far away\n" in err

    def test_without_datasets(self, run, dense, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        code, _, err = self.prune(run, dense, tmp_path, "me/reviews")
        assert code == 1 and "pip install datasets" in err

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("data.txt", None, "There is no file"),
            ("data.xml", b"<a/>", "data files end in .txt, .jsonl, .json, .csv, .tsv"),
            ("data.txt", b"", "The calibration data are empty"),
            ("data.txt", b"\xff\xfe\xff", "Can't read the data"),
            ("data.jsonl", b"{not json", "Can't read the data"),
        ],
    )
    def test_bad_files(self, run, dense, tmp_path, name, content, message):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        code, out, err = self.prune(run, dense, tmp_path, tmp_path / name)
        assert (code, out) == (1, "") and message in err.splitlines()[-1] and "Traceback" not in err
        assert not (tmp_path / "out").exists()

    def test_text_without_a_tokenizer(self, run, texts, tmp_path):
        folder = save_tiny(tmp_path / "bare", tokenizer=False)
        code, _, err = self.prune(run, folder, tmp_path, texts)
        assert code == 1 and "it has no vocabulary" in err and "The calibration data are text" in err


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
