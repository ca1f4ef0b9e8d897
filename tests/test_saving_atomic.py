"""Saving is atomic: the old folder, or the new one, whatever happens on the way."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as T
from folders import ENOSPC, holds, raising, snapshot, tokenizer
from reader import ROOT
from tiny import tiny_model

from hf_prune import MagnitudeConfig, PruningMask, PruningReport, prune, save_pretrained, shrink
from hf_prune.errors import SaveError
from hf_prune.hub import saving, staging

pytestmark = pytest.mark.usefixtures("remote_code_stays_in")


def _after_writing(error):
    """The stock method, which fails when everything is written."""
    stock = T.PreTrainedModel.save_pretrained

    def function(self, *args, **options):
        stock(self, *args, **options)
        raise error

    return function


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
from folders import holds, snapshot
from pruned import shrunk
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
