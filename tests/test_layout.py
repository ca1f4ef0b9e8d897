"""The layout in a config: what is recorded, and what it rebuilds."""

import copy
import json
import pickle
import sys

import pytest
import torch
import transformers as T
from pruned import SOME, logits, rebuilt, shapes, shrunk, uneven
from tiny import DECODERS, FAMILIES, SEQ2SEQ, tiny_batch, tiny_model
from transformers.pytorch_utils import Conv1D

from hf_prune import MagnitudeConfig, PruningMask, layout, prunable_units, prune, shrink
from hf_prune.errors import MaskError
from hf_prune.layout import ConfigView


class TestRecording:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_an_uneven_model_is_rebuilt_from_its_config_alone(self, name):
        model = shrunk(name)
        assert model.config.hf_prune["version"] == 1
        config = type(model.config).from_dict(json.loads(model.config.to_json_string()))
        assert shapes(rebuilt(config, type(model))) == shapes(model)

    @pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "opt", "llama", "qwen3", "phi3", "bart", "vit"])
    def test_uniform_widths_need_no_layout(self, name):
        model = tiny_model(name)
        prune(model, MagnitudeConfig(budget={"params": 0.8}, allocation="uniform"))
        dense = model.num_parameters()
        shrink(model)
        assert model.num_parameters() < dense
        assert not hasattr(model.config, "hf_prune")
        assert "hf_prune" not in model.config.to_json_string()

    def test_a_second_pruning_that_evens_out_drops_the_layout(self):
        model = tiny_model("bert")
        units = prunable_units(model)
        first, *rest = [group.name for group in units.of_kind("neurons")]
        half = torch.arange(64) < 32
        shrink(model, PruningMask({first: half}, units))
        assert model.config.hf_prune == {
            "version": 1,
            "numbers": {
                "encoder.layer.0.intermediate.dense.out_features": 32,
                "encoder.layer.0.output.dense.in_features": 32,
            },
        }
        shrink(model, PruningMask(dict.fromkeys(rest, half), prunable_units(model)))
        assert not hasattr(model.config, "hf_prune")
        assert not hasattr(model.bert.config, "hf_prune")
        assert model.config.intermediate_size == 32

    @pytest.mark.parametrize("name", SOME)
    def test_two_prunings_record_the_same_as_one(self, name):
        both, model = tiny_model(name), tiny_model(name)
        mask = uneven(both)
        shrink(both, mask)
        units = prunable_units(model)
        wide = [group.name for group in units.of_kind("heads", "neurons")]
        shrink(model, PruningMask({key: mask[key] for key in wide}, units))
        units = prunable_units(model)
        shrink(model, PruningMask({key: mask[key] for key in units.stacks}, units))
        assert model.config.to_dict() == both.config.to_dict()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), both.parameters(), strict=True))

    def test_names_are_relative_to_the_base_model(self):
        config = shrunk("bert").config
        assert all(key.startswith("encoder.layer.") for key in config.hf_prune["numbers"])
        for cls in (T.BertModel, T.BertForMaskedLM, T.BertForQuestionAnswering, T.BertForPreTraining):
            model = rebuilt(config, cls)
            assert model.base_model.encoder.layer[0].intermediate.dense.out_features == 64 * 2 // 5

    def test_recording_leaves_the_dense_model_alone(self):
        model, dense = tiny_model("phi3"), tiny_model("phi3")
        before = copy.deepcopy(dense.config.to_dict())
        shrink(model, uneven(model))
        assert dense.config.to_dict() == before
        assert shapes(rebuilt(T.Phi3Config.from_dict(before), T.Phi3ForCausalLM)) == shapes(dense)


class TestConfigView:
    """Phi3 reads its head counts from the config of the module."""

    def model(self):
        return shrunk("phi3", drop=False)

    def test_own_values_differ_all_else_is_shared(self):
        model = self.model()
        views = [layer.self_attn.config for layer in model.model.layers if layer.self_attn.config is not model.config]
        assert views and all(type(view) is ConfigView for view in views)
        assert views[0].num_key_value_heads < model.config.num_key_value_heads
        assert views[0].hidden_size == model.config.hidden_size
        views[0].some_note = 3
        assert model.config.some_note == 3
        views[0].num_key_value_heads = 7
        assert model.config.num_key_value_heads == 2

    def test_the_attention_implementation_follows(self):
        model = self.model()
        batch = tiny_batch("phi3")
        expected = logits(model, batch)
        model.set_attn_implementation("eager")
        assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_is_independent(self, duplicate):
        model = self.model()
        other = duplicate(model)
        batch = tiny_batch("phi3")
        assert torch.equal(logits(other, batch), logits(model, batch))
        view = other.model.layers[0].self_attn.config
        assert type(view) is ConfigView and view._config is other.config is not model.config
        other.set_attn_implementation("eager")
        assert model.model.layers[0].self_attn.config._attn_implementation == "sdpa"

    def test_missing_attributes_stay_missing(self):
        view = self.model().model.layers[0].self_attn.config
        assert not hasattr(view, "no_such_thing")
        with pytest.raises(AttributeError):
            view.__no_such_dunder__  # noqa: B018


class TestConfigAfterDroppingLayers:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_depth_and_per_layer_entries_are_cut(self, name):
        model = tiny_model(name)
        units = prunable_units(model)
        types = list(getattr(model.config, "layer_types", None) or [])
        shrink(model, PruningMask({stack: torch.arange(3) != 1 for stack in units.stacks}, units))
        assert not hasattr(model.config, "hf_prune")
        for stack, spec in units.stacks.items():
            assert getattr(model.config, spec.config_depth) == 2
            assert len(model.base_model.get_submodule(stack)) == 2
        assert model.config.num_hidden_layers == 2
        if types:
            assert model.config.layer_types == [types[0], types[2]]
        # As a reader of the file sees it
        config = type(model.config).from_dict(json.loads(model.config.to_json_string()))
        assert shapes(rebuilt(config, type(model))) == shapes(model)

    @pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
    def test_layers_are_renumbered_for_the_cache(self, name):
        model = tiny_model(name)
        units = prunable_units(model)
        shrink(model, PruningMask({stack: torch.arange(3) != 1 for stack in units.stacks}, units))
        for stack, spec in units.stacks.items():
            for index, layer in enumerate(model.base_model.get_submodule(stack)):
                numbers = {m.layer_idx for m in layer.modules() if isinstance(getattr(m, "layer_idx", None), int)}
                assert numbers <= {index}
                if spec.decoder or name in DECODERS:
                    assert numbers == {index}

    @pytest.mark.parametrize("name", ["t5", "t5/gated", "bart", "whisper"])
    def test_the_two_stacks_are_cut_apart(self, name):
        model = tiny_model(name)
        units = prunable_units(model)
        encoder, decoder = units.stacks
        keep = {encoder: torch.tensor([True, False, True]), decoder: torch.tensor([True, False, False])}
        shrink(model, PruningMask(keep, units))
        depths = [getattr(model.config, spec.config_depth) for spec in units.stacks.values()]
        assert depths == [2, 1]
        assert [len(model.base_model.get_submodule(stack)) for stack in units.stacks] == [2, 1]
        assert shapes(rebuilt(model.config, type(model))) == shapes(model)

    def test_the_configs_nested_in_t5_follow(self):
        model = tiny_model("t5")
        units = prunable_units(model)
        keep = {
            "encoder.block": torch.tensor([True, False, True]),
            "decoder.block": torch.tensor([True, False, False]),
        }
        shrink(model, PruningMask(keep, units))
        fresh = rebuilt(model.config, type(model))
        for stack in ("encoder", "decoder"):
            mine, theirs = (m.get_submodule(stack).config.to_dict() for m in (model, fresh))
            assert mine == theirs
        assert (model.encoder.config.num_layers, model.decoder.config.num_layers) == (2, 1)

    @pytest.mark.parametrize("name", SOME)
    def test_every_nested_model_sees_the_config_that_a_fresh_one_would(self, name):
        model = shrunk(name)
        fresh = dict(rebuilt(model.config, type(model)).named_modules())
        for key, module in model.named_modules():
            if isinstance(module, T.PreTrainedModel):
                mine, theirs = module.config.to_dict(), fresh[key].config.to_dict()
                for name_of_run in ("dtype", "architectures"):
                    mine.pop(name_of_run, None), theirs.pop(name_of_run, None)
                assert mine == theirs, key

    def test_the_last_layer_stays(self):
        model = tiny_model("llama")
        units = prunable_units(model)
        before = model.config.to_dict()
        with pytest.raises(MaskError, match="drops all layers"):
            shrink(model, PruningMask({"layers": torch.zeros(3, dtype=torch.bool)}, units))
        assert model.config.to_dict() == before


class TestApplying:
    @pytest.mark.parametrize("name", SOME)
    def test_twice_is_once(self, name):
        model = shrunk(name)
        config, batch = json.dumps(model.config.hf_prune), tiny_batch(name)
        expected, before = logits(model, batch), list(model.parameters())
        layout.apply_layout(model)
        layout.apply_layout(model)
        assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
        assert torch.equal(logits(model, batch), expected)
        assert json.dumps(model.config.hf_prune) == config

    def test_without_a_layout_nothing_happens(self):
        model = tiny_model("bert")
        before = shapes(model)
        layout.apply_layout(model)
        model.config.hf_prune = None
        layout.apply_layout(model)
        assert shapes(model) == before

    def test_frozen_weights_stay_frozen(self):
        model = tiny_model("bert")
        for parameter in model.parameters():
            parameter.requires_grad = False
        model.config.hf_prune = shrunk("bert", drop=False).config.hf_prune
        layout.apply_layout(model)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_it_only_touches_the_config_that_holds_it(self):
        config = shrunk("bert").config
        other = T.BertForSequenceClassification(copy.deepcopy(FAMILIES["bert"][0]))
        rebuilt(config, T.BertForSequenceClassification)
        assert shapes(other) == shapes(tiny_model("bert"))


class TestEnabling:
    @pytest.fixture(autouse=True)
    def enabled_again(self):
        yield
        layout.disable()
        layout.enable()

    def post_init(self):
        return T.PreTrainedModel.post_init

    def test_both_are_idempotent(self):
        layout.enable()
        once = self.post_init()
        layout.enable()
        assert self.post_init() is once
        layout.disable()
        stock = self.post_init()
        assert stock is once.__wrapped__ and not hasattr(stock, "__wrapped__")
        layout.disable()
        assert self.post_init() is stock
        layout.enable()
        assert self.post_init().__wrapped__ is stock

    def test_disabled_builds_the_dense_model(self):
        model = shrunk("bert", drop=False)
        layout.disable()
        assert shapes(rebuilt(model.config, type(model))) == shapes(tiny_model("bert"))
        layout.enable()
        assert shapes(rebuilt(model.config, type(model))) == shapes(model)

    def test_no_finder_stays_behind(self):
        layout.disable()
        layout.enable()
        assert not any(isinstance(finder, layout._PatchOnImport) for finder in sys.meta_path)

    def test_configs_without_a_layout_are_not_affected(self):
        wrapped = tiny_model("bert")
        layout.disable()
        stock = tiny_model("bert")
        assert all(torch.equal(a, b) for a, b in zip(wrapped.parameters(), stock.parameters(), strict=True))
        assert wrapped.config.to_dict() == stock.config.to_dict()


@pytest.mark.parametrize("name", SOME)
def test_what_is_cut_is_linear_or_conv1d(name):
    model = shrunk(name)
    modules, kinds = dict(model.base_model.named_modules()), set()
    for path, value in model.config.hf_prune["numbers"].items():
        key, _, attribute = path.rpartition(".")
        if attribute in ("in_features", "out_features", "nx", "nf"):
            module = modules[key]
            kinds.add(type(module))
            assert type(module) is (Conv1D if attribute in ("nx", "nf") else torch.nn.Linear)
            assert value == getattr(module, attribute)
            assert value == module.weight.shape[attribute in ("in_features", "nf")]
            assert attribute not in ("out_features", "nf") or module.bias is None or module.bias.shape == (value,)
    assert kinds
