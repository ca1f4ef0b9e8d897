import json

import pytest
import torch
from tiny import tiny_model

import hf_prune
from hf_prune import PruningError, PruningReport
from hf_prune.errors import ConfigError

EVALUATION = [{"metric": "accuracy", "before": 0.8651, "after": 0.8532, "n": 872}]


@pytest.fixture
def report():
    """Of a real run on a tiny model."""
    model = tiny_model("bert")
    config = hf_prune.MagnitudeConfig(budget={"macs": 0.7})
    report = hf_prune.prune(model, config).report
    report.evaluation = EVALUATION
    return report


@pytest.fixture
def zeros():
    return hf_prune.prune(tiny_model("bert"), hf_prune.WeightMagnitudeConfig(sparsity=0.5)).report


def row(markdown: str, start: str) -> list[str]:
    [line] = [line for line in markdown.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


class TestFile:
    def test_round_trip(self, report, tmp_path):
        report.benchmark = [{"latency": [{"p50_ms": 2.0}]}, {"latency": [{"p50_ms": 1.0}]}]
        report.save(tmp_path)
        assert PruningReport.load(tmp_path) == report == PruningReport.load(tmp_path / "pruning_report.json")

    def test_fields_of_other_versions_are_kept(self, report):
        data = {**report.to_dict(), "schema_version": 2, "carbon": 3.0}
        assert PruningReport.from_dict(data).to_dict() == data

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            ("before.macs", 0, "before.macs must be a positive number, got 0"),
            ("after", {}, "after.macs must be float, got nothing"),
            ("before.memory", None, "before must be dict[str, float], got {"),
            ("evaluation", None, "evaluation must be list[dict[str, Any]], got nothing"),
            ("evaluation", [{"metric": "accuracy"}], "evaluation[0].before must be float, got nothing"),
            ("evaluation.0.after", "0.9", "evaluation[0].after must be float, got '0.9'"),
            ("evaluation.0.n", "872", "evaluation[0].n must be int | None, got '872'"),
            ("evaluation.0.windows", 2.5, "evaluation[0].windows must be int | None, got 2.5"),
            ("evaluation.0.interval_after", [0.9], "interval_after must be tuple[float, float] | None, got [0.9]"),
            ("evaluation.0.interval_before", ["0.8", "0.9"], "evaluation[0].interval_before must be tuple[float"),
            ("benchmark", [{"name": "x"}], "benchmark[0].latency must be list"),
            ("benchmark", [{"latency": [{"p50_ms": 0.0}]}], "benchmark[0].latency.p50_ms must be a positive number"),
            ("benchmark", [{"latency": [{"p50_ms": 1.0}]}, {"latency": []}], "latencies at other batch sizes"),
            ("units.0.kind", "hats", "Unknown kind of units 'hats'"),
            ("units.0.kept", 1.5, "units[0].kept must be int, got 1.5"),
            ("latency", {"before": 2.0}, "latency.where must be str, got nothing"),
            ("latency", {"before": 2.0, "after": 1.0, "where": "CPU"}, "before.latency must be a positive number"),
            ("schema_version", "1", "schema_version must be int"),
        ],
    )
    def test_what_is_damaged_is_named(self, report, tmp_path, run, path, value, message):
        data = json.loads(json.dumps(report.to_dict()))
        *way, last = path.split(".")
        place = data
        for key in way:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
        (tmp_path / "pruning_report.json").write_text(json.dumps(data))
        code, out, err = run("compare", tmp_path)
        assert (code, out) == (1, "")
        start = f"hf-prune: error: {tmp_path}/pruning_report.json: Not a pruning report: "
        assert err.startswith(start) and message in err, err

    def test_versions(self, report):
        assert report.packages["hf_prune"] == hf_prune.__version__
        assert {"transformers", "torch"} <= report.packages.keys() and "peft" not in report.packages

    def test_reports_of_older_versions_load(self, report):
        data = report.to_dict()
        for name in ("evaluation", "benchmark", "latency", "weights", "processes"):
            del data[name]
        again = PruningReport.from_dict(data)
        assert (again.evaluation, again.benchmark, again.latency) == ([], [], None)
        assert again.to_markdown()

    @pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"method": "kcm"}', "\xff"])
    def test_what_is_no_report(self, tmp_path, content):
        (tmp_path / "pruning_report.json").write_text(content, encoding="latin-1")
        with pytest.raises(PruningError, match="pruning report"):
            PruningReport.load(tmp_path)

    def test_no_file(self, tmp_path):
        with pytest.raises(PruningError, match="holds no pruning report"):
            PruningReport.load(tmp_path / "none")


class TestMarkdown:
    def test_costs_and_quality(self, report):
        text = report.to_markdown()
        assert text.startswith(f"{report}\n\n|  | before | after | kept or change |\n")
        assert row(text, "parameters")[-1] == f"{report.ratio('params'):.1%}"
        assert row(text, "MACs per example")[1:3] == [
            f"{n['macs'] / 1e6:.2f} M" for n in (report.before, report.after)
        ]
        assert row(text, "accuracy") == ["accuracy", "0.8651", "0.8532", "-0.0119"]

    def test_every_group_of_units(self, report):
        text = report.to_markdown()
        for unit in report.units:
            assert row(text, unit["name"]) == [unit["name"], f"{unit['kept']:,}", f"{unit['size']:,}"]

    def test_single_weights(self, zeros):
        text = zeros.to_markdown()
        assert row(text, "parameters that are not zero")[-1] == f"{zeros.ratio('nonzero'):.1%}"
        assert row(text, zeros.weights[0]["name"])[1] == f"{zeros.weights[0]['zeros']:,}"

    def test_names_cannot_break_the_table(self, report):
        report.evaluation = [{"metric": "a | b", "before": 1.0, "after": 0.5}]
        [line] = [line for line in report.to_markdown().splitlines() if "a " in line and "b" in line and "0.5" in line]
        assert line == r"| a \| b | 1.0000 | 0.5000 | -0.5000 |"


class TestLatencyRatio:
    def test_not_measured(self, report):
        assert report.latency_ratio() is None

    def test_of_the_benchmark(self, report):
        rows = [{"latency": [{"p50_ms": p50}, {"p50_ms": 9.0}]} for p50 in (4.0, 8.0, 3.0)]
        report.benchmark = rows  # dense, another, and the model itself
        assert report.latency_ratio() == 0.75

    def test_of_a_budget(self, report):
        report.latency = {"before": 4.0, "after": 1.0, "where": "CPU", "multiple_of": 8, "table": []}
        assert report.latency_ratio() == 0.25
        report.latency["before"] = None
        assert report.latency_ratio() is None


class TestPlot:
    def test_units(self, report, tmp_path):
        figure = report.plot(tmp_path / "plan.svg")
        assert (tmp_path / "plan.svg").read_text(encoding="utf-8").startswith("<?xml")
        kept = sum(unit["kept"] for unit in report.units if unit["kind"] == "heads")
        assert f"Heads kept: {kept} of 12" in figure.axes[0].get_title("left")

    def test_single_weights_have_no_picture(self, zeros, tmp_path):
        with pytest.raises(ConfigError, match="no units to plot"):
            zeros.plot(tmp_path / "plan.png")
        assert not (tmp_path / "plan.png").exists()


def test_json_is_plain(report, tmp_path):
    report.facts["tensor"] = float(torch.tensor(1.0))
    report.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["evaluation"] == EVALUATION
