import os
import shutil

# Small matrices on few cores: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from reader import furnish  # noqa: E402
from tiny import parameters_as_time  # noqa: E402

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
