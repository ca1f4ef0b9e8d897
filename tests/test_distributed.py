"""One and two processes find the same masks, weights, gates and fronts: see launched.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For the name of a run what came of it in one process, and in both of two."""
    folder = tmp_path_factory.mktemp("distributed")
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_PRUNE_CACHE": str(folder)}
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher in ([], two):
        command = [sys.executable, *launcher, HERE / "launched.py", folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return lambda name: [folder / f"{name}{who}" for who in ("-1-0", "-2-0", "-2-1")]


@pytest.fixture
def loaded(results):
    return lambda name: [torch.load(path) for path in results(name)]


def test_pruning(results, loaded):
    runs = {path.name.removesuffix("-1-0") for path in results("")[0].parent.glob("prune-*-1-0")}
    assert len(runs) == 38
    for run in runs:
        one, first, second = loaded(run)
        assert one[0].keys() == first[0].keys() == second[0].keys()
        for key, keep in one[0].items():
            assert torch.equal(keep, first[0][key]) and torch.equal(keep, second[0][key]), key
        assert one[2] == first[2] == second[2]
        for key, weight in one[1].items():
            assert torch.equal(first[1][key], second[1][key]), key
            assert torch.allclose(weight, first[1][key], atol=2e-3), key


@pytest.mark.parametrize("run", ["bert-1", "bert-2", "llama-2", "bart-2", "callback-2"])
def test_gates(loaded, run):
    one, first, second = loaded(f"gates-{run}")
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert one[1] == first[1] == second[1]
    assert one[3] == pytest.approx(first[3], rel=1e-3) and first[3] == second[3]
    for mine, theirs in zip(one[0], first[0], strict=True):
        assert_close(mine, theirs, atol=1e-3, rtol=0)
    assert all(torch.equal(value, second[2][key]) for key, value in first[2].items())


@pytest.mark.parametrize("run", ["bert-full", "bert-linear_random", "llama-kd", "bart-full"])
def test_super_networks(loaded, run):
    one, first, second = loaded(f"supernet-{run}")
    assert one[1] == pytest.approx(first[1], rel=1e-3)
    for key, value in one[0].items():
        assert torch.equal(first[0][key], second[0][key]), key
        assert_close(first[0][key], value, atol=1e-5, rtol=1e-4)


def test_search(results):
    one, first, second = (path.read_text() for path in results("search"))
    assert one == first == second
