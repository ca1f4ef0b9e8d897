"""PruningMask: algebra, counting, files, and whose it is."""

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from tiny import tiny_model

import hf_prune
from hf_prune import MaskError, PruningMask

HEADS = "encoder.layer.0.attention.output.dense"
NEURONS = "encoder.layer.0.output.dense"


@pytest.fixture(scope="module")
def units():
    return hf_prune.prunable_units(tiny_model("bert"))


def test_what_is_not_named_is_kept(units):
    mask = PruningMask({HEADS: torch.tensor([True, False, False, True])}, units)
    assert list(mask) == list(units) and mask[HEADS].tolist() == [True, False, False, True]
    assert mask.kept("heads") == 10 and mask.total("heads") == 12 and mask.density("heads") == 10 / 12
    assert mask.density("neurons") == mask.density("layers") == 1.0
    assert repr(mask) == "PruningMask(bert: 10/12 heads, 192/192 neurons, 3/3 layers)"


def test_a_mask_does_not_share_memory_with_its_input(units):
    vector = torch.ones(4, dtype=torch.bool)
    mask = PruningMask({HEADS: vector}, units)
    vector[0] = False
    assert mask[HEADS].all()


@settings(max_examples=25, deadline=None)
@given(a=st.integers(0, 9), b=st.integers(0, 9))
def test_algebra(units, a, b):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return PruningMask({n: torch.rand(g.size, generator=generator) > 0.5 for n, g in units.items()}, units)

    x, y = make(a), make(b)
    assert ~~x == x and (x & x) == x and (x | ~x) == PruningMask({}, units)
    assert ~(x & y) == (~x | ~y) and (x & y) == (y & x)
    assert (x == y) == (a == b) and (x & y).kept("neurons") <= x.kept("neurons")


@pytest.mark.parametrize("name", ["mask.json", "mask.safetensors", ""])
def test_round_trip(units, random_mask, tmp_path, name):
    mask = random_mask(units, 3, drop=True)
    mask.save(tmp_path / name)
    again = PruningMask.load(tmp_path / name)
    assert again == mask
    again.check(units)


def test_a_mask_serves_every_head_and_no_other_model(units, random_mask):
    mask = random_mask(units)
    mask.check(hf_prune.prunable_units(tiny_model("bert", __import__("transformers").AutoModelForTokenClassification)))
    with pytest.raises(MaskError, match="is for a bert model, the model is a roberta"):
        mask.check(hf_prune.prunable_units(tiny_model("roberta")))
    with pytest.raises(MaskError, match=f"another shape: {NEURONS} has 64 units in the mask and 32 in the model"):
        mask.check(hf_prune.prunable_units(tiny_model("bert", intermediate_size=32)))
    with pytest.raises(MaskError, match="encoder.layer.2"):
        mask.check(hf_prune.prunable_units(tiny_model("bert", num_hidden_layers=2)))
    with pytest.raises(MaskError, match="different models"):
        mask & PruningMask({}, hf_prune.prunable_units(tiny_model("bert", num_hidden_layers=2)))


@pytest.mark.parametrize(
    "keep, message",
    [
        (
            {"encoder.layer.0.output.danse": torch.ones(64, dtype=torch.bool)},
            "Did you mean 'encoder.layer.0.output.dense'",
        ),
        ({HEADS: torch.ones(5, dtype=torch.bool)}, r"bool tensor of shape \(4,\), got torch.bool of shape \(5,\)"),
        ({HEADS: torch.ones(4)}, "got torch.float32"),
        ({HEADS: [True] * 4}, "got list"),
    ],
)
def test_malformed_vectors(units, keep, message):
    with pytest.raises(MaskError, match=message):
        PruningMask(keep, units)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"version": 2, "model_type": "bert", "groups": {}},
        {"version": 1, "model_type": "bert", "groups": []},
        {"version": 1, "model_type": "bert", "groups": {"a": {"kind": "heads", "size": 10**12, "keep": []}}},
        {"version": 1, "model_type": "bert", "groups": {"a": {"kind": "heads", "size": 4, "keep": [4]}}},
        {"version": 1, "model_type": "bert", "groups": {"a": {"kind": "heads", "size": 4, "keep": [-1]}}},
        {"version": 1, "model_type": "bert", "groups": {"a": {"kind": "hats", "size": 4, "keep": [1]}}},
        {"version": 1, "model_type": "bert", "groups": {"a": {"kind": "heads", "size": "4", "keep": [1]}}},
    ],
)
def test_malformed_files(data, tmp_path):
    path = tmp_path / "mask.json"
    path.write_text(json.dumps(data))
    with pytest.raises(MaskError):
        PruningMask.load(path)


def test_files_that_hold_no_mask(tmp_path):
    with pytest.raises(MaskError, match="holds no pruning mask"):
        PruningMask.load(tmp_path / "absent.json")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(MaskError, match="holds no pruning mask"):
        PruningMask.load(tmp_path / "broken.safetensors")
    save_file({"a": torch.ones(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(MaskError, match="holds no pruning mask"):
        PruningMask.load(tmp_path / "weights.safetensors")
    with pytest.raises(MaskError, match="ends in .json or .safetensors"):
        PruningMask.load(tmp_path / "mask.pt")
