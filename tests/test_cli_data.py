"""Data for `hf-prune prune`, from files and from the Hub."""

import json
import sys

import pytest
from folders import TEXTS, save_tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_prune


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
