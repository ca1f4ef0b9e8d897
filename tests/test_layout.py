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


# Layouts that someone else wrote

LINEAR, SELF = "encoder.layer.0.intermediate.dense", "encoder.layer.0.attention.self"
ROWS, COLUMNS, HEADS, VIEWED = (
    f"{LINEAR}.out_features",
    f"{LINEAR}.in_features",
    f"{SELF}.num_attention_heads",
    f"{SELF}.config.num_attention_heads",
)


def number(key, value=1):
    """A layout of one number."""
    return {"version": 1, "numbers": {key: value}}


# what is wrong -> (layout, what the message must name)
HOSTILE = {
    "string": ("layout", "hf_prune"),
    "list": ([1], "hf_prune"),
    "true": (True, "hf_prune"),
    "false": (False, "hf_prune"),
    "zero": (0, "hf_prune"),
    "empty": ({}, "version"),
    "no version": ({"numbers": {}}, "version"),
    "no numbers": ({"version": 1}, "numbers"),
    "extra key": ({"version": 1, "numbers": {}, "code": "x"}, "hf_prune"),
    "another key": ({"version": 1, "modules": {LINEAR: {"weight": [8, 32]}}}, "numbers"),
    "later version": ({"version": 2, "numbers": {}}, "version is 2"),
    "version as text": ({"version": "1", "numbers": {}}, "version is '1'"),
    "version true": ({"version": True, "numbers": {}}, "version is True"),
    "version as float": ({"version": 1.0, "numbers": {}}, "version is 1.0"),
    "no number as version": ({"version": None, "numbers": {}}, "version is None"),
    "list as version": ({"version": [1], "numbers": {}}, "version is [1]"),
    "list of numbers": ({"version": 1, "numbers": [ROWS]}, "numbers"),
    "numbers as pairs": ({"version": 1, "numbers": [[ROWS, 8]]}, "numbers"),
    "numbers as text": ({"version": 1, "numbers": "ab"}, "numbers"),
    "numbers is a number": ({"version": 1, "numbers": 3}, "numbers"),
    "numbers is nothing": ({"version": 1, "numbers": None}, "numbers"),
    "entry of a module": (number(LINEAR, {"out_features": 8}), "dense"),
    "one row more": (number(ROWS, 65), ROWS),
    "one column more": (number(COLUMNS, 33), COLUMNS),
    "one input more": (number("encoder.layer.0.output.dense.in_features", 65), "output.dense.in_features"),
    "one head more": (number(HEADS, 5), HEADS),
    "one head more in the config": (number(VIEWED, 5), VIEWED),
    "huge vocabulary": (number(f"{SELF}.config.vocab_size", 10**12), f"{SELF}.config.vocab_size"),
    "empty name": (number(""), "''"),
    "dot": (number("."), "''"),
    "dots": (number("..."), "'..'"),
    "unknown module": (number("encoder.layer.0.nothing.in_features"), "encoder.layer.0.nothing"),
    "unknown root": (number("nothing.at.all.in_features"), "nothing.at.all"),
    "layer that is not there": (number("encoder.layer.3.output.dense.in_features"), "encoder.layer.3.output.dense"),
    "negative layer": (number("encoder.layer.-1.output.dense.in_features"), "encoder.layer.-1.output.dense"),
    "name with the base": (number(f"bert.{ROWS}"), f"bert.{LINEAR}"),
    "path": (number("../x.in_features"), "../x"),
    "absolute path": (number("/etc/passwd"), "/etc/passwd"),
    "absolute path of a module": (number("/etc/passwd.in_features"), "/etc/passwd"),
    "dunder": (number("__class__"), "__class__"),
    "dunder of a module": (number("__class__.in_features"), "__class__"),
    "method": (number("forward"), "forward"),
    "method of a module": (number("forward.in_features"), "forward"),
    "features of the whole model": (number("in_features"), "in_features"),
    "norm": (number("encoder.layer.0.output.LayerNorm.in_features"), "encoder.layer.0.output.LayerNorm"),
    "shape of a norm": (number("encoder.layer.0.output.LayerNorm.normalized_shape"), "normalized_shape"),
    "embedding": (number("embeddings.word_embeddings.in_features"), "embeddings.word_embeddings"),
    "larger embedding": (number("embeddings.word_embeddings.num_embeddings", 10**12), "num_embeddings"),
    "dropout": (number("encoder.layer.0.output.dropout.in_features", 0), "encoder.layer.0.output.dropout"),
    "layer": (number("encoder.layer.0.in_features", 0), "encoder.layer.0"),
    "parameter": (number(f"{LINEAR}.weight.in_features"), f"{LINEAR}.weight"),
    "features of another kind": (number(f"{LINEAR}.nf"), "nf"),
    "unknown attribute": (number(f"{SELF}.no_such"), "no_such"),
    "empty attribute": (number(f"{SELF}."), SELF),
    "private attribute": (number(f"{SELF}._version"), "_version"),
    "dunder attribute": (number(f"{SELF}.__class__"), "__class__"),
    "method as attribute": (number(f"{SELF}.forward"), "forward"),
    "boolean attribute": (number(f"{SELF}.training"), "whole number 'training'"),
    "module as attribute": (number(f"{SELF}.query"), "query"),
    "class attribute": (number(f"{SELF}.call_super_init", 0), "call_super_init"),
    "weight as attribute": (number(f"{LINEAR}.weight"), "weight"),
    "config as attribute": (number(f"{SELF}.config"), "config"),
    "dotted attribute": (number(f"{SELF}.query.weight.ndim"), f"{SELF}.query.weight"),
    "config of a module without one": (number(f"{LINEAR}.config.num_attention_heads", 2), f"{LINEAR} has no config"),
    "unknown config entry": (number(f"{SELF}.config.no_such"), "no_such"),
    "empty config entry": (number(f"{SELF}.config."), f"{SELF}.config."),
    "private config entry": (number(f"{SELF}.config._attn_implementation"), "_attn_implementation"),
    "dunder config entry": (number(f"{SELF}.config.__dict__"), "__dict__"),
    "method of the config": (number(f"{SELF}.config.to_dict"), "to_dict"),
    "boolean config entry": (number(f"{SELF}.config.is_decoder"), "is_decoder"),
    "dotted config entry": (number(f"{SELF}.config.id2label.x"), f"{SELF}.config.id2label"),
    "layout of the config": (number(f"{SELF}.config.hf_prune"), f"{SELF}.config.hf_prune"),
}
# The same wrong values for each kind of number: features, an attribute, an entry of the config
VALUES = {
    "negative": -1,
    "true": True,
    "false": False,
    "float": 2.0,
    "not a number": float("nan"),
    "infinite": float("inf"),
    "text": "2",
    "nothing": None,
    "list": [2],
    "dict": {"0": 2},
    "huge": 10**12,
    "beyond 64 bits": 10**30,
}
HOSTILE |= {
    f"{what} as {kind}": (number(key, value), f"{key} is {value!r}")
    for kind, key in {"rows": ROWS, "columns": COLUMNS, "attribute": HEADS, "config entry": VIEWED}.items()
    for what, value in VALUES.items()
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
        "what", ["list", "huge as rows", "unknown module", "norm", "text as attribute", "huge vocabulary"]
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
        (tmp_path / "config.json").write_text(json.dumps({**found, "hf_prune": number(ROWS, 8)}))
        with pytest.raises(RuntimeError, match="mismatch"):
            T.AutoModelForSequenceClassification.from_pretrained(tmp_path)

    def test_one_bad_entry_among_good_ones_is_found(self):
        good = shrunk("bert", drop=False).config.hf_prune
        bad = copy.deepcopy(good)
        bad["numbers"]["encoder.layer.2.output.dense.in_features"] = 10**12
        rebuilt(stranger(good), T.BertForSequenceClassification)
        with pytest.raises(LayoutError, match="encoder.layer.2.output.dense.in_features"):
            rebuilt(stranger(bad), T.BertForSequenceClassification)

    @pytest.mark.parametrize("key", ["lm_head.in_features", "lm_head.out_features", "shared.num_embeddings"])
    def test_a_tied_weight_is_not_for_sale(self, key):
        """The base of T5 is the whole model: its head, tied to the embeddings, is within reach of a name."""
        dense = rebuilt(stranger(None, "t5"), T.T5ForConditionalGeneration)
        try:
            model = rebuilt(stranger(number(key, 8), "t5"), T.T5ForConditionalGeneration)
        except LayoutError:
            return
        assert all(p.numel() <= dense.get_parameter(name).numel() for name, p in model.named_parameters())

    def test_nothing_at_all_is_a_layout(self):
        model = rebuilt(stranger({"version": 1, "numbers": {}}), T.BertForSequenceClassification)
        assert shapes(model) == shapes(tiny_model("bert"))

    def test_an_error_patches_nothing_for_good(self):
        with pytest.raises(LayoutError):
            rebuilt(stranger(number(ROWS, 65)), T.BertForSequenceClassification)
        assert shapes(tiny_model("bert")) == shapes(tiny_model("bert"))
        assert shapes(rebuilt(shrunk("bert").config, T.BertForSequenceClassification)) == shapes(shrunk("bert"))


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "in_features", LINEAR, "../x", "__class__"])
)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["version", "numbers", ROWS, VIEWED, "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
_MODULES = dict(rebuilt(FAMILIES["bert"][0], T.BertModel).named_modules())
_ATTRIBUTES = ["num_attention_heads", "all_head_size", "in_features", "out_features", "training", "hidden_size"]
_PATHS = st.tuples(
    st.sampled_from([*sorted(_MODULES), "x", "encoder.x"]),
    st.sampled_from(["", "config", "weight"]),
    st.sampled_from([*_ATTRIBUTES, "_x", "query", ""]),
).map(lambda parts: ".".join(filter(None, parts)))
# What the modules do have: garbage is rarely that lucky
_OWN = st.sampled_from(
    [f"{name}.{key}" for name, module in _MODULES.items() for key, n in vars(module).items() if type(n) is int]
    + [VIEWED, f"{SELF}.config.hidden_size"]
)
_LUCKY = st.dictionaries(_OWN, st.integers(0, 33), min_size=1, max_size=3)
_NUMBERS = st.integers(-1, 70) | _SCALARS | _JSON
_GARBAGE = st.dictionaries(_OWN | _PATHS | st.text(max_size=5), _NUMBERS, max_size=3) | _JSON
_LAYOUT = st.fixed_dictionaries({"version": st.just(1), "numbers": _LUCKY | _GARBAGE})


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
