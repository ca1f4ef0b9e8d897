"""The mathematics of PASS, without a model."""

import math

import pytest
import torch
from torch.testing import assert_close

from hf_prune.trainers.head_gates import (
    HeadGate,
    almost_sure_penalty,
    closed_probability,
    concentration_penalty,
    concentration_weight,
    gate_noise,
    open_probability,
    penalty_weight,
    sample_gates,
    soft_gates,
    top_heads,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def modules(layers, heads):
    return torch.arange(layers).repeat_interleave(heads)


@pytest.mark.parametrize(
    "phi, closed, opened, between, soft",
    [
        (0.0, 0.31188843, 0.31188843, 0.37622313, 0.5),
        (1.0, 0.14291275, 0.55198510, 0.30510215, 0.777270),
        (5.0, 0.00304469, 0.98535199, 0.01160331, 1.0),
        (math.log(11), 0.03957415, 0.83293739, 0.12748846, 1.0),
    ],
)
def test_masses(phi, closed, opened, between, soft):
    q0, q1 = closed_probability(f64(phi)), open_probability(f64(phi))
    assert q0.item() == pytest.approx(closed, abs=5e-9) and q1.item() == pytest.approx(opened, abs=5e-9)
    assert (1 - q0 - q1).item() == pytest.approx(between, abs=1e-8)
    assert soft_gates(f64(phi)).item() == pytest.approx(soft, abs=5e-7)
    assert_close(closed_probability(f64(-phi)), q1)


def test_masses_are_monotone_and_those_of_the_samples():
    phi = torch.linspace(-10, 10, 401, dtype=torch.float64)
    assert (closed_probability(phi).diff() < 0).all() and (open_probability(phi).diff() > 0).all()
    noise = gate_noise(1_000_000, 0)
    for value in (0.0, 1.0, -2.0):
        z = sample_gates(f64(value), noise)
        assert (z == 0).double().mean().item() == pytest.approx(closed_probability(f64(value)).item(), abs=2e-3)
        assert (z == 1).double().mean().item() == pytest.approx(open_probability(f64(value)).item(), abs=2e-3)
    assert sample_gates(f64(0.0), noise).mean().item() == pytest.approx(0.5, abs=2e-3)


def test_noise_depends_on_all_of_its_seed():
    assert_close(gate_noise(8, 1, 2, 3), gate_noise(8, 1, 2, 3))
    draws = {
        tuple(gate_noise(8, *seed).tolist())
        for seed in [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2 + 2**32, 3)]
    }
    assert len(draws) == 5
    assert gate_noise(100_000, 0).abs().max() <= math.log(1e6)


@pytest.mark.parametrize(
    "phi, penalty",
    [
        ((0, 0, 0, 0), 3.00978504),
        ((5, 5, -5, -5), 0.09282651),
        ((5, 5, 5, -5), 2.01102785),
        ((5, -5, -5, -5), 2.01102785),
        ((1, 1, -1, -1), 2.44081723),
        ((2, 1, 0, -3), 1.86073174),
    ],
)
def test_penalty(phi, penalty):
    assert almost_sure_penalty(f64(*phi), 2).item() == pytest.approx(penalty, abs=5e-9)


def test_penalty_of_a_whole_bert():
    assert almost_sure_penalty(torch.zeros(144).double(), 16).item() == pytest.approx(166.17613, abs=5e-6)
    assert almost_sure_penalty(torch.zeros(144).double(), 72).item() == pytest.approx(108.35226, abs=5e-6)


@pytest.mark.parametrize(
    "phi, gradient",
    [
        ((1, 1, -1, -1), (-0.249618, -0.249618, 0.249618, 0.249618)),
        ((5, 5, 5, -5), (0.006071, 0.006071, 0.006071, 0.028867)),
    ],
)
def test_gradient_of_the_penalty(phi, gradient):
    leaf = f64(*phi).requires_grad_()
    (found,) = torch.autograd.grad(almost_sure_penalty(leaf, 2), leaf)
    assert_close(found, f64(*gradient), atol=1e-6, rtol=0)


def test_penalty_is_twice_its_largest_part_and_knows_no_order():
    generator = torch.Generator().manual_seed(0)
    for size in range(1, 40):
        heads = int(torch.randint(0, size + 1, (1,), generator=generator))
        phi = torch.randn(size, generator=generator, dtype=torch.float64) * 6
        closed, opened = closed_probability(phi).sum(), open_probability(phi).sum()
        largest = torch.stack([size - closed - opened, heads - opened, size - heads - closed]).max()
        penalty = almost_sure_penalty(phi, heads)
        assert_close(penalty, 2 * largest)
        assert_close(penalty, almost_sure_penalty(-phi, size - heads))
        assert_close(penalty, almost_sure_penalty(phi[torch.randperm(size, generator=generator)], heads))
    for opened in range(5):
        phi = torch.where(torch.arange(4) < opened, 60.0, -60.0).double()
        assert almost_sure_penalty(phi, 2).item() == pytest.approx(2 * abs(opened - 2), abs=1e-12)


@pytest.mark.parametrize(
    "phi, expected",
    [
        ((0,) * 12, 0.99999915),
        ((-5,) * 12, 0.16228405),
        ((5, *(-5,) * 11), 0.99741149),
        ((5,) * 12, 1.0),
        ((0, 0), 0.90272560),
    ],
)
def test_concentration(phi, expected):
    module = modules(1, len(phi))
    assert concentration_penalty(f64(*phi), module).item() == pytest.approx(expected, abs=5e-9)
    both = torch.cat([f64(*phi), f64(*phi).flip(0)])
    assert concentration_penalty(both, modules(2, len(phi))).item() == pytest.approx(2 * expected, abs=2e-8)


@pytest.mark.parametrize(
    "phi, expected",
    [
        ((0, 0), 6.41255),
        ((5, *(-5,) * 11), 11.18601),
        ((0, *(-5,) * 11), 2.35247),
        ((1, *(-5,) * 11), 4.74951),
        ((-5, -5), 3000.0),
        ((5,) * 12, 3000.0),
    ],
)
def test_concentration_weight(phi, expected):
    assert concentration_weight(f64(*phi), modules(1, len(phi))) == pytest.approx(expected, rel=2e-6)


def test_concentration_weight_is_where_the_concentrator_wins():
    phi, module = f64(1, -5, -5, 5, 5, 5), modules(2, 3)
    weight = concentration_weight(phi, module)
    for factor, wins in ((0.99, False), (1.01, True)):
        leaf = phi.clone().requires_grad_()
        pressure = -2 * open_probability(leaf).sum() + factor * weight * concentration_penalty(leaf, module)
        (gradient,) = torch.autograd.grad(pressure, leaf)
        assert (gradient[0] > 0).item() is wins  # downhill closes the head


def test_penalty_weight():
    for count, value in enumerate((1e-5, 1e-2, 10, 1e4)):
        assert penalty_weight(1000 * count, 1e-5, 1000.0, 1000) == pytest.approx(value)
    assert penalty_weight(4000, 1e-5, 1000.0, 1000) == 1e6
    assert penalty_weight(10**9, 1e-5, 1000.0, 1) == 1e6
    ramp = [penalty_weight(count, 1e-5, 1000.0, 60) for count in range(300)]
    assert ramp == sorted(ramp)


@pytest.mark.parametrize("kept", range(13))
def test_exactly_so_many_heads_are_kept(kept):
    phi = torch.randn(12, generator=torch.Generator().manual_seed(kept)).double()
    keep = top_heads(phi, kept)
    assert keep.sum() == kept and (kept in (0, 12) or phi[keep].min() > phi[~keep].max())
    assert torch.equal(top_heads(torch.full((12,), 9.0), kept), torch.arange(12) < kept)


def test_a_gate_is_random_in_training_and_a_mask_in_evaluation():
    gate = HeadGate(torch.tensor([0.3, -0.2, 40.0]), 2)
    x = torch.randn(4, 5, 6, requires_grad=True)
    gate.noise.copy_(gate_noise(3, 0))
    z = sample_gates(gate.log_alpha, gate.noise)
    out = gate(x)
    assert_close(out, x * z.repeat_interleave(2))  # one gate a head, for all examples and tokens
    out.square().sum().backward()
    assert gate.log_alpha.grad is not None and x.grad is not None
    gate.noise.copy_(gate_noise(3, 1))
    assert not torch.allclose(gate(x), out)
    assert gate(x.bfloat16()).dtype == torch.bfloat16
    gate.eval()
    assert_close(gate(x), x)
    gate.set_mask(torch.tensor([True, False, True]))
    assert_close(gate(x), x * torch.tensor([1.0, 1, 0, 0, 1, 1]))
