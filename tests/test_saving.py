"""Saving is verified and atomic: the old folder, or the new one, whatever happens on the way."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from safetensors import safe_open
from safetensors.torch import load_file
from test_layout import SOME, logits, shrunk, uneven
from tiny import FAMILIES, tiny_batch, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from hf_prune import (
    MagnitudeConfig,
    PruningMask,
    PruningReport,
    WeightMagnitudeConfig,
    apply_mask,
    current_mask,
    layout,
    prunable,
    prunable_units,
    prune,
    remove_mask,
    save_pretrained,
    shrink,
)
from hf_prune.errors import MaskError, SaveError
from hf_prune.hub import saving, staging, standalone

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def remote_code_stays_in(tmp_path_factory, monkeypatch):
    """The copies that transformers makes of remote code go to a temporary folder."""
    cache = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(T.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    return cache


def snapshot(folder):
    """Every file below a folder with what it holds; links as they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def weights(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        if file.name != "pruning_mask.safetensors":
            found |= load_file(file)
    return found


def holds(folder, model):
    """The folder loads, and holds the weights of a model."""
    again = type(model).from_pretrained(folder).state_dict()
    mine = model.state_dict()
    return again.keys() == mine.keys() and all(torch.equal(again[key], mine[key]) for key in mine)


def tokenizer(extra=()):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "very", "film", *extra]
    raw = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")


@pytest.fixture
def old():
    return shrunk("bert", seed=1)


@pytest.fixture
def new():
    return shrunk("bert", seed=2)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder of a user: an earlier checkpoint in shards, a tokenizer, checkpoints and logs of a training run."""
    target = tmp_path_factory.mktemp("template") / "out"
    save_pretrained(shrunk("bert", seed=1), target, processing_class=tokenizer(), max_shard_size="20KB")
    (target / "checkpoint-1").mkdir()
    (target / "checkpoint-1" / "model.safetensors").write_bytes(b"the weights of a checkpoint")
    (target / "checkpoint-1" / "config.json").write_text("{}")
    (target / "runs" / "Nov21").mkdir(parents=True)
    (target / "runs" / "Nov21" / "events.out").write_bytes(bytes(range(256)))
    (target / "notes.md").write_text("mine")
    (target / "latest").symlink_to("checkpoint-1")
    return target


@pytest.fixture
def folder(tmp_path, template):
    return Path(shutil.copytree(template, tmp_path / "out", symlinks=True))


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


def raising(error):
    def function(*args, **options):
        raise error

    return function


def _after_writing(error):
    """The stock method, which fails when everything is written."""
    stock = T.PreTrainedModel.save_pretrained

    def function(self, *args, **options):
        stock(self, *args, **options)
        raise error

    return function


ENOSPC = OSError(errno.ENOSPC, "No space left on device")
# step -> (object, attribute): each is made to raise
STEPS = {
    "before the weights": (T.PreTrainedModel, "save_pretrained"),
    "config": (T.PreTrainedConfig, "save_pretrained"),
    "tokenizer": (T.PreTrainedTokenizerFast, "save_pretrained"),
    "mask": (PruningMask, "save"),
    "report": (PruningReport, "save"),
    "standalone code": (saving, "add_standalone_code"),
    "verification": (saving, "_verify"),
    "flush": (os, "fsync"),
    "swap": (staging, "_replace"),
}


@pytest.fixture(scope="module")
def pruned():
    model = tiny_model("bert", seed=3)
    result = prune(model, MagnitudeConfig(budget={"params": 0.7}))
    return shrink(model), result


class TestCrash:
    @pytest.fixture
    def everything(self, folder, pruned):
        """A save that takes every step, over an older checkpoint. The files that it will write again differ."""
        model, result = pruned
        (folder / "pruning_report.json").write_text("an older report")
        (folder / "pruning_mask.safetensors").write_bytes(b"an older mask")
        (folder / "modeling_hf_prune.py").write_text("# older code")
        options = {
            "mask": result.mask,
            "report": result.report,
            "processing_class": tokenizer(["new", "words"]),
            "standalone": True,
        }
        return model, folder, options

    @pytest.mark.parametrize(
        ("step", "error"),
        [
            *((step, ENOSPC) for step in STEPS),
            *(
                (step, error)
                for step in ("tokenizer", "flush")
                for error in (RuntimeError("broken"), KeyboardInterrupt())
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else type(value).__name__,
    )
    def test_the_old_folder_is_intact(self, everything, monkeypatch, step, error):
        model, folder, options = everything
        before = snapshot(folder)
        monkeypatch.setattr(*STEPS[step], raising(error))
        with pytest.raises(SaveError if isinstance(error, OSError) else type(error)) as failure:
            save_pretrained(model, folder, **options)
        if isinstance(error, OSError):
            assert "No space left" in str(failure.value)
        assert snapshot(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["out"]

    def test_after_the_weights(self, everything, monkeypatch):
        model, folder, options = everything
        before = snapshot(folder)
        monkeypatch.setattr(T.PreTrainedModel, "save_pretrained", _after_writing(ENOSPC))
        with pytest.raises(SaveError, match="No space left"):
            save_pretrained(model, folder, **options)
        assert snapshot(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["out"]

    @pytest.mark.parametrize("step", STEPS)
    def test_a_new_folder_does_not_appear(self, tmp_path, pruned, monkeypatch, step):
        model, result = pruned
        monkeypatch.setattr(*STEPS[step], raising(ENOSPC))
        options = {"mask": result.mask, "report": result.report, "processing_class": tokenizer()}
        with pytest.raises(SaveError):
            save_pretrained(model, tmp_path / "out", standalone=True, **options)
        assert list(tmp_path.iterdir()) == []

    def test_without_exchange_a_failed_second_rename_puts_the_old_folder_back(self, folder, new, monkeypatch):
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
        before, rename, calls = snapshot(folder), os.rename, []

        def second_fails(source, target):
            calls.append(target)
            if len(calls) == 2:
                raise OSError(errno.EIO, "I/O error")
            rename(source, target)

        monkeypatch.setattr(os, "rename", second_fails)
        with pytest.raises(SaveError, match="I/O error"):
            save_pretrained(new, folder)
        assert len(calls) == 3
        assert snapshot(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["out"]

    def test_without_exchange_a_failed_first_rename(self, folder, new, monkeypatch):
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
        before = snapshot(folder)
        monkeypatch.setattr(os, "rename", raising(OSError(errno.EBUSY, "Device or resource busy")))
        with pytest.raises(SaveError, match="busy"):
            save_pretrained(new, folder)
        assert snapshot(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["out"]

    def test_a_full_disk(self, folder, new):
        """The writer itself fails half way: no file may grow beyond 50 kB."""
        before = snapshot(folder)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(SaveError, match="File too large"):
                save_pretrained(new, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert snapshot(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["out"]
        save_pretrained(new, folder)
        assert holds(folder, new)

    def test_the_target_is_a_file(self, tmp_path, new):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(SaveError, match="is a file"):
            save_pretrained(new, tmp_path / "out")
        assert snapshot(tmp_path) == {"out": b"mine"}

    def test_the_parent_is_a_file(self, tmp_path, new):
        (tmp_path / "file").write_text("mine")
        for target in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "out"):
            with pytest.raises(SaveError, match="Can't write"):
                save_pretrained(new, target)
        assert snapshot(tmp_path) == {"file": b"mine"}

    def test_the_parent_is_read_only(self, tmp_path, new, monkeypatch):
        monkeypatch.setattr(Path, "mkdir", raising(PermissionError(errno.EACCES, "Permission denied")))
        with pytest.raises(SaveError, match="Permission denied"):
            save_pretrained(new, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_dangling_link(self, tmp_path, new):
        (tmp_path / "out").symlink_to("nowhere")
        with contextlib.suppress(SaveError):
            save_pretrained(new, tmp_path / "out")
            assert holds(tmp_path / "out", new)
        assert {path.name for path in tmp_path.iterdir()} <= {"out", "nowhere"}
        assert os.readlink(tmp_path / "out") == "nowhere"


_PROCESSES = """
import contextlib, json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
import transformers as T
from test_layout import shrunk
from test_saving import holds, snapshot
from hf_prune import save_pretrained
from hf_prune.errors import SaveError
T.utils.logging.disable_progress_bar()
target = Path(sys.argv[1])
models = [shrunk("bert", seed=1), shrunk("bert", seed=2, vocab_size=60)]
options = [{"max_shard_size": "20KB"}, {}]
files = []
for model, how in zip(models, options):
    save_pretrained(model, target, **how)
    files.append(snapshot(target))
started = time.perf_counter()
save_pretrained(models[0], target, **options[0])
once = time.perf_counter() - started
random.seed(0)
seen, litter = [], 0
while len(seen) < 8 or (set(seen) != {0, 1} or not litter) and len(seen) < 60:
    child = os.fork()
    if not child:
        try:
            while True:
                for model, how in zip(models, options):
                    save_pretrained(model, target, **how)
        finally:
            os._exit(1)
    time.sleep(random.uniform(once / 2, 4 * once))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    found = snapshot(target)
    which = [index for index in (0, 1) if found == files[index] and holds(target, models[index])]
    beside = [path.name for path in target.parent.iterdir() if path != target]
    litter += bool(beside)
    assert all(name.startswith(".out.") for name in beside), beside
    assert os.WIFSIGNALED(status) and which, sorted(found)
    seen.append(which[0])
for path in target.parent.iterdir():
    if path != target:
        shutil.rmtree(path)
children = []
for model, how in zip(models, options):
    children.append(os.fork())
    if not children[-1]:
        try:
            for _ in range(6):
                with contextlib.suppress(SaveError):
                    save_pretrained(model, target, **how)
            os._exit(0)
        finally:
            os._exit(1)
codes = [os.waitpid(child, 0)[1] for child in children]
found = snapshot(target)
whole = any(found == files[index] and holds(target, models[index]) for index in (0, 1))
beside = [path.name for path in target.parent.iterdir() if path != target]
print(json.dumps({"seen": seen, "litter": litter, "codes": codes, "whole": whole, "beside": beside}))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What is found after processes saved two checkpoints to one folder again and again: killed, then side by side."""
    target = tmp_path_factory.mktemp("processes") / "out"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PROCESSES, str(target)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_at_any_moment(processes):
    """After each SIGKILL the folder loads, and is exactly one of the two checkpoints; the subject asserts that."""
    assert set(processes["seen"]) == {0, 1}
    assert processes["litter"] > 0  # at least one kill hit a save in the middle


def test_two_at_once_leave_one_of_them(processes):
    assert processes["codes"] == [0, 0]
    assert processes["whole"]
    assert processes["beside"] == []


class TestVerification:
    def spoil(self, monkeypatch, change):
        stock = T.PreTrainedModel.save_pretrained

        def function(self, directory, *args, **options):
            stock(self, directory, *args, **options)
            change(Path(directory))

        monkeypatch.setattr(T.PreTrainedModel, "save_pretrained", function)

    def refused(self, model, folder, match, **options):
        before = snapshot(folder)
        with pytest.raises(SaveError, match=match):
            save_pretrained(model, folder, **options)
        assert snapshot(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["out"]

    @pytest.mark.parametrize("options", [{}, {"standalone": True}], ids=["plain", "standalone"])
    def test_another_weight(self, folder, new, monkeypatch, options):
        stock = T.PreTrainedModel.save_pretrained

        def function(self, directory, state_dict, **more):
            state_dict["classifier.bias"] = state_dict["classifier.bias"] + 1e-6
            stock(self, directory, state_dict=state_dict, **more)

        monkeypatch.setattr(T.PreTrainedModel, "save_pretrained", function)
        self.refused(new, folder, "classifier.bias", **options)

    def test_a_missing_weight(self, folder, new, monkeypatch):
        stock = T.PreTrainedModel.save_pretrained

        def function(self, directory, state_dict, **more):
            del state_dict["classifier.weight"]
            stock(self, directory, state_dict=state_dict, **more)

        monkeypatch.setattr(T.PreTrainedModel, "save_pretrained", function)
        self.refused(new, folder, "classifier.weight")

    def test_truncated_weights(self, folder, new, monkeypatch):
        def cut(directory):
            file = directory / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-100])

        self.spoil(monkeypatch, cut)
        self.refused(new, folder, "does not load again")

    def test_a_broken_config(self, folder, new, monkeypatch):
        self.spoil(monkeypatch, lambda directory: (directory / "config.json").write_text("{"))
        self.refused(new, folder, "does not load again")

    def test_a_layout_that_does_not_fit(self, folder, new, monkeypatch):
        def widen(directory):
            found = json.loads((directory / "config.json").read_text())
            found["hf_prune"]["numbers"].pop("encoder.layer.0.output.dense.in_features")
            (directory / "config.json").write_text(json.dumps(found))

        self.spoil(monkeypatch, widen)
        self.refused(new, folder, "does not load again")

    def test_state_that_no_file_holds(self, folder, new):
        new.bert.encoder.layer[0].attention.self.scaling = 3.0
        self.refused(new, folder, "computes something else")

    def test_a_hook_that_the_file_does_not_hold(self, folder, new):
        new.classifier.register_forward_hook(lambda module, args, output: output + 1)
        self.refused(new, folder, "computes something else")

    def test_a_reloaded_model_that_does_not_run(self, folder, new, monkeypatch):
        reload = saving._reload

        def broken(*args):
            model = reload(*args)
            model.forward = raising(RuntimeError("shapes cannot be multiplied"))
            return model

        monkeypatch.setattr(saving, "_reload", broken)
        self.refused(new, folder, "shapes cannot be multiplied")

    def test_disabled_layouts_fail_here_not_at_the_user(self, folder, new):
        layout.disable()
        try:
            self.refused(new, folder, "does not load again")
        finally:
            layout.enable()

    def test_saving_standalone_does_not_enable_what_was_disabled(self, tmp_path, new):
        layout.disable()
        try:
            save_pretrained(new, tmp_path / "out", standalone=True)
            assert not hasattr(T.PreTrainedModel.post_init, "_hf_prune")
        finally:
            layout.disable()
            layout.enable()

    def test_a_family_whose_inputs_are_unknown_is_saved_with_a_warning(self, tmp_path, new, monkeypatch):
        new.main_input_name = "input_values"
        warnings = []
        monkeypatch.setattr(saving.logger, "warning", lambda message, *args: warnings.append(message))
        save_pretrained(new, tmp_path / "out")
        assert any("not compared" in message for message in warnings)
        del new.main_input_name
        assert holds(tmp_path / "out", new)

    def test_corrupted_weights_are_refused_at_load(self, tmp_path, new):
        """A file that was damaged later."""
        save_pretrained(new, tmp_path)
        file = tmp_path / "model.safetensors"
        whole = file.read_bytes()
        for broken in (whole[:-1], whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 16 + whole[16:]):
            file.write_bytes(broken)
            with pytest.raises(Exception, match="(?i)safetensor|header|incomplete|invalid|metadata|corrupt"):
                T.AutoModelForSequenceClassification.from_pretrained(tmp_path)


class Scorer(T.BertPreTrainedModel):
    """A model of a user."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = T.BertModel(config)
        self.score = torch.nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None):
        hidden = self.bert(input_ids, attention_mask).last_hidden_state[:, 0]
        return T.modeling_outputs.SequenceClassifierOutput(logits=self.score(hidden))


class TestTheModelInMemory:
    def test_nothing_about_it_changes(self, tmp_path):
        model = shrunk("bert")
        model.train()
        model.bert.embeddings.eval()
        model.classifier.weight.requires_grad = False
        model(**tiny_batch("bert"), labels=torch.tensor([0, 1, 0])).loss.backward()
        modes = [module.training for module in model.modules()]
        grads = [parameter.grad for parameter in model.parameters()]
        values, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
        for options in ({}, {"standalone": True}):
            save_pretrained(model, tmp_path / "out", **options)
            assert [module.training for module in model.modules()] == modes
            assert torch.equal(torch.get_rng_state(), random)
            assert all(a is b for a, b in zip([p.grad for p in model.parameters()], grads, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), values, strict=True))
            assert not hasattr(model.config, "auto_map")
        assert not model.classifier.weight.requires_grad

    def test_a_failed_save_changes_nothing(self, folder, monkeypatch):
        model = tiny_model("bert")
        apply_mask(model, uneven(model, drop=False))
        mask, expected = current_mask(model), logits(model, tiny_batch("bert"))
        model.train()
        monkeypatch.setattr(os, "fsync", raising(ENOSPC))
        with pytest.raises(SaveError):
            save_pretrained(model, folder)
        assert model.training and current_mask(model) == mask
        assert torch.equal(logits(model, tiny_batch("bert")), expected)

    def test_tuples_instead_of_outputs(self, tmp_path):
        model = shrunk("bert", return_dict=False)
        save_pretrained(model, tmp_path)
        assert holds(tmp_path, model)

    def test_a_head_of_a_user(self, tmp_path):
        model = Scorer(tiny_model("bert").config)
        shrink(model, uneven(model))
        save_pretrained(model, tmp_path / "out")
        assert holds(tmp_path / "out", model)
        # Where only transformers is there, nobody knows that class
        with pytest.raises(SaveError, match="Scorer"):
            save_pretrained(model, tmp_path / "standalone", standalone=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize(
        "cls",
        [
            T.BertModel,
            T.BertForMaskedLM,
            T.BertForPreTraining,
            T.BertForNextSentencePrediction,
            T.BertLMHeadModel,
            T.BertForMultipleChoice,
            T.BertForTokenClassification,
            T.BertForQuestionAnswering,
            T.BertForSequenceClassification,
        ],
    )
    def test_every_head_of_bert(self, tmp_path, cls):
        model = cls(tiny_model("bert").config).eval()
        shrink(model, uneven(model))
        save_pretrained(model, tmp_path, standalone=True)
        assert holds(tmp_path, model)

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_a_classifier_that_has_no_padding_token(self, tmp_path, name):
        model = shrunk(name, T.AutoModelForSequenceClassification, pad_token_id=None)
        save_pretrained(model, tmp_path)
        assert holds(tmp_path, model)

    def test_options_of_the_stock_method(self, tmp_path, new):
        save_pretrained(new, tmp_path / "other rank", is_main_process=False)
        assert not list(tmp_path.rglob("*.safetensors"))
        state = {key: value + 1 for key, value in new.state_dict().items()}
        save_pretrained(new, tmp_path / "given", state_dict=dict(state))
        found = weights(tmp_path / "given")
        assert all(torch.equal(found[key], state[key]) for key in found)
        with pytest.raises(SaveError, match="push_to_hub"):
            save_pretrained(new, tmp_path / "pushed", push_to_hub=True)
        assert not (tmp_path / "pushed").exists()


class TestMasked:
    """A model that is masked but not shrunk is saved dense, with zeros where the mask closes a unit."""

    @pytest.mark.parametrize("name", FAMILIES)
    def test_dense_shapes_and_the_masked_function(self, tmp_path, name):
        model, batch = tiny_model(name), tiny_batch(name)
        shape = {key: value.shape for key, value in model.state_dict().items()}
        dense = logits(model, batch)
        mask = uneven(model, drop=False)
        apply_mask(model, mask)
        masked = logits(model, batch)
        assert not torch.allclose(masked, dense)
        save_pretrained(model, tmp_path)

        again = FAMILIES[name][1].from_pretrained(tmp_path)
        assert type(again) is type(model)
        assert {key: value.shape for key, value in again.state_dict().items()} == shape
        torch.testing.assert_close(logits(again, batch), masked, atol=1e-5, rtol=1e-5)
        assert "hf_prune" not in json.loads((tmp_path / "config.json").read_text())
        assert PruningMask.load(tmp_path) == mask == current_mask(model)
        # The model in memory keeps its weights: the mask can be taken off
        remove_mask(model)
        assert torch.equal(logits(model, batch), dense)

    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
    def test_the_zeros_are_those_of_the_mask(self, tmp_path, name):
        model = tiny_model(name)
        apply_mask(model, uneven(model, drop=False))
        save_pretrained(model, tmp_path)
        again = FAMILIES[name][1].from_pretrained(tmp_path)
        mask = PruningMask.load(tmp_path)
        units = prunable_units(again)
        for group in units.of_kind("heads", "neurons"):
            module = again.base_model.get_submodule(group.name)
            columns = module.weight if name == "gpt2" else module.weight.T
            zero = columns.reshape(group.size, -1).eq(0).all(1)
            assert torch.equal(~zero, mask[group.name]), group.name

    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bart"])
    def test_the_mask_shrinks_what_was_saved(self, tmp_path, name):
        model, batch = tiny_model(name), tiny_batch(name)
        apply_mask(model, uneven(model, drop=False))
        save_pretrained(model, tmp_path)
        again = FAMILIES[name][1].from_pretrained(tmp_path)
        shrink(again, PruningMask.load(tmp_path))
        torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-5, rtol=1e-5)
        assert again.num_parameters() < model.num_parameters()

    def test_sharded_and_in_half_precision(self, tmp_path):
        model, batch = tiny_model("bert").to(torch.bfloat16), tiny_batch("bert")
        apply_mask(model, uneven(model, drop=False))
        save_pretrained(model, tmp_path, max_shard_size="20KB")
        again = T.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert again.dtype == torch.bfloat16
        torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=2e-2, rtol=2e-2)

    def test_masked_layers_are_refused(self, folder):
        model = tiny_model("bert")
        apply_mask(model, uneven(model, drop=True))
        before = snapshot(folder)
        with pytest.raises(MaskError, match="shrink"):
            save_pretrained(model, folder)
        assert snapshot(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["out"]

    def test_no_gate_is_in_the_checkpoint(self, tmp_path):
        model = tiny_model("bert")
        apply_mask(model, uneven(model, drop=False))
        save_pretrained(model, tmp_path)
        assert not [key for key in weights(tmp_path) if "gate" in key]

    def test_a_shrunk_model_that_is_masked_again(self, tmp_path):
        model, batch = shrunk("phi3", drop=False), tiny_batch("phi3")
        apply_mask(model, uneven(model, drop=False))
        masked = logits(model, batch)
        save_pretrained(model, tmp_path)
        again = T.AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(logits(again, batch), masked, atol=1e-5, rtol=1e-5)
        assert again.config.hf_prune == model.config.hf_prune


class TestMaskAndReport:
    def test_prunable_saves_both(self, tmp_path):
        model = prunable(tiny_model("bert"))
        result = model.prune(MagnitudeConfig(budget={"params": 0.7}))
        model.shrink().save_pretrained(tmp_path)
        assert PruningMask.load(tmp_path) == result.mask
        assert PruningReport.load(tmp_path) == result.report
        assert holds(tmp_path, model)

    def test_prunable_is_verified(self, tmp_path):
        model = prunable(shrunk("bert"))
        model.bert.encoder.layer[0].attention.self.scaling = 3.0
        with pytest.raises(SaveError, match="computes something else"):
            model.save_pretrained(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


class TestStandalone:
    @pytest.mark.parametrize("name", SOME)
    def test_the_code_is_listed_for_every_auto_class(self, tmp_path, name):
        model = shrunk(name)
        save_pretrained(model, tmp_path, standalone=True)
        found = json.loads((tmp_path / "config.json").read_text())
        autos = standalone.auto_classes(model.config.model_type)
        assert found["auto_map"] == {auto: f"modeling_hf_prune.{cls}" for auto, cls in autos.items()}
        assert type(model).__name__ in autos.values()
        code = (tmp_path / "modeling_hf_prune.py").read_text()
        compile(code, "modeling_hf_prune.py", "exec")
        assert (
            "hf_prune." not in code.replace("config.hf_prune", "").replace("update hf_prune.", "")
            and "import hf_prune" not in code
        )

    def test_a_later_plain_save_does_not_leave_code_behind(self, tmp_path, new):
        save_pretrained(new, tmp_path, standalone=True)
        save_pretrained(new, tmp_path)
        assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
        assert set(snapshot(tmp_path)) == {"config.json", "model.safetensors"}

    def test_the_code_refuses_hostile_layouts_too(self, tmp_path, new):
        save_pretrained(new, tmp_path, standalone=True)
        found = json.loads((tmp_path / "config.json").read_text())
        found["hf_prune"]["numbers"]["encoder.layer.0.output.dense.in_features"] = 10**12
        (tmp_path / "config.json").write_text(json.dumps(found))
        layout.disable()
        try:
            with pytest.raises(ValueError, match="encoder.layer.0.output.dense.in_features"):
                T.AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
        finally:
            layout.enable()


def test_mixed_dtypes_are_told_apart_from_other_mismatches(tmp_path):
    model = tiny_model("bert").to(torch.bfloat16)
    model.bert.encoder.layer[0].output.LayerNorm.float()
    model.bert.encoder.layer[0].output.LayerNorm.weight.data += 1e-4  # what bfloat16 can't hold
    with pytest.raises(SaveError, match="layer.0.output.LayerNorm.* is torch.float32 in memory and torch.bfloat16"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["pruned", "dense"])
def test_a_model_from_gguf_is_saved_as_what_it_is(how, tmp_path):
    model = tiny_model("llama")
    model.config.quantization_config = T.GgufConfig()
    model.hf_quantizer, model.is_quantized = GgufHfQuantizer(model.config.quantization_config), True
    model.quantization_method = "gguf"
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "stock")
    if how == "pruned":
        prune(model, WeightMagnitudeConfig(sparsity=0.5))
    save_pretrained(model, tmp_path / "out")
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert not model.is_quantized and "quantization_config" not in again.config.to_dict()
    T.Trainer(model, T.TrainingArguments(tmp_path / "trainer", report_to="none"))  # does not refuse it
