"""What was saved loads in a fresh process: without hf_prune, or with it imported early or late."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as T
from pruned import SOME, logits, shrunk
from reader import ROOT
from safetensors.torch import save_file
from tiny import FAMILIES, auto, tiny_batch, tiny_model

from hf_prune import MagnitudeConfig, PruningMask, prunable_units, prune, save_pretrained, shrink

UNIFORM = ["bert", "distilbert", "gpt2", "gpt_neox", "llama", "phi3", "t5", "bart", "whisper", "vit"]
STANDALONE = ["bert", "gpt_neox", "llama", "phi3", "t5", "bart", "vit"]

_SUBJECT = """
import json, sys
from pathlib import Path
import torch
import transformers as T
from safetensors.torch import load_file
T.logging.set_verbosity_error()
T.utils.logging.disable_progress_bar()
def load(folder, auto, trust=False):
    \"\"\"What loads from a folder: its class, its size, and how far its output is from the recorded one.\"\"\"
    folder = Path(folder)
    try:
        model = getattr(T, auto).from_pretrained(folder, trust_remote_code=trust).eval()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    found = {"class": type(model).__name__, "module": type(model).__module__, "parameters": model.num_parameters()}
    batch = load_file(folder / "../batch.tensors")
    expected = batch.pop("expected")
    with torch.no_grad():
        output = next(v for v in model(**batch).values() if isinstance(v, torch.Tensor))
    if output.shape == expected.shape:
        found["gap"] = (output - expected).abs().max().item()
    return found
"""


def fresh_process(code, *arguments, home):
    """What code prints last, as JSON, in a new interpreter. It finds hf_prune only where the code says so."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, env=environment, cwd=home, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def record(model, name, folder, **options):
    """Save a model, and beside it a batch with what the model computes for it."""
    save_pretrained(model, folder / "model", **options)
    batch = tiny_batch(name)
    save_file({**batch, "expected": logits(model, batch).contiguous()}, folder / "batch.tensors")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of checkpoints, by kind and family, with the number of their parameters."""
    root, sizes = tmp_path_factory.mktemp("checkpoints"), {}
    modules = T.dynamic_module_utils.HF_MODULES_CACHE
    T.dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))

    def add(kind, name, model, **options):
        folder = root / f"{kind} {name}"
        folder.mkdir()
        record(model, name, folder, **options)
        sizes[kind, name] = model.num_parameters()

    for name in UNIFORM:
        model = tiny_model(name)
        units = prunable_units(model)
        shrink(model, PruningMask({stack: torch.arange(3) != 1 for stack in units.stacks}, units))
        add("dropped", name, model)
        prune(model, MagnitudeConfig(budget={"params": 0.85}, allocation="uniform"))
        add("uniform", name, shrink(model))
    for name in SOME:
        add("uneven", name, shrunk(name))
    for name in STANDALONE:
        add("standalone", name, shrunk(name), standalone=True)
    T.dynamic_module_utils.HF_MODULES_CACHE = modules
    return root, sizes


@pytest.fixture(scope="module")
def without(checkpoints, tmp_path_factory):
    """What a process finds that has only transformers; and, at the end, after it imported hf_prune at last."""
    root, _ = checkpoints
    code = (
        _SUBJECT
        + """
sys.modules["hf_prune"] = None
root, repository, autos = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
found = {}
for folder in sorted(Path(root).iterdir()):
    kind, name = folder.name.split(" ")
    found[folder.name] = load(folder / "model", autos[name], trust=kind == "standalone")
    if kind == "standalone":
        found["untrusted " + name] = load(folder / "model", autos[name])
        found["base " + name] = load(folder / "model", "AutoModel", trust=True)
for name, other in [("bert", "AutoModelForTokenClassification"), ("bert", "AutoModelForMaskedLM"),
                    ("llama", "AutoModelForSequenceClassification"), ("bart", "AutoModelForSequenceClassification"),
                    ("gpt_neox", "AutoModelForTokenClassification"), ("t5", "AutoModelForQuestionAnswering")]:
    batch = Path(root) / f"standalone {name}"
    model = getattr(T, other).from_pretrained(batch / "model", trust_remote_code=True)
    found[f"{other} {name}"] = {"class": type(model).__name__, "parameters": model.base_model.num_parameters()}
assert sys.modules.pop("hf_prune") is None and not [m for m in sys.modules if m.split(".")[0] == "hf_prune"]
sys.path.insert(0, repository)
import hf_prune
for folder in sorted(Path(root).glob("uneven *")):
    found["late " + folder.name.split(" ")[1]] = load(folder / "model", autos[folder.name.split(" ")[1]])
for folder in sorted(Path(root).glob("standalone *")):
    found["both " + folder.name.split(" ")[1]] = load(folder / "model", autos[folder.name.split(" ")[1]])
print(json.dumps(found))
"""
    )
    autos = {name: auto(name).__name__ for name in FAMILIES}
    return fresh_process(code, root, ROOT, json.dumps(autos), home=tmp_path_factory.mktemp("home"))


class TestWithoutHfPrune:
    @pytest.mark.parametrize("name", UNIFORM)
    @pytest.mark.parametrize("kind", ["uniform", "dropped"])
    def test_stock_configs_need_transformers_alone(self, checkpoints, without, kind, name):
        root, sizes = checkpoints
        config = json.loads((root / f"{kind} {name}" / "model" / "config.json").read_text())
        assert "hf_prune" not in config and "auto_map" not in config
        found = without[f"{kind} {name}"]
        assert "error" not in found, found
        assert found["parameters"] == sizes[kind, name] < tiny_model(name).num_parameters()
        assert found["class"] == type(tiny_model(name)).__name__
        assert found["gap"] <= 1e-6

    @pytest.mark.parametrize("name", SOME)
    def test_uneven_widths_fail_loudly(self, without, name):
        assert "mismatch" in without[f"uneven {name}"]["error"]

    @pytest.mark.parametrize("name", STANDALONE)
    def test_standalone_loads_with_trust_remote_code(self, checkpoints, without, name):
        found = without[f"standalone {name}"]
        assert "error" not in found, found
        assert found["module"].startswith("transformers_modules.")
        assert found["class"] == type(tiny_model(name)).__name__
        assert found["parameters"] == checkpoints[1]["standalone", name]
        assert found["gap"] <= 1e-6

    @pytest.mark.parametrize("name", STANDALONE)
    def test_standalone_loads_without_a_head(self, without, name):
        found = without[f"base {name}"]
        assert "error" not in found, found
        assert found["class"] == T.AutoModel.from_config(FAMILIES[name][0]).__class__.__name__

    @pytest.mark.parametrize(
        ("name", "other"),
        [
            ("bert", "AutoModelForTokenClassification"),
            ("bert", "AutoModelForMaskedLM"),
            ("llama", "AutoModelForSequenceClassification"),
            ("bart", "AutoModelForSequenceClassification"),
            ("gpt_neox", "AutoModelForTokenClassification"),
            ("t5", "AutoModelForQuestionAnswering"),
        ],
    )
    def test_standalone_loads_under_other_heads(self, without, name, other):
        found = without[f"{other} {name}"]
        small = shrunk(name, getattr(T, other))
        assert found == {"class": type(small).__name__, "parameters": small.base_model.num_parameters()}

    @pytest.mark.parametrize("name", STANDALONE)
    def test_standalone_needs_trust(self, without, name):
        assert "mismatch" in without[f"untrusted {name}"]["error"]

    @pytest.mark.parametrize("name", SOME)
    def test_importing_it_late_is_soon_enough(self, checkpoints, without, name):
        found = without[f"late {name}"]
        assert "error" not in found, found
        assert found["parameters"] == checkpoints[1]["uneven", name]
        assert found["gap"] <= 1e-6

    @pytest.mark.parametrize("name", STANDALONE)
    def test_with_hf_prune_standalone_needs_no_trust(self, without, name):
        found = without[f"both {name}"]
        assert "error" not in found, found
        assert not found["module"].startswith("transformers_modules.")
        assert found["gap"] <= 1e-6


_HEAVY = ["torch", "peft", "optuna", "matplotlib", "datasets", "accelerate", "transformers.modeling_utils"]


class TestImport:
    def test_before_transformers(self, checkpoints, tmp_path):
        code = (
            """
import sys, json
sys.path.insert(0, sys.argv[2])
import hf_prune
from hf_prune import layout
heavy = [name for name in json.loads(sys.argv[3]) if name in sys.modules]
finders = lambda: sum(isinstance(finder, layout._PatchOnImport) for finder in sys.meta_path)
counts = [finders()]
layout.enable(); counts.append(finders())
layout.disable(); counts.append(finders())
layout.disable(); counts.append(finders())
layout.enable(); counts.append(finders())
early = "transformers" in sys.modules
"""
            + _SUBJECT
            + """
folder = Path(sys.argv[1]) / "uneven bert" / "model"
first = load(folder, "AutoModelForSequenceClassification")
counts.append(finders())
layout.disable()
disabled = load(folder, "AutoModelForSequenceClassification")
layout.enable(); layout.enable()
enabled = load(folder, "AutoModelForSequenceClassification")
unused = [name for name in ("peft", "optuna", "matplotlib", "datasets") if name in sys.modules]
print(json.dumps([heavy, early, counts, first, disabled, enabled, unused]))
"""
        )
        heavy, early, counts, first, disabled, enabled, unused = fresh_process(
            code, checkpoints[0], ROOT, json.dumps(_HEAVY), home=tmp_path
        )
        assert heavy == [] and not early
        assert counts == [1, 1, 0, 0, 1, 0]
        assert first["gap"] <= 1e-6 and enabled == first
        assert "mismatch" in disabled["error"]
        assert "optuna" not in unused and "matplotlib" not in unused

    def test_after_transformers(self, checkpoints, tmp_path):
        """It adds next to nothing, and the models of a lazily imported transformers load."""
        code = (
            """
import sys, json, time
import transformers
before = set(sys.modules)
sys.path.insert(0, sys.argv[2])
started = time.perf_counter()
import hf_prune
seconds = time.perf_counter() - started
added = sorted(set(sys.modules) - before)
names = dir(hf_prune)
"""
            + _SUBJECT
            + """
found = load(Path(sys.argv[1]) / "uneven llama" / "model", "AutoModelForCausalLM")
print(json.dumps([seconds, added, names, found]))
"""
        )
        seconds, added, names, found = fresh_process(code, checkpoints[0], ROOT, home=tmp_path)
        assert seconds < 0.3
        assert not set(added) & set(_HEAVY)
        assert not [name for name in added if name.split(".")[0] in ("torch", "transformers", "numpy", "safetensors")]
        assert {"prune", "shrink", "save_pretrained"} <= set(names)
        assert found["gap"] <= 1e-6
