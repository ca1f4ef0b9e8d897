"""Units in the order of their importance: the same function, and the best units are the first."""

import copy

import pytest
import torch
from pruned import logits
from tiny import FAMILIES, tiny_batch, tiny_model
from torch.testing import assert_close

import hf_prune
from hf_prune import CalibrationError, ConfigError
from hf_prune.methods.magnitude import output_energy
from hf_prune.units import output_matrix, site


@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_stays_and_magnitudes_descend(name):
    model, batch = tiny_model(name), tiny_batch(name, padded=True)
    dense, before = logits(model, batch), {key: id(p) for key, p in model.named_parameters()}
    orders = hf_prune.order_units(model)
    assert_close(logits(model, batch), dense, atol=2e-5, rtol=1e-4)
    assert before == {key: id(p) for key, p in model.named_parameters()}
    units = hf_prune.prunable_units(model)
    for group in units.of_kind("heads", "neurons"):
        if group.prunable:
            energy = output_energy(output_matrix(site(model, group)), group.size)
            assert (energy[:-1] >= energy[1:] - 1e-6).all()
            assert orders[group.name].sort().values.tolist() == list(range(group.size))
    assert len(orders) == sum(group.prunable for group in units.of_kind("heads", "neurons"))


BUDGET = {"budget": {"macs": 0.7}}
METHODS = {
    "fisher": (hf_prune.FisherConfig(**BUDGET), {"heads", "neurons"}),
    "flap": (hf_prune.FLAPConfig(**BUDGET), {"heads", "neurons"}),
    "kcm": (hf_prune.KCMConfig(**BUDGET), {"neurons"}),
    "kprune": (hf_prune.KPruneConfig(**BUDGET), {"heads", "neurons"}),
    "random": (hf_prune.RandomConfig(**BUDGET), {"heads", "neurons"}),
}


@pytest.mark.parametrize("method", METHODS)
def test_any_score_orders(method):
    config, kinds = METHODS[method]
    model, batch = tiny_model("bert"), tiny_batch("bert", size=8, labels=True)
    dense = logits(model, batch)
    orders = hf_prune.order_units(model, config, [batch])
    units = hf_prune.prunable_units(model)
    assert {units[name].kind for name in orders} == kinds
    assert any(order.tolist() != sorted(order.tolist()) for order in orders.values())
    assert_close(logits(model, batch), dense, atol=2e-5, rtol=1e-4)
    again = hf_prune.order_units(model, config, [batch])
    if method != "random":  # they are in order now
        assert all(order.tolist() == sorted(order.tolist()) for order in again.values())


def test_bad_input_changes_nothing():
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="wanda scores no heads or neurons"):
        hf_prune.order_units(model, hf_prune.WandaConfig(sparsity=0.5), [tiny_batch("bert")])
    with pytest.raises(CalibrationError, match="needs calibration data"):
        hf_prune.order_units(model, hf_prune.FisherConfig(**BUDGET))
    with pytest.raises(ConfigError, match="layer_drop scores no heads or neurons"):
        hf_prune.order_units(model, hf_prune.LayerDropConfig(**BUDGET), [tiny_batch("bert")])
    space = hf_prune.SmallSpace(model)
    hf_prune.apply_mask(model, space.mask(space.middle))
    with pytest.raises(ConfigError, match="carries a mask"):
        hf_prune.order_units(model)
    hf_prune.remove_mask(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
