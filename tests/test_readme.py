"""The Python of the README runs, block after block, on a tiny model in place of the reader's."""

import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

import hf_prune
from hf_prune.architectures import registry
from hf_prune.methods import base

README = (Path(__file__).parent.parent / "README.md").read_text()


def save_tokenizer(folder, words):
    from transformers import BertTokenizerFast

    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words))]))
    BertTokenizerFast(str(vocab)).save_pretrained(folder)


def test_the_blocks_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    monkeypatch.setattr(base, "_PRUNERS", dict(base._PRUNERS))
    tiny_model("bert").save_pretrained(tmp_path / "bert-sst2")
    save_tokenizer(tmp_path / "bert-sst2", "a few hundred to thousand unlabelled texts like those of the task".split())
    names = {"torch": torch}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    dense, small = (
        sum(p.numel() for p in tiny_model("bert").parameters()),
        sum(p.numel() for p in names["model"].parameters()),
    )
    assert small < dense
    mask = hf_prune.prune(tiny_model("bert"), names["FirstConfig"](budget={"macs": 0.7})).mask
    assert all(vector[: int(vector.sum())].all() for vector in mask.values())


def test_the_table_of_families_is_complete():
    listed = README.partition("## Families")[2].partition("Some layers")[0].lower().replace("-", "").replace(" ", "")
    names = {"gemma3_text": "gemma3(text)", "gpt_neox": "gptneox", "debertav2": "debertav2/v3"}
    for model_type in hf_prune.known_model_types():
        plain = model_type.replace("-", "")
        assert names.get(plain, plain) in listed, model_type


@pytest.mark.parametrize("method", [cls.config_class.__name__ for cls in base._PRUNERS.values()])
def test_the_table_of_methods_is_complete(method):
    assert f"`{method}`" in README
