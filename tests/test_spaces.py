"""Search spaces: members are shrinkable and nested, samplers draw as the paper does, bad bounds are refused."""

import json
from itertools import product

import pytest
import torch
from pruned import logits
from tiny import DECODERS, FAMILIES, SEQ2SEQ, tiny_batch, tiny_model
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

import hf_prune
from hf_prune import ConfigError, InfeasibleBudgetError
from hf_prune.search.spaces import known_spaces, search_space
from hf_prune.surgery import check_shrinkable


def draws(space, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [space.sample(generator) for _ in range(count)]


def corners(space):
    return [space.smallest, space.middle, space.largest]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_member_of_every_space_can_be_shrunk(name):
    model = tiny_model(name)
    for kind in known_spaces():
        space = search_space(kind, model)
        least = {key: values[0] for key, values in space.parameters.items()}
        for member in [*corners(space), *draws(space, 3), least]:
            mask = space.mask(member)
            check_shrinkable(space.units, mask)
            for stack in space.units.stacks:  # a layer goes with all of its units
                for index, kept in enumerate(mask[stack].tolist()):
                    groups = [g for g in space.units.of_layer(stack, index) if g.prunable]
                    assert kept or not any(mask[g.name].any() for g in groups)
        assert space.mask(space.largest) == hf_prune.PruningMask({}, space.units)
        assert list(space.smallest) == list(space.parameters)
        costs = hf_prune.CostTable(model, space.units)
        params = [costs.of(space.mask(member)).params for member in draws(space, 5)]
        assert costs.of(space.mask(space.smallest)).params <= sorted(params)[2]
    smallest = search_space("small", model).smallest
    assert set(smallest.values()) == {1}
    assert len(smallest) == (3 if name not in SEQ2SEQ else 4 if name.startswith("t5") else 6)


def test_small_masks_count_and_nest():
    space = hf_prune.SmallSpace(tiny_model("bert", num_attention_heads=2, intermediate_size=4, num_hidden_layers=2))
    members = list(space)
    assert len(members) == space.size == 2 * 2 * 4
    table = hf_prune.CostTable(tiny_model("bert", num_attention_heads=2, intermediate_size=4, num_hidden_layers=2))
    for one in members:
        mask = space.mask(one)
        assert mask.kept("layers") == one["num_layers"]
        assert mask.kept("heads") == one["num_layers"] * one["num_heads"]
        assert mask.kept("neurons") == one["num_layers"] * one["num_units"]
    for one, other in product(members, members):
        nested = all(bool((~space.mask(one)[g] | space.mask(other)[g]).all()) for g in space.units)
        assert nested == all(one[key] <= other[key] for key in one)
        if nested:
            assert table.of(space.mask(one)).params <= table.of(space.mask(other)).params


def test_the_full_mask_is_dense_and_few_layers_are_the_truncated_model():
    model, batch = tiny_model("bert"), tiny_batch("bert")
    space, dense = hf_prune.SmallSpace(model), logits(model, batch)
    hf_prune.apply_mask(model, space.mask({"num_layers": 3, "num_heads": 4, "num_units": 64}))
    assert torch.equal(logits(model, batch), dense)
    hf_prune.apply_mask(model, space.mask({"num_layers": 2, "num_heads": 4, "num_units": 64}))
    two = logits(model, batch)
    hf_prune.remove_mask(model)
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    assert torch.equal(logits(model, batch), two)


def test_other_spaces_mask_what_they_say():
    model = tiny_model("llama")  # two KV groups
    medium, layer, large = (search_space(kind, model) for kind in ("medium", "layer", "large"))
    mask = medium.mask({**medium.largest, "num_heads_0": 1, "num_units_1": 0, "num_heads_2": 0, "num_units_2": 0})
    assert mask["layers.0.self_attn.o_proj"].tolist() == [True, False] and mask["layers"].tolist() == [
        True,
        True,
        False,
    ]
    assert not mask["layers.1.mlp.down_proj"].any() and mask["layers.1.self_attn.o_proj"].all()
    assert layer.mask({"layer_0": 0, "layer_1": 1, "layer_2": 0})["layers"].tolist() == [False, True, False]
    assert layer.mask(dict.fromkeys(layer.parameters, 0))["layers"].tolist() == [True, False, False]
    mask = large.mask({**large.largest, "head_1_0": 0, "unit_2_17": 0})
    assert mask["layers.1.self_attn.o_proj"].tolist() == [False, True]
    assert (~mask["layers.2.mlp.down_proj"]).nonzero().flatten().tolist() == [17]
    bart = hf_prune.SmallSpace(tiny_model("bart"))
    mask = bart.mask({**bart.largest, "decoder.num_heads": 1})
    assert (
        mask["decoder.layers.0.encoder_attn.out_proj"].sum() == mask["decoder.layers.0.self_attn.out_proj"].sum() == 1
    )
    assert mask["encoder.layers.0.self_attn.out_proj"].all()
    assert "decoder.num_cross_heads_1" in hf_prune.MediumSpace(tiny_model("bart")).parameters


def published_fraction(space, member):
    """Parameters of a sub-network of BERT-base by the formula of the authors, who count o_proj whole."""
    mask, total = space.mask(member), 0
    for heads, neurons in zip(space.units.of_kind("heads"), space.units.of_kind("neurons"), strict=True):
        h, u = int(mask[heads.name].sum()), int(mask[neurons.name].sum())
        total += ((768 * 64 + 64) * 3 * h + 768 * 768 + 768 + 1536) * (h > 0) + (2 * 768 * u + 768 + u + 1536) * (
            u > 0
        )
    return (108_311_810 - 12 * 7_087_872 + total) / 108_311_810


# mean and standard deviation; SMALL and LAYER with the draws of 0 layers that the paper has on top
PUBLISHED = {
    "small": (0.430, 0.163, 13),
    "medium": (0.635, 0.048, 0),
    "layer": (0.575, 0.226, 12),
    "large": (0.636, 0.216, 0),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_samplers_induce_the_published_sizes(kind):
    config = BertConfig(vocab_size=9, hidden_size=12, num_hidden_layers=12, num_attention_heads=12)
    space = search_space(kind, BertForSequenceClassification(config))  # the sampler sees the number of units alone
    assert published_fraction(space, space.largest) == 1
    count = {"large": 25, "medium": 300}.get(kind, 800)
    sizes = torch.tensor([published_fraction(space, member) for member in draws(space, count)])
    mean, deviation, counts = PUBLISHED[kind]
    found, square = sizes.mean(), sizes.square().mean()
    if counts:  # 1 of so many draws has no layers
        floor = torch.tensor((108_311_810 - 12 * 7_087_872) / 108_311_810)
        found, square = (found * (counts - 1) + floor) / counts, (square * (counts - 1) + floor**2) / counts
    tolerance = 4 * deviation / count**0.5
    assert found == pytest.approx(mean, abs=tolerance)
    assert (square - found**2).sqrt() == pytest.approx(deviation, abs=tolerance)


def test_bits_are_drawn_uniformly_by_their_number():
    space = hf_prune.LayerSpace(tiny_model("bert"))
    counts = torch.tensor([sum(member.values()) for member in draws(space, 400)]).bincount(minlength=4)
    assert counts[0] == counts[3] == 0 and abs(counts[1] - counts[2]) < 80
    space = hf_prune.LargeSpace(tiny_model("bert"))
    kept = torch.tensor([sum(member.values()) for member in draws(space, 300)])
    assert kept.min() >= 1 and kept.max() < 204 and kept.float().mean() == pytest.approx(102, abs=15)


def test_the_same_seed_draws_the_same():
    for kind in known_spaces():
        space = search_space(kind, tiny_model("bart"))
        assert draws(space, 3) == draws(space, 3) != draws(space, 3, seed=1)


def test_bounds_clip():
    model = tiny_model("bert")
    space = hf_prune.SmallSpace(model, bounds={"num_layers": (2, 3), "num_*s": (1, 3)})
    assert [list(values) for values in space.parameters.values()] == [[2, 3], [1, 2, 3], [1, 2, 3]]
    assert space.size == 18 == len(list(space)) and space.middle == {"num_layers": 2, "num_heads": 2, "num_units": 2}
    assert all(2 <= member["num_layers"] for member in draws(space, 20))
    layer = hf_prune.LayerSpace(model, bounds={"layer_2": (1, 1)})
    assert layer.smallest == {"layer_0": 0, "layer_1": 0, "layer_2": 1}
    assert {sum(member.values()) for member in draws(layer, 30)} == {1, 2}


@pytest.mark.parametrize("kind", known_spaces())
def test_under_a_budget_all_members_cost_less(kind):
    model = tiny_model("bert")
    space = search_space(kind, model, budget={"params": 0.6, "macs": 0.5})
    table = hf_prune.CostTable(model)
    dense, sizes = table.of(), []
    for member in [*corners(space), *draws(space, 20)]:
        costs = table.of(space.mask(member))
        assert costs.params <= 0.6 * dense.params and costs.macs <= 0.5 * dense.macs
        sizes.append(costs.macs / dense.macs)
    assert sizes[2] > 0.3  # the largest uses what there is
    assert kind == "layer" or len(set(sizes)) > 3
    short = hf_prune.CostTable(model, sequence_length=1)
    assert search_space(kind, model, budget={"macs": 0.5}, table=short).limits["macs"] == short.of().macs / 2
    with pytest.raises(ConfigError, match="costs more than the budget"):
        space.mask({name: values[-1] for name, values in space.parameters.items()})
    with pytest.raises(InfeasibleBudgetError, match="nearest feasible"):
        search_space(kind, model, bounds={next(iter(space.parameters)): (1, 1)}, budget={"params": 0.01})


def test_a_description_tells_spaces_apart():
    model = tiny_model("bert")
    one = hf_prune.SmallSpace(model)
    assert one.describe() == hf_prune.SmallSpace(tiny_model("bert", seed=5)).describe()
    json.dumps(one.describe())
    others = [
        hf_prune.MediumSpace(model),
        hf_prune.SmallSpace(model, bounds={"num_layers": (2, 3)}),
        hf_prune.SmallSpace(model, budget={"params": 0.9}),
        hf_prune.SmallSpace(tiny_model("bert", intermediate_size=32)),
        hf_prune.SmallSpace(tiny_model("roberta")),
    ]
    assert all(one.describe() != other.describe() for other in others)


BAD = {
    "unknown space": (lambda m: search_space("tiny", m), "Unknown search space 'tiny'"),
    "unknown parameter": (lambda m: hf_prune.SmallSpace(m, bounds={"num_layer": (1, 2)}), "Did you mean 'num_layers'"),
    "outside": (lambda m: hf_prune.SmallSpace(m, bounds={"num_heads": (1, 5)}), "num_heads is from 1 to 4"),
    "below": (lambda m: hf_prune.SmallSpace(m, bounds={"num_layers": (0, 2)}), "num_layers is from 1 to 3"),
    "empty": (lambda m: hf_prune.SmallSpace(m, bounds={"num_heads": (3, 2)}), "is empty"),
    "contradiction": (
        lambda m: hf_prune.SmallSpace(m, bounds={"num_heads": (1, 2), "num_h*": (3, 4)}),
        "contradict each other",
    ),
    "no pair": (lambda m: hf_prune.SmallSpace(m, bounds={"num_heads": 3}), "must be two whole numbers"),
    "no numbers": (lambda m: hf_prune.SmallSpace(m, bounds={"num_heads": (1, 2.0)}), "must be two whole numbers"),
    "one member": (lambda m: hf_prune.LayerSpace(m, bounds={"layer_*": (1, 1)}), "nothing to search for"),
    "budget": (lambda m: hf_prune.SmallSpace(m, budget={"flops": 0.5}), "Unknown metric in budget"),
    "huge": (lambda m: list(hf_prune.LargeSpace(m)), r"about 10\^61 members"),
    "missing": (lambda m: hf_prune.SmallSpace(m).mask({"num_layers": 2}), "lacks num_heads"),
    "unknown": (lambda m: hf_prune.SmallSpace(m).mask({"heads": 2}), "Unknown parameter"),
    "too many": (
        lambda m: hf_prune.SmallSpace(m).mask({"num_layers": 4, "num_heads": 1, "num_units": 1}),
        "num_layers must be a whole number from 1 to 3, got 4",
    ),
    "a float": (
        lambda m: hf_prune.SmallSpace(m).mask({"num_layers": 1.0, "num_heads": 1, "num_units": 1}),
        "num_layers must be a whole number",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_spaces_and_members(case):
    make, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        make(tiny_model("bert"))


@pytest.mark.parametrize("name", [*DECODERS[:1], "bart", "t5"])
def test_spaces_of_shrunk_models(name):
    model = tiny_model(name)
    space = hf_prune.MediumSpace(model)
    hf_prune.shrink(model, space.mask(space.middle))
    batch = tiny_batch(name)
    small = hf_prune.SmallSpace(model)
    dense = logits(model, batch)
    hf_prune.apply_mask(model, small.mask(small.largest))
    assert_close(logits(model, batch), dense, atol=0, rtol=0)
