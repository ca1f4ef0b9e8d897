"""Layouts that someone else wrote: what they can't do."""

import copy
import json

import hypothesis.strategies as st
import pytest
import transformers as T
from hypothesis import HealthCheck, given, settings
from pruned import rebuilt, shapes, shrunk
from tiny import FAMILIES, tiny_model

from hf_prune.errors import LayoutError

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
