import json
import os
import shutil
from pathlib import Path

# Small matrices on few cores: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from folders import TEXTS, save_tiny, tokenizer  # noqa: E402
from pruned import shrunk  # noqa: E402
from reader import furnish  # noqa: E402
from tiny import parameters_as_time, tiny_model  # noqa: E402

import hf_prune  # noqa: E402
from hf_prune.architectures import registry  # noqa: E402
from hf_prune.cli import main  # noqa: E402
from hf_prune.methods import base  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)


@pytest.fixture
def random_mask():
    """random_mask(units, seed=0, drop=False): keeps between one and all but one unit of each group, by chance."""

    def make(units: hf_prune.PrunableUnits, seed: int = 0, drop: bool = False) -> hf_prune.PruningMask:
        generator = torch.Generator().manual_seed(seed)
        keep = {}
        for group in units.values():
            vector = torch.ones(group.size, dtype=torch.bool)
            if group.kind == "layers":
                vector[1] = not drop
            elif group.prunable:
                kept = int(torch.randint(1, max(group.size, 2), (1,), generator=generator))
                vector[torch.randperm(group.size, generator=generator)[kept:]] = False
            keep[group.name] = vector
        return hf_prune.PruningMask(keep, units)

    return make


@pytest.fixture(scope="session")
def _furnished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    furnish(folder)
    return folder


@pytest.fixture
def reader(tmp_path, monkeypatch, _furnished):
    """The working directory of someone who follows a page, see reader.py; what the page registers goes with it."""
    shutil.copytree(_furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hf_prune.layer_timing._clocked", parameters_as_time)
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    monkeypatch.setattr(base, "_PRUNERS", dict(base._PRUNERS))
    return tmp_path


@pytest.fixture
def run(capsys):
    """Call the command line: exit code, stdout, stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """The folder of a model for the command line, with its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A file of texts for the model of `dense`."""
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    return str(path)


@pytest.fixture
def remote_code_stays_in(tmp_path_factory, monkeypatch):
    """The copies that transformers makes of remote code go to a temporary folder."""
    cache = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    return cache


@pytest.fixture
def new():
    """A pruned model to save over what is in `folder`."""
    return shrunk("bert", seed=2)


@pytest.fixture(scope="session")
def _template(tmp_path_factory):
    target = tmp_path_factory.mktemp("template") / "out"
    hf_prune.save_pretrained(shrunk("bert", seed=1), target, processing_class=tokenizer(), max_shard_size="20KB")
    (target / "checkpoint-1").mkdir()
    (target / "checkpoint-1" / "model.safetensors").write_bytes(b"the weights of a checkpoint")
    (target / "checkpoint-1" / "config.json").write_text("{}")
    (target / "runs" / "Nov21").mkdir(parents=True)
    (target / "runs" / "Nov21" / "events.out").write_bytes(bytes(range(256)))
    (target / "notes.md").write_text("mine")
    (target / "latest").symlink_to("checkpoint-1")
    return target


@pytest.fixture
def folder(tmp_path, _template):
    """A folder of a user: an earlier checkpoint in shards, a tokenizer, checkpoints and logs of a training run."""
    return Path(shutil.copytree(_template, tmp_path / "out", symlinks=True))


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folder of a pruned model, saved with its report and its card."""
    folder = tmp_path_factory.mktemp("saved") / "bert-small"
    model = hf_prune.prunable(tiny_model("bert"))
    config = hf_prune.KCMConfig(budget={"macs": 0.7}, exclude=("encoder.layer.0.*",))
    model.prune(config, ["good film", "very bad film", "good", "very very bad"] * 8, processing_class=tokenizer())
    model.shrink().save_pretrained(folder, processing_class=tokenizer())
    return folder


@pytest.fixture
def report(saved):
    """The report in `saved`."""
    return hf_prune.PruningReport.load(saved)


@pytest.fixture
def config(saved):
    """The config in `saved`."""
    return json.loads((saved / "config.json").read_text())
