"""Model cards: what a reader sees, what machines read, and the cards of this repository."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as T
import yaml
from folders import tokenizer
from huggingface_hub import ModelCard
from pruned import measured
from tiny import tiny_model

import hf_prune
from hf_prune import PruningReport, render_card
from hf_prune.hub.card import MARKER, origin
from hf_prune.hub.sections import wilson_interval

CARDS = Path(__file__).parents[1] / "model_cards"
NAMES = ["minilm-kcm", "minilm-kprune", "minilm-nas", "minilm-pass", "smollm-wanda-lora"]


def fenced(card, language):
    return re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)


class TestWhatAReaderSees:
    def test_a_save_writes_it(self, saved):
        card = (saved / "README.md").read_text()
        assert MARKER in card and (saved / "pruning_layers.png").read_bytes().startswith(b"\x89PNG")
        assert "# bert-small" in card and "pruning_layers.png)" in card
        assert "30% fewer multiply-accumulates" in card
        assert "(https://arxiv.org/abs/2303.04185) (ICML 2023)" in card and "Azade Nova" in fenced(card, "bibtex")[0]
        assert "32 examples, 84 tokens" in card or re.search(r"32 examples, \d+ tokens", card)
        assert "| transformers alone | no |  |" in card
        assert "| transformers after `import hf_prune` | yes | when it was saved |" in card

    def test_the_snippet_is_what_the_save_has_run(self, saved):
        card = (saved / "README.md").read_text()
        assert "these lines were run on the saved files (float32, attention sdpa)" in card
        assert "the outputs on a random batch agreed" in card
        found = {}
        (lines,) = [source for source in fenced(card, "python") if "from_pretrained" in source]
        exec(lines.replace('"bert-small"', repr(str(saved))), found)
        assert PruningReport.load(saved).verified["usage"]
        assert type(found["model"]).__name__ == "BertForSequenceClassification" and len(found["tokenizer"]) == 8

    def test_nothing_is_claimed_that_was_not_run(self, report, config):
        report.verified["outputs"] = False
        assert "the outputs were not compared" in render_card(report, config, "x")
        report.verified["processor"] = None
        assert "tokenizer =" not in render_card(report, config, "x")
        report.verified["usage"] = False
        card = render_card(report, config, "x")
        assert "lines were run" not in card and "the class behind these lines loaded the saved files" in card
        report.verified = None
        card = render_card(report, config, "x")
        assert "were not run" in card and "were run" not in card and "when it was saved" not in card

    def test_a_class_of_the_user_is_not_imported_from_transformers(self, tmp_path):
        class Mine(T.BertForSequenceClassification):
            pass

        model = hf_prune.prunable(Mine(tiny_model("bert").config))
        model.prune(hf_prune.MagnitudeConfig(budget={"macs": 0.8}))
        model.shrink().save_pretrained(tmp_path / "m", processing_class=tokenizer())
        card = (tmp_path / "m" / "README.md").read_text()
        (lines,) = [source for source in fenced(card, "python") if "from_pretrained" in source]
        exec(lines.replace('"m"', repr(str(tmp_path / "m"))), {"Mine": Mine})
        assert "# transformers has no Mine: import it from the code that defines it." in lines
        assert "lines were run" not in card and "the class behind these lines loaded the saved files" in card
        assert "| transformers after `import hf_prune` | with the code of `Mine` | when it was saved |" in card

    def test_a_class_of_the_user_with_a_name_of_transformers(self, tmp_path):
        class BertForSequenceClassification(T.BertForSequenceClassification):
            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                output.logits = output.logits + 1
                return output

        model = hf_prune.prunable(BertForSequenceClassification(tiny_model("bert").config))
        model.prune(hf_prune.MagnitudeConfig(budget={"macs": 0.8}))
        model.shrink().save_pretrained(tmp_path / "m")
        assert "lines were run" not in (tmp_path / "m" / "README.md").read_text()

    @pytest.mark.parametrize("name", ["m 'x' \"y\"", "ünï", "\N{SNOWMAN}\N{GRINNING FACE}"])
    def test_the_lines_run_in_any_folder(self, tmp_path, name, monkeypatch):
        model = hf_prune.prunable(tiny_model("bert").half())
        model.prune(hf_prune.MagnitudeConfig(budget={"macs": 0.8}))
        model.set_attn_implementation("eager")
        model.shrink().save_pretrained(tmp_path / name, variant="fp16")
        card, found = (tmp_path / name / "README.md").read_text(), {}
        (lines,) = [source for source in fenced(card, "python") if "from_pretrained" in source]
        assert 'variant="fp16"' in lines and "these lines were run" in card
        monkeypatch.chdir(tmp_path)
        exec(lines, found)
        assert found["model"].dtype == torch.float16 and found["model"].num_parameters() == model.num_parameters()

    def test_a_masked_model_is_as_large_as_ever(self, tmp_path):
        model = hf_prune.prunable(tiny_model("bert"))
        report = model.prune(hf_prune.MagnitudeConfig(budget={"macs": 0.5})).report
        model.save_pretrained(tmp_path / "m")
        card = (tmp_path / "m" / "README.md").read_text()
        gone = sum(unit["size"] - unit["kept"] for unit in report.units if unit["kind"] == "heads")
        assert f"{gone} of 12 heads" in card and "are zero, not cut" in card and "fewer parameters" not in card
        cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in card.splitlines() if line.startswith("| ")}
        for what, key in (("| parameters", "params"), ("| MACs per example", "macs")):
            dense, saved, ratio = cells[what]
            assert dense == saved and ratio == "1.00× |" and report.ratio(key) < 1
        left = f"{report.ratio('params'):.2f}× the parameters and {report.ratio('macs'):.2f}× the MACs"
        assert f"`hf_prune.shrink` would leave {left}." in card
        assert "memory and latency gain nothing before `hf_prune.shrink`" in card
        model.shrink().save_pretrained(tmp_path / "m")
        assert "fewer parameters" in (tmp_path / "m" / "README.md").read_text()

    def test_onnx_is_tested_where_it_was_timed(self, report, config):
        assert "| ONNX |  | not tested |" in render_card(report, config, "x")
        assert "| ONNX | yes | when its latency was measured |" in render_card(measured(report), config, "x")

    def test_what_is_known_of_the_data(self, report, config):
        report.calibration, report.facts = None, {"steps": 5}
        assert "Calibration data: the training data.\n" in render_card(report, config, "x")
        report.calibration = {"dataset": "a/b", "split": "train", "samples": 1234, "fingerprint": "c0ffee"}
        words = "the training data, 1,234 examples of a/b train. Fingerprint of the `datasets.Dataset`: `c0ffee`.\n"
        assert f"Calibration data: {words}" in render_card(report, config, "x")
        report.calibration, report.facts = None, {}
        report.config["data"] = {"samples": 200, "tokens": 2786, "mean_length": 13.93, "sha256": "abc"}
        words = "200 examples, 2,786 tokens, 13.93 in the mean. SHA-256 of what the model saw: `abc`.\n"
        assert f"Calibration data: {words}" in render_card(report, config, "x")

    def test_remote_code(self, tmp_path):
        model = hf_prune.prunable(tiny_model("bert"))
        model.prune(hf_prune.MagnitudeConfig(budget={"macs": 0.8}))
        model.shrink().save_pretrained(tmp_path / "m", standalone=True)
        card = (tmp_path / "m" / "README.md").read_text()
        assert 'AutoModelForSequenceClassification.from_pretrained("m", trust_remote_code=True)' in card
        assert "with hf_prune switched off" in card
        assert "| `trust_remote_code=True`, hf_prune not installed | yes | when it was saved |" in card
        assert "| transformers after `import hf_prune` | yes | not tested |" in card
        assert "Calibration data: none." in card and "Recovery: none." in card

    def test_only_what_was_measured(self, report, config):
        card = render_card(report, config, "x")
        for word in ("latency p50", "peak memory", "weights on disk", "accuracy", "batch 1", "Measured:"):
            assert word not in card
        assert "Latency was not measured" in card and "quality was not measured" in card
        card = render_card(measured(report), config, "x")
        low, high = wilson_interval(0.8773, 872)
        assert f"| accuracy (n = 872) | 0.8773 ({low:.3f} to {high:.3f}) |" in card
        assert "| loss | 0.3100 | 0.3300 | +0.0200 |" in card
        assert "| weights on disk | 4.00 MB | 3.00 MB | 0.75× |" in card
        assert "| peak memory | 8.00 MB | 6.00 MB | 0.75× |" in card
        assert "| latency p50, batch 8 | 60.00 ms | 30.00 ms | 0.50× |" in card
        assert "| ONNX Runtime p95, batch 8 | 90.00 ms | 45.00 ms | 0.50× |" in card
        assert "27 tokens, float32, CPU, 1 thread" in card
        assert "one forward pass takes 0.50× the time (batch 1, 27 tokens, float32, CPU, 1 thread)" in card
        assert "accuracy 0.8773 → 0.8670 (n = 872)" in card and "quality was not measured" not in card

    def test_a_perplexity_has_its_tokens_and_an_interval(self, report, config):
        row = {"metric": "perplexity", "before": 45.118, "after": 67.979, "n": 2046, "windows": 2}
        row |= {"interval_before": (7.5, 271.25), "interval_after": [20.5, 225.0], "dataset": "wiki"}
        report.evaluation = [row]
        card = render_card(report, config, "x")
        cells = "45.1180 (7.500 to 271.250) | 67.9790 (20.500 to 225.000) | +22.8610"
        assert f"| perplexity (n = 2,046 tokens in 2 windows) | {cells} |" in card
        assert "perplexity 45.1180 → 67.9790 (n = 2,046 tokens in 2 windows)" in card
        assert "In brackets: 95 % confidence intervals, each of one model alone. A window of tokens counts" in card
        report.evaluation = [{"metric": "perplexity", "before": 45.118, "after": 67.979, "n": 1022, "windows": 1}]
        card = render_card(report, config, "x")
        assert "(n = 1,022 tokens in 1 window) | 45.1180 | 67.9790 |" in card and "In brackets" not in card

    def test_latency_that_was_predicted_is_called_so(self, report, config):
        report.before["latency"], report.after["latency"] = 20.0, 15.0
        report.latency = {"before": None, "after": None, "multiple_of": 1, "where": "batch 1, float32", "table": []}
        card = render_card(report, config, "x")
        assert "| latency, predicted | 20.00 ms | 15.00 ms | 0.75× |" in card and "latency p50" not in card
        assert "predicted: the sum of a table of blocks that were measured one by one; batch 1, float32." in card
        assert "latency was predicted from measured blocks, and not measured as a whole" in card
        assert "Latency was not measured" not in card
        report.latency |= {"before": 22.0, "after": 16.5}
        card = render_card(report, config, "x")
        assert "| latency p50 | 22.00 ms | 16.50 ms | 0.75× |" in card and "| latency, predicted | 20.00 ms" in card
        assert "not measured as a whole" not in card and "Latency holds for the hardware" in card
        report.verified["masked"] = True
        assert "predicted" not in render_card(report, config, "x").partition("All settings")[0]

    def test_the_plan_has_a_row_for_each_layer(self, report, config):
        card = render_card(report, config, "x")
        for layer in range(3):
            row = next(line for line in card.splitlines() if line.startswith(f"| encoder.layer.{layer} |"))
            kept = [unit for unit in report.units if unit["layer"] == layer]
            assert all(f"{unit['kept']} of {unit['size']}" in row for unit in kept) and kept

    def test_call_or_command(self, report, config):
        report.command = None
        call = next(source for source in fenced(render_card(report, config, "x"), "python") if "prune(" in source)
        assert "KCMConfig(exclude=" in call and "budget={'macs': 0.7}" in call and "sigma" not in call
        report.command = "hf-prune prune bert --method kcm"
        assert fenced(render_card(report, config, "x"), "bash") == ["hf-prune prune bert --method kcm"]

    def test_weights(self, tmp_path):
        model = hf_prune.prunable(tiny_model("llama"))
        model.prune(hf_prune.WeightMagnitudeConfig(sparsity=0.5))
        model.save_pretrained(tmp_path / "m")
        card = (tmp_path / "m" / "README.md").read_text()
        assert "50.0% of the weights in 21 matrices are zero" in card and "neither smaller nor faster" in card
        assert "| share of zeros | self\\_attn.q\\_proj |" in card and "| layers.2 |" + " 50.0% |" * 7 in card
        assert "parameters that are not zero" in card and "pruning_layers.png" not in card
        assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
        assert "| transformers alone | yes | when it was saved |" in card

    def test_recovery(self, report, config):
        assert "least squares" in render_card(report, config, "x")
        report.recovery = {"method": "LoRA", "rank": 8}
        assert "method LoRA, rank 8." in render_card(report, config, "x")


class TestMetadata:
    def data(self, report, config, name="user/x"):
        return ModelCard(render_card(report, config, name)).data

    def test_model_index(self, report, config):
        (result,) = self.data(measured(report), config).eval_results  # the loss is of no known data
        assert (result.metric_type, result.metric_value, result.dataset_config) == ("accuracy", 0.867, "sst2")

    @pytest.mark.parametrize(
        ("given", "found"),
        [
            ({"license": "mit", "language": ["en", "de"]}, {"license": "mit", "language": ["en", "de"]}),
            ({"base_model": "google-bert/bert-base-uncased"}, {"base_model_relation": "finetune"}),
            ({"license": "mit\nevil: true"}, {"license": None, "evil": None}),
            ({"license": 5, "language": {"a": 1}, "tags": "one"}, {"license": None, "language": None}),
            ({"base_model": "../../etc"}, {"base_model": None, "base_model_relation": None}),
            (
                {"datasets": ["a/b", "c: d"], "license_link": "javascript:x"},
                {"datasets": ["a/b"], "license_link": None},
            ),
        ],
    )
    def test_what_is_given_is_taken_if_it_can_be_true(self, report, config, given, found):
        report.metadata = given
        data = self.data(report, config).to_dict()
        assert {key: data.get(key) for key in found} == found

    def test_the_license_is_copied_from_the_card_of_the_dense_model(self, tmp_path):
        dense = tmp_path / "dense"
        tiny_model("bert").save_pretrained(dense)
        model = hf_prune.AutoPrunableModelForSequenceClassification.from_pretrained(dense)
        assert origin(model) == {}
        (dense / "README.md").write_text("---\nlicense: mit\nlanguage: en\nbase_model: a/b\ntags: [x]\n---\n# Hi\n")
        model.prune(hf_prune.MagnitudeConfig(budget={"macs": 0.8}))
        model.shrink().save_pretrained(tmp_path / "small")
        data = ModelCard.load(tmp_path / "small" / "README.md").data
        assert (data.license, data.language, data.base_model) == ("mit", "en", "a/b")
        (dense / "README.md").write_text("---\nlicense: [\n---\n")
        assert origin(model) == {}


def test_intervals():
    assert wilson_interval(0.5, 100) == pytest.approx((0.404, 0.596), abs=5e-4)  # Wilson (1927) at p = 1/2
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1.0) and wilson_interval(1.0, 10)[0] < 0.75


def test_the_page_of_the_cards_has_the_commands_that_made_them():
    page = (CARDS / "README.md").read_text()
    listed = dict(re.findall(r"^\| \[[^]]+\]\(([^/]+)/README.md\) \| `(.+)` \|$", page, re.MULTILINE))
    assert listed == {name: PruningReport.load(CARDS / name).command for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_cards_in_the_repository_are_those_of_their_reports(name):
    folder = CARDS / name
    report = PruningReport.load(folder)
    config = json.loads((folder / "config.json").read_text())
    rendered = render_card(report, config, folder.name, picture=(folder / "pruning_layers.png").exists())
    assert rendered == (folder / "README.md").read_text(encoding="utf-8")
    assert report.command and (report.benchmark or report.evaluation), "cards in the repository have measured figures"
