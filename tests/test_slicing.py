"""Sub-networks on slices of the weights: loss and gradients of the masked model, whatever the family."""

import copy

import pytest
import torch
from tiny import FAMILIES, tiny_batch, tiny_model
from torch.testing import assert_close

import hf_prune
from hf_prune import MaskError, PruningMask
from hf_prune.search.spaces import known_spaces, search_space


def no_dropout(model):
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def loss_and_gradients(model, network, batch):
    model.zero_grad()
    loss = network(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def masked(model, mask, batch):
    hf_prune.apply_mask(model, mask)
    try:
        return loss_and_gradients(model, model, batch)
    finally:
        hf_prune.remove_mask(model)


def assert_equal_gradients(expected, found, atol=1e-5):
    scale = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        mine = found[name]
        if gradient is None or mine is None:  # nothing reaches it, or only zeros
            assert gradient is None or not gradient.any(), name
            assert mine is None or not mine.any(), name
        else:
            assert_close(mine, gradient, atol=atol * scale, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
            assert not mine[gradient == 0].abs().gt(1e-6 * scale).any(), name


@pytest.mark.parametrize("name", FAMILIES)
def test_sliced_is_masked(name, random_mask):
    model = no_dropout(tiny_model(name))
    batch = tiny_batch(name, padded=True, labels=True)
    units = hf_prune.prunable_units(model)
    generator = torch.Generator().manual_seed(1)
    masks = [random_mask(units, seed=3, drop=True)]
    for kind in known_spaces():
        space = search_space(kind, model)
        masks.append(space.mask(space.smallest if kind == "small" else space.sample(generator)))
    model(**batch)  # notes the kind of task in the config
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    for mask in masks:
        expected, gradients = masked(model, mask, batch)
        part = hf_prune.subnetwork(model, mask, units)
        loss, mine = loss_and_gradients(model, part, batch)
        assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        assert_equal_gradients(gradients, mine)
        assert sum(p.numel() for p in set(part.parameters())) == hf_prune.model_costs(model, mask).params
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert hf_prune.current_mask(model) is None and model.config.to_dict() == config


def test_gradients_in_prefixes_are_exact_and_zero_outside():
    model = no_dropout(tiny_model("bert"))
    space = hf_prune.SmallSpace(model)
    part = hf_prune.subnetwork(model, space.mask(space.smallest))
    _, gradients = loss_and_gradients(model, part, tiny_batch("bert", labels=True))
    layer = "bert.encoder.layer.0."
    for name, dim, kept in (
        ("attention.self.query.weight", 0, 8),
        ("attention.output.dense.weight", 1, 8),
        ("intermediate.dense.weight", 0, 1),
        ("intermediate.dense.bias", 0, 1),
        ("output.dense.weight", 1, 1),
    ):
        gradient = gradients[layer + name]
        inside, outside = gradient.split([kept, gradient.shape[dim] - kept], dim)
        assert inside.any() and not outside.any(), name
    assert all(g is None for name, g in gradients.items() if "layer.1" in name or "layer.2" in name)


def test_gradients_of_several_passes_add_up():
    model, batch = no_dropout(tiny_model("llama")), tiny_batch("llama", labels=True)
    space = hf_prune.SmallSpace(model)
    masks = [space.mask(member) for member in (space.smallest, space.middle)]
    sums = [loss_and_gradients(model, hf_prune.subnetwork(model, mask), batch)[1] for mask in masks]
    model.zero_grad()
    for mask in masks:
        hf_prune.subnetwork(model, mask)(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        parts = [gradients[name] for gradients in sums if gradients[name] is not None]
        if parts:
            assert_close(parameter.grad, sum(parts), atol=1e-6, rtol=1e-5)


def test_gradients_of_parts_are_as_small_as_the_parts():
    model, batch = no_dropout(tiny_model("bert")), tiny_batch("bert", labels=True)
    space = hf_prune.SmallSpace(model)
    table = model.get_input_embeddings()
    model.classifier.weight.requires_grad_(False)
    part = hf_prune.subnetwork(model, space.mask(space.smallest))
    made = {}  # seen before they are handed over to the model
    for name, parameter in part.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: made.update({name: gradient}))
    for _ in range(2):
        part(**batch).loss.backward()
    rows = made.pop("bert.embeddings.word_embeddings.weight")._values()
    assert len(rows) <= batch["input_ids"].numel()
    assert all(gradient.numel() == part.get_parameter(name).numel() for name, gradient in made.items())
    assert not table.sparse and not table.weight.grad.is_sparse and model.classifier.weight.grad is None
    twice = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    _, once = loss_and_gradients(model, part, batch)
    for name, gradient in twice.items():
        assert_close(gradient, 2 * once[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_gradient_checkpointing(name, reentrant):
    model, batch = no_dropout(tiny_model(name)), tiny_batch(name, labels=True)
    space = hf_prune.SmallSpace(model)
    for member in (space.smallest, space.middle):
        _, expected = masked(model, space.mask(member), batch)
        expected = {key: g if g is None else g.clone() for key, g in expected.items()}
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        part = hf_prune.subnetwork(model, space.mask(member))
        assert any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
        _, found = loss_and_gradients(model, part, batch)
        model.activation_checkpointing_disable()
        assert_equal_gradients(expected, found)


def test_slices_see_the_weights_as_they_become():
    model, batch = tiny_model("bert"), tiny_batch("bert")
    space = hf_prune.SmallSpace(model)
    mask = space.mask(space.middle)
    part = hf_prune.subnetwork(model, mask)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        first = part(**batch).logits
        hf_prune.shrink(model, mask)
        assert_close(first, model(**batch).logits, atol=1e-5, rtol=1e-5)
    assert not part.training


def test_a_part_is_of_its_own():
    model = tiny_model("phi3")
    space = hf_prune.SmallSpace(model)
    part = hf_prune.subnetwork(model, space.mask(space.smallest))
    assert type(part) is type(model) and part.config is not model.config
    assert (part.config.num_hidden_layers, model.config.num_hidden_layers) == (1, 3)
    assert part.lm_head.weight is model.lm_head.weight
    part.eval(), model.train()
    assert not part.training and not part.model.layers[0].training and model.model.layers[0].training
    part.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    model(**tiny_batch("phi3"))


def test_generation_with_a_cache():
    model, batch = tiny_model("llama"), tiny_batch("llama", size=2)
    space = hf_prune.SmallSpace(model)
    mask = space.mask(space.middle)
    part = hf_prune.subnetwork(model, mask)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    ours = part.generate(**batch, **options)
    assert torch.equal(ours, hf_prune.shrink(model, mask).generate(**batch, **options))


def test_bad_masks_are_refused():
    model = tiny_model("gpt2")
    units = hf_prune.prunable_units(model)
    with pytest.raises(MaskError, match="is for a bert model"):
        hf_prune.subnetwork(model, PruningMask({}, hf_prune.prunable_units(tiny_model("bert"))))
    with pytest.raises(MaskError, match="drops all layers"):
        hf_prune.subnetwork(model, PruningMask({"h": torch.zeros(3, dtype=torch.bool)}, units))
    hf_prune.apply_mask(model, PruningMask({"h.0.attn.c_proj": torch.arange(4) < 2}, units))
    with pytest.raises(MaskError, match="carries a mask"):
        hf_prune.subnetwork(model, PruningMask({}, units))
