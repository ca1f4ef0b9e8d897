"""What was saved loads: with plain transformers, in a fresh process, under every head, tool and option."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from test_layout import SOME, logits, shapes, shrunk, uneven
from test_saving import holds, tokenizer
from tiny import DECODERS, FAMILIES, SEQ2SEQ, tiny_batch, tiny_model

from hf_prune import (
    AutoPrunableModelForSequenceClassification,
    MagnitudeConfig,
    PruningMask,
    apply_mask,
    prunable,
    prunable_units,
    prune,
    save_pretrained,
    shrink,
)
from hf_prune.errors import SaveError

ROOT = Path(__file__).parents[1]
UNIFORM = ["bert", "distilbert", "gpt2", "gpt_neox", "llama", "phi3", "t5", "bart", "whisper", "vit"]
STANDALONE = ["bert", "gpt_neox", "llama", "phi3", "t5", "bart", "vit"]
FEW = ["bert", "deberta-v2", "gpt2", "phi3", "t5", "bart"]


@pytest.fixture(autouse=True)
def remote_code_stays_in(tmp_path_factory, monkeypatch):
    """The copies that transformers makes of remote code go to a temporary folder."""
    monkeypatch.setattr(T.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


def auto(name):
    return FAMILIES[name][1]


def equal(mine, theirs):
    mine, theirs = mine.state_dict(), theirs.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def stripped(model):
    """The weights by name, whatever the class calls what holds them."""
    return {key.removeprefix("transformer.").removeprefix("model."): x for key, x in model.state_dict().items()}


def aligned(model):
    """Loaded weights lie where the file has them: at other addresses kernels may sum in another order."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


class TestRoundTrip:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_plain_from_pretrained(self, tmp_path, name):
        model, batch = shrunk(name), tiny_batch(name, padded=True)
        save_pretrained(model, tmp_path)
        again = auto(name).from_pretrained(tmp_path)
        assert type(again) is type(model)
        assert again.num_parameters() == model.num_parameters() < tiny_model(name).num_parameters()
        assert equal(again, model)
        torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-6, rtol=1e-6)
        assert torch.equal(logits(aligned(again), batch), logits(aligned(model), batch))
        for key, module in again.named_modules():
            mine = vars(model.get_submodule(key))
            assert {k: v for k, v in vars(module).items() if type(v) is int} == {
                k: v for k, v in mine.items() if type(v) is int
            }, key

    @pytest.mark.parametrize("name", ["bert", "phi3", "bart"])
    def test_the_stock_method_saves_it_too(self, tmp_path, name):
        model = shrunk(name)
        model.save_pretrained(tmp_path / "first")
        again = auto(name).from_pretrained(tmp_path / "first")
        again.save_pretrained(tmp_path / "second")
        assert holds(tmp_path / "second", model)

    @pytest.mark.parametrize("name", FEW)
    def test_saved_again(self, tmp_path, name):
        model = shrunk(name)
        save_pretrained(model, tmp_path / "first")
        again = auto(name).from_pretrained(tmp_path / "first")
        save_pretrained(again, tmp_path / "second")
        save_pretrained(again, tmp_path / "first")  # over what it was loaded from
        for folder in ("first", "second"):
            assert holds(tmp_path / folder, model)
        first, second = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("first", "second"))
        assert first == second

    @pytest.mark.parametrize("name", FEW)
    def test_pruned_again(self, tmp_path, name):
        save_pretrained(shrunk(name, drop=False), tmp_path)
        model, batch = auto(name).from_pretrained(tmp_path), tiny_batch(name)
        apply_mask(model, uneven(model, drop=True))
        masked = logits(model, batch)
        before = model.num_parameters()
        shrink(model)
        assert model.num_parameters() < before
        save_pretrained(model, tmp_path)
        again = auto(name).from_pretrained(tmp_path)
        torch.testing.assert_close(logits(again, batch), masked, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("name", ["bert", "llama", "modernbert", "vit", "bart"])
    def test_layers_that_lost_everything(self, tmp_path, name):
        model, batch = tiny_model(name), tiny_batch(name)
        units = prunable_units(model)
        empty = [g for g in units.of_kind("heads", "neurons") if g.layer == 1]
        apply_mask(model, PruningMask({g.name: torch.zeros(g.size, dtype=torch.bool) for g in empty}, units))
        masked = logits(model, batch)
        save_pretrained(shrink(model), tmp_path)
        torch.testing.assert_close(logits(auto(name).from_pretrained(tmp_path), batch), masked, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
    @pytest.mark.parametrize("name", ["bert", "phi3", "t5"])
    def test_device_maps(self, tmp_path, name, options):
        model, batch = shrunk(name), tiny_batch(name)
        save_pretrained(model, tmp_path)
        again = auto(name).from_pretrained(tmp_path, **options)
        assert equal(again, model)
        torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
    def test_a_larger_vocabulary(self, tmp_path, name):
        model, batch = shrunk(name), tiny_batch(name)
        model.resize_token_embeddings(120)
        save_pretrained(model, tmp_path)
        again = auto(name).from_pretrained(tmp_path)
        assert equal(again, model) and again.config.vocab_size == 120
        torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("name", ["bert", "gpt_neox", "llama"])
    def test_shards(self, tmp_path, name):
        model = shrunk(name)
        save_pretrained(model, tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
        assert equal(auto(name).from_pretrained(tmp_path), model)

    def test_variants(self, tmp_path):
        model = shrunk("bert").half()
        save_pretrained(model, tmp_path, variant="fp16")
        assert (tmp_path / "model.fp16.safetensors").exists()
        again = T.AutoModelForSequenceClassification.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
        assert equal(again, model)
        save_pretrained(model, tmp_path, variant="fp16", max_shard_size="20KB")
        again = T.AutoModelForSequenceClassification.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
        assert equal(again, model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "t5/gated", "whisper"])
    def test_half_precision(self, tmp_path, name, dtype):
        model = shrunk(name).to(dtype)
        save_pretrained(model, tmp_path)
        again = auto(name).from_pretrained(tmp_path, dtype="auto")
        assert again.dtype == dtype
        assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        wide = auto(name).from_pretrained(tmp_path, dtype=torch.float32)
        assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), wide.parameters(), strict=True))

    @pytest.mark.parametrize("name", ["bert", "phi3", "t5"])
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("wrap", [lambda model: model, prunable], ids=["stock", "prunable"])
    def test_copies(self, tmp_path, name, duplicate, wrap):
        model, batch = wrap(shrunk(name)), tiny_batch(name)
        other = duplicate(model)
        assert type(other) is type(model)
        assert torch.equal(logits(other, batch), logits(model, batch))
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not equal(other, model)
        save_pretrained(other, tmp_path)
        assert equal(auto(name).from_pretrained(tmp_path), other)

    def test_a_pickled_prunable_model_keeps_its_mask_and_result(self):
        model = prunable(tiny_model("bert"))
        result = model.prune(MagnitudeConfig(budget={"params": 0.7}))
        other = pickle.loads(pickle.dumps(model))
        assert other.pruning_result.mask == result.mask
        batch = tiny_batch("bert")
        assert torch.equal(logits(other, batch), logits(model, batch))
        assert torch.equal(logits(other.shrink(), batch), logits(model.shrink(), batch))

    def test_the_prunable_auto_class(self, tmp_path):
        model = prunable(shrunk("bert"))
        model.save_pretrained(tmp_path)
        again = AutoPrunableModelForSequenceClassification.from_pretrained(tmp_path)
        assert type(again).__name__ == "BertForSequenceClassification" and type(again) is type(model)
        again.prune(MagnitudeConfig(budget={"params": 0.9}))
        again.shrink().save_pretrained(tmp_path)
        assert equal(T.AutoModelForSequenceClassification.from_pretrained(tmp_path), again)
        assert type(T.AutoModelForSequenceClassification.from_pretrained(tmp_path)) is T.BertForSequenceClassification


class TestOtherHeads:
    @pytest.mark.parametrize("name", SOME)
    def test_without_a_head(self, tmp_path, name):
        model = shrunk(name)
        save_pretrained(model, tmp_path)
        base = T.AutoModel.from_pretrained(tmp_path)
        mine, theirs = model.base_model.state_dict(), base.state_dict()
        assert theirs.keys() <= mine.keys() | {"pooler.dense.weight", "pooler.dense.bias"}
        assert len(theirs) > 10
        assert all(torch.equal(theirs[key], mine[key]) for key in theirs.keys() & mine.keys())

    @pytest.mark.parametrize(
        ("name", "other"),
        [
            ("bert", T.AutoModelForTokenClassification),
            ("bert", T.AutoModelForMaskedLM),
            ("bert", T.AutoModelForQuestionAnswering),
            ("distilbert", T.AutoModelForTokenClassification),
            ("deberta-v2", T.AutoModelForTokenClassification),
            ("gpt2", T.AutoModelForSequenceClassification),
            ("gpt_neox", T.AutoModelForTokenClassification),
            ("llama", T.AutoModelForSequenceClassification),
            ("phi3", T.AutoModelForSequenceClassification),
            ("bart", T.AutoModelForSequenceClassification),
            ("t5", T.AutoModelForQuestionAnswering),
        ],
        ids=lambda value: getattr(value, "__name__", value),
    )
    def test_another_head(self, tmp_path, name, other):
        model = shrunk(name)
        save_pretrained(model, tmp_path / "first")
        again = other.from_pretrained(tmp_path / "first")
        batch = {key: value for key, value in tiny_batch(name).items() if key in ("input_ids", "attention_mask")}
        if name == "bart":  # its classifier reads the state at the end token
            batch["input_ids"][:, -1] = 2
        assert torch.isfinite(logits(again, batch)).all()
        mine, theirs = dict(model.named_parameters()), dict(again.named_parameters())
        shared = [key for key in theirs if key in mine and "classifier" not in key and "head" not in key]
        assert len(shared) > 10
        assert all(torch.equal(mine[key], theirs[key]) for key in shared)
        save_pretrained(again, tmp_path / "second")
        assert holds(tmp_path / "second", again)

    @pytest.mark.parametrize(
        ("name", "cls"),
        [
            ("t5", T.T5EncoderModel),
            ("t5", T.T5ForTokenClassification),
            ("bart", T.BartForCausalLM),
            ("marian", T.MarianForCausalLM),
            ("whisper", T.WhisperForCausalLM),
            ("whisper", T.WhisperForAudioClassification),
        ],
        ids=lambda value: getattr(value, "__name__", value),
    )
    def test_one_stack_of_an_encoder_decoder(self, tmp_path, name, cls):
        model = shrunk(name)
        save_pretrained(model, tmp_path / "full")
        half = cls.from_pretrained(tmp_path / "full")
        mine, theirs = stripped(model), stripped(half)
        # Which embeddings a decoder alone finds in a full checkpoint is up to transformers
        common = [key for key in theirs if key in mine and "embed_tokens" not in key and "lm_head" not in key]
        assert len(common) > 10
        assert all(torch.equal(theirs[key], mine[key]) for key in common)
        if cls is T.T5EncoderModel:
            batch = tiny_batch("t5")
            with torch.no_grad():
                expected = model.encoder(batch["input_ids"], batch["attention_mask"])[0]
            assert torch.equal(logits(half, {key: batch[key] for key in ("input_ids", "attention_mask")}), expected)
        # The other stack is gone, its entries in the layout may be there still: either method saves it
        half.save_pretrained(tmp_path / "stock")
        assert holds(tmp_path / "stock", half)
        save_pretrained(half, tmp_path / "ours")
        assert holds(tmp_path / "ours", half)
        shrink(half, uneven(half, drop=False))
        save_pretrained(half, tmp_path / "pruned")
        assert holds(tmp_path / "pruned", half)

    def test_a_model_made_of_two(self, tmp_path):
        save_pretrained(shrunk("bert", T.AutoModel), tmp_path / "bert")
        pair = T.EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "bert", tmp_path / "bert")
        pair.config.decoder_start_token_id, pair.config.pad_token_id = 1, 0
        assert shapes(pair.encoder) == shapes(shrunk("bert", T.AutoModel))
        pair.save_pretrained(tmp_path / "pair")
        assert equal(T.EncoderDecoderModel.from_pretrained(tmp_path / "pair"), pair)

    @pytest.mark.parametrize("name", FEW)
    def test_from_config_has_the_shapes_and_fresh_weights(self, tmp_path, name):
        model = shrunk(name)
        save_pretrained(model, tmp_path)
        fresh = auto(name).from_config(T.AutoConfig.from_pretrained(tmp_path))
        assert shapes(fresh) == shapes(model)
        assert torch.isfinite(logits(fresh, tiny_batch(name))).all()
        assert not equal(fresh, model)


# Fresh processes

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


class TestStandaloneBesideHfPrune:
    """Remote code and hf_prune in one process: the layout is applied by both."""

    @pytest.mark.parametrize("name", ["bert", "phi3", "gpt_neox", "t5"])
    def test_loads_prunes_and_saves(self, tmp_path, name):
        model, batch = shrunk(name), tiny_batch(name)
        save_pretrained(model, tmp_path / "first", standalone=True)
        again = auto(name).from_pretrained(tmp_path / "first", trust_remote_code=True)
        assert type(again).__module__.startswith("transformers_modules.")
        torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-6, rtol=1e-6)
        save_pretrained(again, tmp_path / "again", standalone=True)

        units = prunable_units(again)  # the last layer only: the first keeps what the remote code made of it
        last = [g for g in units.of_kind("heads", "neurons") if g.layer == 1 and g.prunable and g.size > 1]
        apply_mask(again, PruningMask({g.name: torch.arange(g.size) > 0 for g in last}, units))
        masked = logits(again, batch)
        shrink(again)
        for folder, options in (("plain", {}), ("standalone", {"standalone": True})):
            save_pretrained(again, tmp_path / folder, **options)
            for trust in (False, True):
                loaded = auto(name).from_pretrained(tmp_path / folder, trust_remote_code=trust)
                torch.testing.assert_close(logits(loaded, batch), masked, atol=1e-5, rtol=1e-5)


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


# What people do with a model that they loaded


def generated(model, batch, **options):
    torch.manual_seed(0)
    arguments = {key: value for key, value in batch.items() if not key.startswith("decoder_")}
    with torch.no_grad():
        return model.generate(**arguments, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1, **options)


class TestGenerate:
    @pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
    def test_every_cache_gives_the_same_tokens(self, tmp_path, name):
        model, batch = shrunk(name, seed=5), tiny_batch(name)
        save_pretrained(model, tmp_path)
        again = auto(name).from_pretrained(tmp_path).eval()
        expected = generated(model, batch, use_cache=False)
        assert len(expected.unique()) > 1
        for which in (model, again):
            assert torch.equal(generated(which, batch, use_cache=False), expected)
            assert torch.equal(generated(which, batch), expected)
        assert torch.equal(generated(again, batch, cache_implementation="static"), expected)

    @pytest.mark.parametrize("name", ["llama", "phi3", "bart"])
    def test_beams(self, name):
        model, batch = shrunk(name), tiny_batch(name)
        arguments = {key: value for key, value in batch.items() if not key.startswith("decoder_")}
        tokens = [
            model.generate(**arguments, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=cache)
            for cache in (True, False)
        ]
        assert torch.equal(*tokens)


def gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(0)  # the same dropout
    model(**batch, labels=torch.tensor([0, 1, 0])).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestTraining:
    @pytest.mark.parametrize("name", ["bert", "deberta-v2", "vit"])
    def test_gradient_checkpointing(self, tmp_path, name):
        save_pretrained(shrunk(name), tmp_path)
        model, batch = auto(name).from_pretrained(tmp_path).train(), tiny_batch(name)
        expected = gradients(model, batch)
        model.gradient_checkpointing_enable()
        found = gradients(model, batch)
        assert found.keys() == expected.keys() and len(found) > 20
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], atol=1e-6, rtol=1e-5)

    def test_torch_compile(self, tmp_path):
        save_pretrained(shrunk("bert"), tmp_path)
        model, batch = T.AutoModelForSequenceClassification.from_pretrained(tmp_path), tiny_batch("bert")
        expected = logits(model, batch)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled, batch), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("wrap", [lambda model: model, prunable], ids=["stock", "prunable"])
    def test_trainer(self, tmp_path, wrap):
        save_pretrained(shrunk("bert"), tmp_path / "pruned")
        model = wrap(T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned"))
        rows = [
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": index % 2}
            for index, ids in enumerate(torch.randint(3, 99, (8, 7)))
        ]

        def trainer(of, steps):
            options = T.TrainingArguments(
                str(tmp_path / "runs"), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
                save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
                use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", save_total_limit=3,
            )  # fmt: skip
            return T.Trainer(of, options, train_dataset=rows, eval_dataset=rows)

        run = trainer(model, 2)
        run.train()
        best = Path(run.state.best_model_checkpoint)
        loaded = T.AutoModelForSequenceClassification.from_pretrained(best)
        assert type(loaded) is T.BertForSequenceClassification
        assert equal(loaded, model)
        assert not equal(loaded, shrunk("bert"))
        run.save_model(str(tmp_path / "final"))
        assert equal(T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "final"), model)
        # A run that was interrupted goes on from the checkpoint of its first step
        other = wrap(T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned"))
        more = trainer(other, 3)
        more.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
        assert more.state.global_step == 3
        save_pretrained(other, tmp_path / "final")
        assert equal(T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "final"), other)

    def test_a_masked_model_is_never_shrunk_by_a_checkpoint_of_the_trainer(self, tmp_path):
        """Trainer passes the weights explicitly: they are stored as they are, dense."""
        model = prunable(tiny_model("bert"))
        apply_mask(model, uneven(model, drop=False))
        state = model.state_dict()
        model.save_pretrained(tmp_path, state_dict=dict(state))
        found = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(found[key], state[key]) for key in found)

    def test_pipeline(self, tmp_path):
        model, words = shrunk("bert"), tokenizer()
        save_pretrained(model, tmp_path, processing_class=words)
        pipe = T.pipeline("text-classification", model=str(tmp_path), device="cpu")
        found = pipe("very good film", top_k=None)
        expected = logits(model, dict(words("very good film", return_tensors="pt"))).softmax(-1)[0]
        scores = {row["label"]: row["score"] for row in found}
        for index, label in model.config.id2label.items():
            assert scores[label] == pytest.approx(expected[index].item(), abs=1e-5)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
    def test_lora(self, tmp_path, name):
        save_pretrained(shrunk(name), tmp_path / "pruned")
        base, batch = auto(name).from_pretrained(tmp_path / "pruned"), tiny_batch(name)
        plain = logits(base, batch)
        targets = "all-linear" if name == "llama" else None
        lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        tuned = peft.get_peft_model(copy.deepcopy(base), lora)
        adapted = logits(tuned, batch)
        assert not torch.allclose(adapted, plain, atol=1e-3)
        tuned.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(auto(name).from_pretrained(tmp_path / "pruned"), tmp_path / "adapter")
        torch.testing.assert_close(logits(again, batch), adapted, atol=1e-5, rtol=1e-5)
        with pytest.raises(RuntimeError, match="size mismatch"):  # an adapter of the pruned model on the dense one
            peft.PeftModel.from_pretrained(tiny_model(name), tmp_path / "adapter")

        torch.testing.assert_close(logits(copy.deepcopy(tuned).unload(), batch), plain, atol=1e-5, rtol=1e-5)
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(logits(merged, batch), adapted, atol=1e-4, rtol=1e-4)
        assert type(merged) is type(base)
        save_pretrained(merged, tmp_path / "merged")
        assert holds(tmp_path / "merged", merged)

    def test_a_model_with_an_adapter_inside_is_not_saved_as_if_it_were_plain(self, tmp_path):
        model = shrunk("llama")
        model.add_adapter(peft.LoraConfig(r=2))
        with pytest.raises((SaveError, TypeError)):
            save_pretrained(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
