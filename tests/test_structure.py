"""The rooms of the package: a file imports from its own level or below, and the public names are what they say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_prune

ROOT = Path(hf_prune.__file__).parent
LEVELS = """
errors redaction architectures emptied offload run_files processes statistics least_squares tables
units masks weight_masks
gates surgery slicing refits layout compression costs batches divergence matrices timing layer_timing latency
calibration gradients selection layer_walk reconstruction depth block_walk blockwise
methods report benchmark export plots
pruning metrics evaluation comparison sparse_kernels
hub modeling verification
trainers search recovery
cli
"""
LEVEL = {room: level for level, rooms in enumerate(LEVELS.split("\n")) for room in rooms.split()}


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    package = ["hf_prune", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")]
            if module[0] == "hf_prune":
                names = [module[1]] if len(module) > 1 and module[1] else [alias.name for alias in node.names]
                yield from (name for name in names if not name.startswith("__"))


FILES = [path for path in ROOT.rglob("*.py") if path.name != "__main__.py" and path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_knows_only_its_own_level_and_those_below(path):
    assert room(path) in LEVEL, f"give {room(path)} a level"
    for name in imported(path):
        assert LEVEL[name] <= LEVEL[room(path)], f"{room(path)} must not import {name}"


def test_only_gates_registers_hooks_and_only_surgery_and_layout_change_shapes():
    for path in FILES:
        source = path.read_text()
        assert room(path) == "gates" or "register_forward" not in source, path
        assert room(path) in ("surgery", "layout") or "out_features =" not in source, path


def test_public_names():
    for name in hf_prune.__all__:
        assert getattr(hf_prune, name).__doc__, f"{name} has no docstring"
    checked = {
        alias.asname
        for node in ast.walk(ast.parse((ROOT / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname and not alias.asname.startswith("_")
    }
    assert checked == set(hf_prune.__all__)  # type checkers see what users get
    with pytest.raises(AttributeError, match="has no attribute 'pruun'"):
        hf_prune.pruun  # noqa: B018


def test_importing_costs_little():
    code = """
import sys, time
import transformers
started = time.perf_counter()
import hf_prune
print(time.perf_counter() - started)
heavy = ("torch", "peft", "optuna", "matplotlib", "datasets", "accelerate", "evaluate")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    seconds, modules = done.stdout.splitlines()
    assert modules == "[]" and float(seconds) < 0.3
