"""What a save leaves in a folder, and where a folder may be."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import transformers as T
from folders import holds, raising, snapshot
from pruned import shrunk
from reader import ROOT
from safetensors import safe_open
from tiny import tiny_model

from hf_prune import MagnitudeConfig, prune, save_pretrained, shrink
from hf_prune.hub import staging


@pytest.fixture
def old():
    return shrunk("bert", seed=1)


def others(found):
    return {name: data for name, data in found.items() if name.startswith(("checkpoint-1", "runs", "notes", "latest"))}


class TestFolder:
    def test_what_belongs_to_no_model_stays(self, folder, new):
        before = snapshot(folder)
        save_pretrained(new, folder)
        after = snapshot(folder)
        assert others(after) == others(before) and len(others(before)) == 8
        assert after["tokenizer.json"] == before["tokenizer.json"]
        assert (folder / "latest").is_symlink()
        assert holds(folder, new)

    def test_stale_shards_vanish(self, folder, new, old):
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        save_pretrained(new, folder)
        assert [file.name for file in folder.glob("*.safetensors*")] == ["model.safetensors"]
        save_pretrained(old, folder, max_shard_size="40KB")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert {file.name for file in folder.glob("*.safetensors")} == set(index["weight_map"].values())
        assert holds(folder, old)

    def test_stale_masks_and_reports_vanish(self, tmp_path, new):
        model = tiny_model("bert")
        result = prune(model, MagnitudeConfig(budget={"params": 0.8}))
        save_pretrained(shrink(model), tmp_path / "out", mask=result.mask, report=result.report)
        assert {"pruning_mask.safetensors", "pruning_report.json"} <= set(snapshot(tmp_path / "out"))
        save_pretrained(new, tmp_path / "out")
        assert set(snapshot(tmp_path / "out")) == {"config.json", "model.safetensors"}

    @pytest.mark.parametrize("options", [{}, {"safe_serialization": False}], ids=["default", "asked for"])
    def test_pickles_are_neither_written_nor_left(self, tmp_path, new, options):
        (tmp_path / "pytorch_model.bin").write_bytes(b"an older pickle")
        (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
        save_pretrained(new, tmp_path, **options)
        assert set(snapshot(tmp_path)) == {"config.json", "model.safetensors"}
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert file.metadata()["format"] == "pt"

    def test_tensors_that_are_not_of_the_model_stay(self, tmp_path, new):
        save_pretrained(new, tmp_path)
        (tmp_path / "directions.safetensors").write_bytes(b"vectors of a user")
        save_pretrained(new, tmp_path)
        assert (tmp_path / "directions.safetensors").read_bytes() == b"vectors of a user"

    def test_a_variant_is_saved_beside_the_default(self, tmp_path, new):
        save_pretrained(new, tmp_path)
        save_pretrained(new.half(), tmp_path, variant="fp16")
        assert set(snapshot(tmp_path)) == {"config.json", "model.safetensors", "model.fp16.safetensors"}
        assert T.BertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32

    def test_nothing_is_left_beside_it(self, folder, new):
        save_pretrained(new, folder)
        save_pretrained(new, folder.parent / "fresh")
        assert {path.name for path in folder.parent.iterdir()} == {"out", "fresh"}

    def test_the_caches_of_transformers_are_left_alone(self, tmp_path, new, remote_code_stays_in):
        save_pretrained(new, tmp_path / "out", standalone=True)
        left = [p for p in remote_code_stays_in.rglob("modeling_hf_prune.py")]
        assert left == []

    @pytest.mark.parametrize("name", ["new/deep/er", "with space", "ünïcode-模型", ".hidden", "a.b[c]*", "-rf"])
    def test_names(self, tmp_path, new, name):
        save_pretrained(new, tmp_path / name)
        save_pretrained(new, str(tmp_path / name) + "/")
        assert holds(tmp_path / name, new)
        assert len(list((tmp_path / name).parent.iterdir())) == 1

    def test_relative_paths(self, tmp_path, new, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save_pretrained(new, "out")
        save_pretrained(new, Path("out"))
        (tmp_path / "sub").mkdir()
        save_pretrained(new, "sub/../out")
        assert holds(tmp_path / "out", new)
        assert {path.name for path in tmp_path.iterdir()} == {"out", "sub"}

    def test_the_working_directory(self, tmp_path, new, monkeypatch):
        target = tmp_path / "here"
        target.mkdir()
        (target / "notes.md").write_text("mine")
        monkeypatch.chdir(target)
        try:
            save_pretrained(new, ".")
            assert set(os.listdir(".")) == {"config.json", "model.safetensors", "notes.md"}
            assert os.getcwd() == str(target)
        finally:
            os.chdir(ROOT)
        assert holds(target, new)

    def test_a_working_directory_that_is_gone(self, tmp_path, new):
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        try:
            (tmp_path / "gone").rmdir()
            save_pretrained(new, tmp_path / "out")
        finally:
            os.chdir(ROOT)
        assert holds(tmp_path / "out", new)

    def test_a_link_to_a_folder_is_followed(self, tmp_path, new, old):
        save_pretrained(old, tmp_path / "real")
        (tmp_path / "link").symlink_to("real")
        save_pretrained(new, tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert holds(tmp_path / "real", new)
        assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}

    def test_permissions_stay(self, tmp_path, new):
        target = tmp_path / "out"
        save_pretrained(new, target)
        (tmp_path / "plain").mkdir()
        assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
        (tmp_path / "plain" / "file").touch()
        for name in ("config.json", "model.safetensors"):
            assert (target / name).stat().st_mode == (tmp_path / "plain" / "file").stat().st_mode
        target.chmod(0o750)
        save_pretrained(new, target)
        assert target.stat().st_mode & 0o777 == 0o750

    @pytest.mark.parametrize("links", [True, False])
    def test_permissions_of_other_files_stay(self, folder, new, monkeypatch, links):
        if not links:
            monkeypatch.setattr(os, "link", raising(OSError(errno.EPERM, "no hard links here")))
        (folder / "run.sh").write_text("#!/bin/sh")
        (folder / "run.sh").chmod(0o755)
        (folder / "token").write_text("secret")
        (folder / "token").chmod(0o600)
        save_pretrained(new, folder)
        assert (folder / "run.sh").stat().st_mode & 0o777 == 0o755
        assert (folder / "token").stat().st_mode & 0o777 == 0o600

    def test_without_an_atomic_exchange(self, folder, new, monkeypatch):
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
        before = others(snapshot(folder))
        save_pretrained(new, folder)
        assert holds(folder, new) and others(snapshot(folder)) == before
        assert [path.name for path in folder.parent.iterdir()] == ["out"]

    def test_without_hard_links(self, folder, new, monkeypatch):
        monkeypatch.setattr(os, "link", raising(OSError(errno.EPERM, "no hard links here")))
        before = others(snapshot(folder))
        save_pretrained(new, folder)
        assert holds(folder, new) and others(snapshot(folder)) == before

    def test_an_open_log_goes_on(self, folder, new):
        with open(folder / "runs" / "Nov21" / "events.out", "ab", buffering=0) as log:
            save_pretrained(new, folder)
            log.write(b"after")
        assert (folder / "runs" / "Nov21" / "events.out").read_bytes().endswith(b"after")
