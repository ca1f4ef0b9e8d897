"""What is saved of a model that carries a mask, and the files of mask and report."""

import json

import pytest
import torch
import transformers as T
from folders import holds, snapshot, weights
from pruned import logits, shrunk, uneven
from tiny import FAMILIES, tiny_batch, tiny_model

from hf_prune import (
    MagnitudeConfig,
    PruningMask,
    PruningReport,
    apply_mask,
    current_mask,
    prunable,
    prunable_units,
    remove_mask,
    save_pretrained,
    shrink,
)
from hf_prune.errors import MaskError, SaveError


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
