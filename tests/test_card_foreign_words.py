"""What must never be in a model card: markup of others, and secrets."""

import json
import re

import pytest
import yaml
from pruned import measured

from hf_prune import PruningReport, render_card
from hf_prune.hub.card import MARKER
from hf_prune.hub.markdown import block, code, text
from hf_prune.redaction import redact

HOSTILE = [
    "</details><script>alert(1)</script>",
    "| a | b |\n| --- | --- |\n# Title",
    "{{ 7 * 7 }}{% raw %}",
    "---\nlicense: evil\n---",
    "``` \n~~~~ ````",
    "[link](javascript:alert(1)) ![x](http://y) **b** `c` $x$",
    "\u202egnp.exe\x00\x1b[31m",
]
SECRETS = {
    "hf_" + "Ab1" * 11: "a token",
    "ghp_" + "Ab1" * 12: "a token",
    "https://me:hunter2@example.com/x": "hunter2",
    "--hub-token hunter3x": "hunter3x",
    "https://example.com/?token=hunter4x&a=1": "hunter4x",
    "Authorization: Bearer hunter5x": "hunter5x",
    "https://me:p@hunter6x@example.com/x": "hunter6x",
    "https://me:p/hunter7x@example.com/x": "hunter7x",
    "Authorization: Basic aHVudGVyOHg6eA": "aHVudGVyOHg6eA",
    "curl -u alice:hunter9x example.com": "hunter9x",
    "/home/canary/secret-project": "canary",
    "/Users/canary/secret-project": "canary",
    "C:\\Users\\canary\\secret": "canary",
    "the value sesame-open-now": "sesame-open-now",
}


def planted(report, words):
    """A report that has these words in every field that takes any."""
    data = measured(report).to_dict()
    data.update(method=words, model_type=words, command=words, sequence_lengths={words: 27.0})
    data["config"] |= {words: words, "seed": words, "recover": words}
    data["facts"] |= {"recover": words}
    data["packages"] |= {words: words}
    data["recovery"] = {words: words}
    data["calibration"] |= {"dataset": words, "split": words, "revision": words, "sha256": words}
    data["metadata"] = dict.fromkeys(
        ("base_model", "license", "license_name", "license_link", "language", "datasets", "tags", "base_revision"),
        words,
    )
    data["papers"] = [dict.fromkeys(("title", "venue", "arxiv", "authors", "url"), words)]
    for row in data["evaluation"]:
        row |= dict.fromkeys(("metric", "dataset", "config", "split", "revision"), words)
    for row in data["benchmark"]:
        row["name"] = words
        for run in row["latency"]:
            run |= {"device": words, "dtype": words}
    for row in data["units"]:
        row |= {"name": f"{row['name']}{words}", "stack": f"{row['stack']}{words}"}
    data["verified"] |= {"dtype": words, "attention": words}
    return PruningReport.from_dict(data)


class TestForeignWords:
    @pytest.mark.parametrize("words", HOSTILE)
    def test_they_stay_words(self, report, config, words):
        card = render_card(planted(report, words), config, words)
        _, head, body = card.split("---\n", 2)
        data = yaml.safe_load(head)
        assert set(data) <= {"tags", "pipeline_tag", "library_name", "model-index"}, data
        outside = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", body, flags=re.DOTALL | re.MULTILINE)
        outside = re.sub(r"(?<!\\)`[^`\n]*`", "", outside)
        tags = re.findall(r"<[^>]*>", outside)
        assert set(tags) <= {MARKER, "<details>", "</details>", "<summary>", "</summary>"}
        assert [line for line in outside.splitlines() if line.startswith("#")][0].startswith("# ")
        assert sum(line.startswith("# ") for line in outside.splitlines()) == 1
        assert "49" not in outside and not re.search(r"(?<!\\)\]\((javascript|http):", outside)
        assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", outside)
        for line in outside.splitlines():  # no cell is split in two
            if line.startswith("| encoder"):
                assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", rows_head(outside)))

    @pytest.mark.parametrize(("words", "secret"), SECRETS.items())
    def test_secrets_are_left_out(self, report, config, words, secret, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "sesame-open-now")
        secret = words if secret == "a token" else secret
        report = planted(report, words)
        assert secret in json.dumps(report.to_dict())  # the canary is there
        assert secret not in render_card(report, config, words)
        report.save(tmp_path / "report.json")
        assert secret not in (tmp_path / "report.json").read_text()

    def test_home(self, monkeypatch):
        monkeypatch.setenv("HOME", "/srv/people/canary")
        assert redact("see /srv/people/canary/x and /srv/people/canary2") == "see ~/x and /srv/people/canary2"
        assert redact({"hub_token": "x", "Authorization": "x", "pad_token": "[PAD]", "tokens": 5}) == {
            "hub_token": "...",
            "Authorization": "...",
            "pad_token": "[PAD]",
            "tokens": 5,
        }

    def test_plain_words_come_out_as_they_are(self):
        sentence = "Accuracy of 5,120 tokens at 0.5 - see a/b.c (n = 3)"
        assert redact(sentence) == text(sentence) == code(sentence) == sentence
        assert block("a\n```\nb") == "````\na\n```\nb\n````"


def rows_head(body):
    return next(line for line in body.splitlines() if line.startswith("| kept |"))
