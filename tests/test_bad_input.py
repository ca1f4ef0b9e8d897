"""What structured methods do with broken, dead and degenerate models: a clear error that names the layer and changes
nothing, or a finite result."""

import copy

import pytest
import torch
from tiny import tiny_batch, tiny_model

import hf_prune
from hf_prune import CalibrationError, InfeasibleBudgetError, MaskError
from hf_prune.selection import Selector

BUDGET = {"macs": 0.8}
METHODS = {
    "kprune": hf_prune.KPruneConfig(budget=BUDGET),
    "kprune-paper": hf_prune.KPruneConfig(budget=BUDGET, kpred="paper", recover="scale"),
    "fisher": hf_prune.FisherConfig(budget=BUDGET),
    "kcm": hf_prune.KCMConfig(budget=BUDGET),
    "flap": hf_prune.FLAPConfig(budget=BUDGET),
    "magnitude": hf_prune.MagnitudeConfig(budget=BUDGET, recover="lstsq"),
    "random": hf_prune.RandomConfig(budget=BUDGET),
    "layer_drop": hf_prune.LayerDropConfig(budget=BUDGET),
    "auto": hf_prune.AutoPruningConfig(budget=BUDGET, candidates=("kprune", "magnitude"), held_out=4),
}
LAYER = "encoder.layer.1"
OVERFLOW = r"inputs of encoder\.layer\.(1\.output\.dense|1|2\S*) are NaN"


def data():
    return [tiny_batch("bert", size=24, padded=True, seed=seed, labels=True) for seed in range(2)]


def unchanged(model, state):
    return hf_prune.current_mask(model) is None and all(
        torch.equal(value, state[key]) for key, value in model.state_dict().items()
    )


def zero(dense):
    dense.weight.zero_()
    dense.bias.fill_(-1e4)


def constant(dense):
    dense.weight.zero_()


def alike(dense):
    dense.weight.copy_(dense.weight[:1].expand_as(dense.weight))
    dense.bias.fill_(0.1)


def of_low_rank(dense):
    dense.weight[2:] = 0
    dense.bias.zero_()


@pytest.mark.parametrize("spoil", [zero, constant, alike, of_low_rank])
@pytest.mark.parametrize("method", METHODS)
def test_degenerate_neurons_are_an_error_or_solved(method, spoil):
    model = tiny_model("bert")
    with torch.no_grad():
        spoil(model.get_submodule(f"bert.{LAYER}.intermediate.dense"))
    state = copy.deepcopy(model.state_dict())
    try:
        hf_prune.prune(model, METHODS[method], data())
    except CalibrationError as error:
        assert LAYER in str(error) and method in ("kcm", "flap") and spoil in (zero, constant, of_low_rank)
        assert unchanged(model, state)
    else:
        assert all(p.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            assert hf_prune.shrink(model)(**data()[0]).logits.isfinite().all()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_activations_that_overflow_name_the_layer(method):
    model = tiny_model("bert")
    with torch.no_grad():  # finite, but their products are not
        model.get_submodule(f"bert.{LAYER}.intermediate.dense").weight.mul_(1e38)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=OVERFLOW):
        hf_prune.prune(model, METHODS[method], data())
    assert unchanged(model, state)


@pytest.mark.parametrize("method", METHODS)
def test_less_than_one_head_and_one_neuron_a_layer_is_refused(method):
    model = tiny_model("bert")
    state = copy.deepcopy(model.state_dict())
    config = copy.deepcopy(METHODS[method])
    config.budget = {"macs": 0.01}
    with pytest.raises(InfeasibleBudgetError, match=r"nearest feasible budget \{'macs'"):
        hf_prune.prune(model, config, data())
    assert unchanged(model, state)


@pytest.mark.parametrize("method", ["flap", "magnitude"])
def test_a_mask_that_can_not_be_cut_is_refused_before_weights_change(method, monkeypatch):
    def no_layers(self, values, counts):
        return hf_prune.PruningMask({"h": torch.zeros(3, dtype=torch.bool)}, self.units)

    monkeypatch.setattr(Selector, "_mask", no_layers)
    model, batches = tiny_model("gpt2"), [tiny_batch("gpt2", size=24, labels=True)]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(MaskError, match="keep at least one"):
        hf_prune.prune(model, METHODS[method], batches)
    assert unchanged(model, state)
