"""The layout in a config: what is recorded, what it rebuilds, and what a hostile one can't do."""

import copy
import json
import pickle
import sys

import hypothesis.strategies as st
import pytest
import torch
import transformers as T
from hypothesis import HealthCheck, given, settings
from tiny import DECODERS, FAMILIES, SEQ2SEQ, tiny_batch, tiny_model
from transformers.pytorch_utils import Conv1D

from hf_prune import MagnitudeConfig, PruningMask, layout, prunable_units, prune, shrink
from hf_prune.errors import LayoutError, MaskError
from hf_prune.layout import ConfigView

# What shrinks and loads differently: separate, fused, interleaved and shared projections, one and two stacks
SOME = ["bert", "distilbert", "deberta-v2", "gpt2", "gpt_neox", "llama", "phi3", "t5", "bart", "whisper", "vit"]


def logits(model, batch):
    """The first tensor that a model computes, in eval mode."""
    model.eval()
    with torch.no_grad():
        return next(value for value in model(**batch).values() if isinstance(value, torch.Tensor))


def uneven(model, drop=True):
    """A mask that keeps other numbers of heads and neurons in each layer, and drops the second layer of each stack."""
    units, generator, keep = prunable_units(model), torch.Generator().manual_seed(0), {}
    for group in units.of_kind("heads", "neurons"):
        if group.prunable:
            count = max(group.size * (2 + group.layer) // 5, 1)
            keep[group.name] = torch.zeros(group.size, dtype=torch.bool)
            keep[group.name][torch.randperm(group.size, generator=generator)[:count]] = True
    for stack in units.stacks if drop else ():
        keep[stack] = torch.arange(units[stack].size) != 1
    return PruningMask(keep, units)


def shrunk(name, auto=None, drop=True, **options):
    """A tiny model of a family, pruned so unevenly that no stock config holds it."""
    model = tiny_model(name, auto, **options)
    return shrink(model, uneven(model, drop))


def shapes(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def rebuilt(config, cls, device="meta"):
    with torch.device(device):
        return cls(copy.deepcopy(config))


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
        assert set(model.config.hf_prune["modules"]) == {
            "encoder.layer.0.intermediate.dense",
            "encoder.layer.0.output.dense",
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
        assert all(key.startswith("encoder.layer.") for key in config.hf_prune["modules"])
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


# Layouts that someone else wrote

LINEAR, QUERY, SELF = (
    "encoder.layer.0.intermediate.dense",
    "encoder.layer.0.attention.self.query",
    "encoder.layer.0.attention.self",
)


def weight(value, name=LINEAR):
    return {"version": 1, "modules": {name: {"weight": value}}}


def attributes(value, name=SELF):
    return {"version": 1, "modules": {name: {"attributes": value}}}


def config(value, name=SELF):
    return {"version": 1, "modules": {name: {"config": value}}}


# what is wrong -> (layout, what the message must name)
HOSTILE = {
    "string": ("layout", "hf_prune"),
    "list": ([1], "hf_prune"),
    "true": (True, "hf_prune"),
    "false": (False, "hf_prune"),
    "zero": (0, "hf_prune"),
    "empty": ({}, "version"),
    "no version": ({"modules": {}}, "version"),
    "no modules": ({"version": 1}, "modules"),
    "extra key": ({"version": 1, "modules": {}, "code": "x"}, "hf_prune"),
    "later version": ({"version": 2, "modules": {}}, "version"),
    "version as text": ({"version": "1", "modules": {}}, "version"),
    "version true": ({"version": True, "modules": {}}, "version"),
    "version as float": ({"version": 1.0, "modules": {}}, "version"),
    "no number as version": ({"version": None, "modules": {}}, "version"),
    "list as version": ({"version": [1], "modules": {}}, "version"),
    "list of modules": ({"version": 1, "modules": [LINEAR]}, "modules"),
    "modules missing": ({"version": 1, "modules": None}, "modules"),
    "entry is a list": ({"version": 1, "modules": {LINEAR: [8, 32]}}, LINEAR),
    "entry is nothing": ({"version": 1, "modules": {LINEAR: None}}, LINEAR),
    "entry with another key": ({"version": 1, "modules": {LINEAR: {"bias": [8]}}}, LINEAR),
    "three numbers": (weight([8, 32, 1]), LINEAR),
    "one number": (weight([8]), LINEAR),
    "no numbers": (weight([]), LINEAR),
    "bare number": (weight(8), LINEAR),
    "no weight": (weight(None), LINEAR),
    "weight as text": (weight("ab"), LINEAR),
    "weight as dict": (weight({"0": 8, "1": 32}), LINEAR),
    "negative": (weight([-1, 32]), LINEAR),
    "boolean": (weight([True, 32]), LINEAR),
    "float": (weight([8.0, 32]), LINEAR),
    "not a number": (weight([float("nan"), 32]), LINEAR),
    "infinite": (weight([float("inf"), 32]), LINEAR),
    "text numbers": (weight(["8", "32"]), LINEAR),
    "nested": (weight([[8], 32]), LINEAR),
    "nothing": (weight([None, 32]), LINEAR),
    "one row more": (weight([65, 32]), LINEAR),
    "one column more": (weight([64, 33]), LINEAR),
    "huge": (weight([10**12, 32]), LINEAR),
    "beyond 64 bits": (weight([64, 10**30]), LINEAR),
    "unknown module": (weight([8, 32], "encoder.layer.0.nothing"), "encoder.layer.0.nothing"),
    "unknown root": (weight([8, 32], "nothing.at.all"), "nothing.at.all"),
    "layer that is not there": (weight([8, 32], "encoder.layer.3.output.dense"), "encoder.layer.3.output.dense"),
    "negative layer": (weight([8, 32], "encoder.layer.-1.output.dense"), "encoder.layer.-1.output.dense"),
    "name with the base": (weight([8, 32], f"bert.{LINEAR}"), f"bert.{LINEAR}"),
    "path": (weight([8, 32], "../x"), "../x"),
    "absolute path": (weight([8, 32], "/etc/passwd"), "/etc/passwd"),
    "dunder": (weight([8, 32], "__class__"), "__class__"),
    "method": (weight([8, 32], "forward"), "forward"),
    "weight of the whole model": (weight([8, 32], ""), "Linear"),
    "norm": (weight([8, 32], "encoder.layer.0.output.LayerNorm"), "encoder.layer.0.output.LayerNorm"),
    "embedding": (weight([8, 32], "embeddings.word_embeddings"), "embeddings.word_embeddings"),
    "dropout": (weight([0, 0], "encoder.layer.0.output.dropout"), "encoder.layer.0.output.dropout"),
    "layer": (weight([0, 0], "encoder.layer.0"), "encoder.layer.0"),
    "parameter": (weight([8, 32], f"{LINEAR}.weight"), f"{LINEAR}.weight"),
    "attributes is a list": (attributes([1]), SELF),
    "attributes is an empty list": (attributes([]), SELF),
    "attributes is text": (attributes("ab"), SELF),
    "attributes is a number": (attributes(3), SELF),
    "attributes is nothing": (attributes(None), SELF),
    "attributes is pairs": (attributes([["num_attention_heads", 2]]), SELF),
    "unknown attribute": (attributes({"no_such": 1}), "no_such"),
    "private attribute": (attributes({"_version": 1}), "_version"),
    "dunder attribute": (attributes({"__class__": 1}), "__class__"),
    "method as attribute": (attributes({"forward": 1}), "forward"),
    "boolean attribute": (attributes({"training": 1}), "training"),
    "module as attribute": (attributes({"query": 1}), "query"),
    "class attribute": (attributes({"call_super_init": 0}), "call_super_init"),
    "weight as attribute": (attributes({"weight": 1}, LINEAR), "weight"),
    "dotted attribute": (attributes({"query.in_features": 1}), "query.in_features"),
    "attribute of text": (attributes({"num_attention_heads": "2"}), "num_attention_heads"),
    "attribute of float": (attributes({"num_attention_heads": 2.0}), "num_attention_heads"),
    "attribute true": (attributes({"num_attention_heads": True}), "num_attention_heads"),
    "attribute of nothing": (attributes({"num_attention_heads": None}), "num_attention_heads"),
    "attribute of list": (attributes({"num_attention_heads": [2]}), "num_attention_heads"),
    "negative attribute": (attributes({"num_attention_heads": -2}), "num_attention_heads"),
    "huge attribute": (attributes({"num_attention_heads": 10**12}), "num_attention_heads"),
    "larger attribute": (attributes({"num_attention_heads": 5}), "num_attention_heads"),
    "config is a list": (config([1]), SELF),
    "config is text": (config("ab"), SELF),
    "config is a number": (config(3), SELF),
    "config is nothing": (config(None), SELF),
    "config of a module without one": (config({"num_attention_heads": 2}, LINEAR), LINEAR),
    "unknown config entry": (config({"no_such": 1}), "no_such"),
    "private config entry": (config({"_attn_implementation": 1}), "_attn_implementation"),
    "method of the config": (config({"to_dict": 1}), "to_dict"),
    "boolean config entry": (config({"is_decoder": 1}), "is_decoder"),
    "config entry of text": (config({"num_attention_heads": "2"}), "num_attention_heads"),
    "config entry true": (config({"num_attention_heads": True}), "num_attention_heads"),
    "negative config entry": (config({"num_attention_heads": -1}), "num_attention_heads"),
    "larger config entry": (config({"num_attention_heads": 5}), "num_attention_heads"),
    "huge config entry": (config({"vocab_size": 10**12}), "vocab_size"),
}


def stranger(hf_prune, name="bert"):
    """The config of a checkpoint with a layout that someone else wrote."""
    found = copy.deepcopy(FAMILIES[name][0])
    found.architectures = ["BertForSequenceClassification" if name == "bert" else "T5ForConditionalGeneration"]
    found.hf_prune = hf_prune
    return found


class TestHostile:
    @pytest.mark.parametrize("what", HOSTILE)
    def test_building_refuses_and_says_what(self, what):
        hf_prune, named = HOSTILE[what]
        with pytest.raises(LayoutError) as refusal:
            rebuilt(stranger(hf_prune), T.BertForSequenceClassification)
        assert named in str(refusal.value)

    @pytest.mark.parametrize(
        "what", ["list", "huge", "unknown module", "norm", "attributes is a list", "config is text"]
    )
    def test_loading_refuses_before_it_allocates(self, what, tmp_path):
        hf_prune, named = HOSTILE[what]
        tiny_model("bert").save_pretrained(tmp_path)
        found = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**found, "hf_prune": hf_prune}))
        with pytest.raises(LayoutError) as refusal:
            T.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert named in str(refusal.value)

    def test_a_layout_of_other_weights_fails_loudly(self, tmp_path):
        tiny_model("bert").save_pretrained(tmp_path)
        found = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**found, "hf_prune": weight([8, 32])}))
        with pytest.raises(RuntimeError, match="mismatch"):
            T.AutoModelForSequenceClassification.from_pretrained(tmp_path)

    def test_one_bad_entry_among_good_ones_is_found(self):
        good = shrunk("bert", drop=False).config.hf_prune
        bad = copy.deepcopy(good)
        bad["modules"]["encoder.layer.2.output.dense"]["weight"][1] = 10**12
        rebuilt(stranger(good), T.BertForSequenceClassification)
        with pytest.raises(LayoutError, match="encoder.layer.2.output.dense"):
            rebuilt(stranger(bad), T.BertForSequenceClassification)

    def test_a_tied_weight_is_not_for_sale(self):
        """The base of T5 is the whole model: its head, tied to the embeddings, is within reach of a name."""
        dense = rebuilt(stranger(None, "t5"), T.T5ForConditionalGeneration)
        try:
            model = rebuilt(stranger(weight([8, 32], "lm_head"), "t5"), T.T5ForConditionalGeneration)
        except LayoutError:
            return
        assert all(p.numel() <= dense.get_parameter(name).numel() for name, p in model.named_parameters())

    def test_nothing_at_all_is_a_layout(self):
        model = rebuilt(stranger({"version": 1, "modules": {}}), T.BertForSequenceClassification)
        assert shapes(model) == shapes(tiny_model("bert"))
        model = rebuilt(stranger({"version": 1, "modules": {LINEAR: {}}}), T.BertForSequenceClassification)
        assert shapes(model) == shapes(tiny_model("bert"))

    def test_an_error_patches_nothing_for_good(self):
        with pytest.raises(LayoutError):
            rebuilt(stranger(weight([8])), T.BertForSequenceClassification)
        assert shapes(tiny_model("bert")) == shapes(tiny_model("bert"))
        assert shapes(rebuilt(shrunk("bert").config, T.BertForSequenceClassification)) == shapes(shrunk("bert"))


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "weight", LINEAR, "../x", "__class__"])
)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["version", "modules", "weight", "attributes", "config", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
_NAMES = st.sampled_from(sorted(dict(rebuilt(FAMILIES["bert"][0], T.BertModel).named_modules())) + ["x", "encoder.x"])
_KEYS = st.sampled_from(
    ["num_attention_heads", "all_head_size", "in_features", "training", "hidden_size", "_x", "query"]
)
_NUMBERS = st.integers(-1, 70) | _SCALARS
_ENTRY = (
    st.fixed_dictionaries(
        {},
        optional={
            "weight": st.lists(_NUMBERS, min_size=2, max_size=2) | _JSON,
            "attributes": st.dictionaries(_KEYS, _NUMBERS, max_size=2) | _JSON,
            "config": st.dictionaries(_KEYS, _NUMBERS, max_size=2) | _JSON,
        },
    )
    | _JSON
)
_LAYOUT = st.fixed_dictionaries({"version": st.just(1), "modules": st.dictionaries(_NAMES, _ENTRY, max_size=3)})


@settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(_LAYOUT | _JSON)
def test_any_garbage_is_refused_or_makes_the_model_smaller(hf_prune):
    dense = shapes(rebuilt(stranger(None), T.BertForSequenceClassification))
    try:
        model = rebuilt(stranger(hf_prune), T.BertForSequenceClassification)
    except LayoutError:
        return
    found = shapes(model)
    assert found.keys() == dense.keys()
    for name, shape in found.items():
        assert len(shape) == len(dense[name])
        assert all(mine <= theirs for mine, theirs in zip(shape, dense[name], strict=True))


def test_what_is_cut_is_linear_or_conv1d():
    for name in SOME:
        model = shrunk(name)
        modules = dict(model.base_model.named_modules())
        for key, entry in model.config.hf_prune["modules"].items():
            if "weight" in entry:
                assert isinstance(modules[key], torch.nn.Linear | Conv1D)
                assert entry["weight"] == list(modules[key].weight.shape)
