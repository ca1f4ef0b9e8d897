import pytest
import torch
from tiny import tiny_model

import hf_prune
from hf_prune import MaskError, PruningMask, WandaConfig, WeightMagnitudeConfig, WeightMask

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def mask():
    generator = torch.Generator().manual_seed(0)
    return WeightMask(
        {"a": torch.rand(3, 5, generator=generator) > 0.5, "b": torch.rand(4, 8, generator=generator) > 0}
    )


def test_a_mask_is_a_mapping_of_bool_tensors(mask):
    assert list(mask) == ["a", "b"] and len(mask) == 2 and "c" not in mask
    assert {name: (t.dtype, tuple(t.shape)) for name, t in mask.items()} == {
        "a": (torch.bool, (3, 5)),
        "b": (torch.bool, (4, 8)),
    }
    assert WeightMask(dict(mask)) == mask
    kept = int(mask["a"].sum())
    assert mask.kept("a") == kept and mask.kept() == kept + 32 and mask.total() == 47 and mask.total("b") == 32
    assert mask.sparsity("b") == 0 and mask.sparsity() == pytest.approx((15 - kept) / 47)
    assert repr(mask) == f"WeightMask(2 parameters, {(15 - kept) / 47:.2%} of 47 weights pruned)"


def test_algebra(mask):
    other = WeightMask({name: ~tensor for name, tensor in mask.items()})
    assert (mask & other).kept() == 0 and (mask | other).sparsity() == 0
    assert (mask & mask) == mask != other and mask != WeightMask({"a": mask["a"]})
    with pytest.raises(MaskError, match="don't combine"):
        mask & WeightMask({"a": mask["a"]})
    with pytest.raises(TypeError):
        mask & PruningMask({}, hf_prune.prunable_units(tiny_model("bert")))


@pytest.mark.parametrize("keep", [{"a": torch.ones(2, 2)}, {"a": [True]}])
def test_masks_are_bool(keep):
    with pytest.raises(MaskError, match="mask of a must be a bool tensor"):
        WeightMask(keep)


def test_files(mask, tmp_path):
    mask.save(tmp_path)
    assert (tmp_path / "pruning_mask.safetensors").stat().st_size < 400  # one bit a weight, and a header
    assert WeightMask.load(tmp_path) == mask
    mask.save(tmp_path / "other.safetensors")
    assert WeightMask.load(tmp_path / "other.safetensors") == mask
    with pytest.raises(MaskError, match="ends in .safetensors"):
        mask.save(tmp_path / "mask.json")
    with pytest.raises(MaskError, match="holds no mask of weights"):
        WeightMask.load(tmp_path / "missing.safetensors")
    units = hf_prune.prunable_units(tiny_model("bert"))
    with pytest.raises(MaskError, match="holds no pruning mask"):
        PruningMask.load(tmp_path)
    PruningMask({}, units).save(tmp_path)
    with pytest.raises(MaskError, match="holds no mask of weights"):
        WeightMask.load(tmp_path)


@pytest.mark.parametrize("shape", [[3, 9], [-3, -5], [3.0, 5], "35", [3]])
def test_bits_have_to_fit_their_shape(mask, tmp_path, shape):
    import json

    from safetensors.torch import save_file

    head = json.dumps({"version": 1, "shapes": {"a": shape}})
    save_file({"a": mask._bits["a"]}, tmp_path / "x.safetensors", metadata={"hf_prune_weight_mask": head})
    with pytest.raises(MaskError):
        WeightMask.load(tmp_path / "x.safetensors")


def test_a_mask_of_a_newer_version_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({}, tmp_path / "x.safetensors", metadata={"hf_prune_weight_mask": '{"version": 2, "shapes": {}}'})
    with pytest.raises(MaskError, match="version 2, this hf_prune reads 1"):
        WeightMask.load(tmp_path / "x.safetensors")


def test_apply_and_check():
    model = tiny_model("llama")
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mask = WeightMask({NAME: torch.arange(32 * 64).view(32, 64) % 3 > 0})
    with pytest.raises(MaskError, match=f"683 pruned weights of {NAME} are not zero"):
        mask.check(model)
    mask.apply(model)
    mask.check(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense[name] * mask[name] if name == NAME else dense[name])


@pytest.mark.parametrize(
    "keep, message",
    [
        ({"model.layers.9.weight": torch.ones(1, dtype=torch.bool)}, "another model. Unknown parameter"),
        ({NAME: torch.ones(64, 32, dtype=torch.bool)}, r"is \(32, 64\), the mask \(64, 32\)"),
    ],
)
def test_masks_of_other_models_change_nothing(keep, message):
    model = tiny_model("llama")
    first = "model.layers.0.self_attn.q_proj.weight"
    dense = model.get_parameter(first).detach().clone()
    mask = WeightMask({first: torch.zeros(32, 32, dtype=torch.bool), **keep})
    with pytest.raises(MaskError, match=message):
        mask.apply(model)
    assert torch.equal(model.get_parameter(first), dense)


def test_there_is_nothing_to_shrink():
    model = hf_prune.prunable(tiny_model("bert"))
    model.prune(WeightMagnitudeConfig(sparsity=0.5))
    with pytest.raises(MaskError, match="keeps its shapes: save it as it is"):
        model.shrink()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_the_saved_model_loads_with_plain_transformers(name, tmp_path):
    from tiny import FAMILIES, tiny_batch

    model = hf_prune.prunable(tiny_model(name))
    result = model.prune(WandaConfig(sparsity=0.5), [tiny_batch(name, size=8)])
    model.save_pretrained(tmp_path / "out")
    again = FAMILIES[name][1].from_pretrained(tmp_path / "out")
    assert not hasattr(again.config, "hf_prune")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    mask = WeightMask.load(tmp_path / "out")
    assert mask == result.mask
    mask.check(again)
    report = hf_prune.PruningReport.load(tmp_path / "out")
    assert report.to_dict() == result.report.to_dict() and 0 < report.ratio("nonzero") < 1 == report.ratio("params")
