"""Writing a model card: when it is written, and what it never overwrites."""

import json
import os
import shutil
from pathlib import Path

import pytest
from pruned import measured
from tiny import tiny_model

import hf_prune
from hf_prune import PruningReport, cli, write_card
from hf_prune.errors import ConfigError, PruningError
from hf_prune.hub.card import MARKER


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "bert-small"))


class TestWriting:
    def test_it_is_a_function_of_what_is_saved(self, folder):
        before = (folder / "README.md").read_bytes()
        write_card(folder)
        assert (folder / "README.md").read_bytes() == before

    def test_a_report_that_learned_more(self, folder):
        report = measured(PruningReport.load(folder))
        write_card(folder, report, name="me/it")
        card = (folder / "README.md").read_text()
        assert "# me/it" in card and "0.8773" in card
        assert PruningReport.load(folder).evaluation == report.evaluation

    def test_the_card_of_somebody_else_stays(self, folder):
        edited = (folder / "README.md").read_text().replace(MARKER, "") + "mine"
        (folder / "README.md").write_text(edited)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ConfigError, match="was not written by hf_prune, or was edited"):
            write_card(folder, measured(PruningReport.load(folder)))
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
        model = hf_prune.prunable(tiny_model("bert"))
        model.prune(hf_prune.MagnitudeConfig(budget={"macs": 0.8}))
        model.save_pretrained(folder)
        assert (folder / "README.md").read_text() == edited
        assert PruningReport.load(folder).method == "magnitude"

    def test_a_card_of_ours_goes_with_its_model(self, folder):
        hf_prune.save_pretrained(tiny_model("bert"), folder)  # without a report
        assert not {"README.md", "pruning_layers.png", "pruning_report.json"} & set(os.listdir(folder))

    @pytest.mark.parametrize(
        "broken",
        [
            {"units": [{}]},
            {"evaluation": [{"metric": "x", "before": "a", "after": "b"}]},
            {"benchmark": [{"name": "x"}]},
            {"papers": [{}]},
            {"model_class": "os; import x"},
            {"verified": {}},
            {"before": {}, "after": {}},
        ],
        ids=lambda broken: next(iter(broken)),
    )
    def test_malformed_reports(self, folder, broken):
        data = {**json.loads((folder / "pruning_report.json").read_text()), **broken}
        (folder / "pruning_report.json").write_text(json.dumps(data))
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(PruningError, match="malformed|card|[Nn]ot a pruning report"):
            write_card(folder)
        data["calibration"] = {}
        with pytest.raises(PruningError, match="malformed|card|[Nn]ot a pruning report"):
            write_card(folder, PruningReport.from_dict(data))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_a_card_that_fails_costs_no_model(self, tmp_path, report, caplog):
        report.evaluation = [{"metric": "x"}]
        hf_prune.save_pretrained(tiny_model("bert"), tmp_path / "m", report=report)
        assert not (tmp_path / "m" / "README.md").exists() and (tmp_path / "m" / "model.safetensors").exists()

    def test_a_report_of_a_newer_schema_is_left_alone(self, folder):
        data = json.loads((folder / "pruning_report.json").read_text())
        (folder / "pruning_report.json").write_text(json.dumps({**data, "schema_version": 2}))
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(PruningError, match="of schema 2, written by a newer hf_prune"):
            write_card(folder, PruningReport.load(folder))
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}

    def test_fields_of_others_stay(self, folder):
        data = json.loads((folder / "pruning_report.json").read_text())
        (folder / "pruning_report.json").write_text(json.dumps({**data, "carbon": 3.0}))
        write_card(folder, PruningReport.load(folder))
        assert json.loads((folder / "pruning_report.json").read_text())["carbon"] == 3.0

    def test_older_reports(self, folder, report):
        new = ("papers", "command", "recovery", "evaluation", "benchmark", "metadata", "verified")
        data = {key: value for key, value in report.to_dict().items() if key not in new}
        (folder / "pruning_report.json").write_text(json.dumps(data))
        write_card(folder)
        assert "were not run" in (folder / "README.md").read_text()

    def test_command_line(self, folder, tmp_path, capsys):
        report = measured(PruningReport.load(folder))
        (tmp_path / "bench.json").write_text(json.dumps(report.benchmark))
        (tmp_path / "quality.json").write_text(json.dumps(report.evaluation))
        options = ["--bench", str(tmp_path / "bench.json"), "--evaluation", str(tmp_path / "quality.json"), "--json"]
        assert cli.main(["card", str(folder), *options]) == 0
        assert json.loads(capsys.readouterr().out) == {"card": str(folder / "README.md")}
        assert "0.8773" in (folder / "README.md").read_text() and "peak memory" in (folder / "README.md").read_text()
        report.benchmark[1]["scores"] = {"accuracy": 0.5}
        (tmp_path / "bench.json").write_text(json.dumps(report.benchmark))
        assert cli.main(["card", str(folder), *options]) == 1
        assert (
            "both rows must have the same scores, they are of 'a' [] and 'b' ['accuracy']" in capsys.readouterr().err
        )
        (tmp_path / "bench.json").write_text("{}")
        assert cli.main(["card", str(folder), *options]) == 1
        assert "must hold a list of rows" in capsys.readouterr().err
        assert cli.main(["card", str(tmp_path)]) == 1
        assert "holds no pruning_report" in capsys.readouterr().err
