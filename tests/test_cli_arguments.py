"""What the command line and a run file may say."""

import json
from dataclasses import fields
from typing import Literal

import pytest
import transformers

import hf_prune
from hf_prune import cli, known_pruners
from hf_prune.cli import loading, prune
from hf_prune.methods import get_pruner


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
