"""The mathematics of KCM against closed forms, and its options."""

import math

import pytest
import torch
from tiny import tiny_batch, tiny_model

import hf_prune
from hf_prune import KCMConfig
from hf_prune.methods.kcm import density_score, gaussian_kernel, merged_score, representative_score


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def one_update(vectors, sigma=1.0):
    return representative_score(gaussian_kernel(vectors, sigma), max_iterations=1)[0]


def test_identical_neurons_share_their_score():
    scores, iterations = representative_score(gaussian_kernel(torch.ones(5, 3)))
    assert torch.allclose(scores, torch.full((5,), 1 / 5)) and iterations == 1


def test_two_neurons_at_distance_one():
    kernel = gaussian_kernel(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert kernel[0, 1] == pytest.approx(math.exp(-1))
    assert representative_score(kernel, max_iterations=1)[0].tolist() == pytest.approx([0.6045901829] * 2, abs=1e-10)


def test_neurons_far_apart_approach_one_without_nan():
    kernel = gaussian_kernel(torch.eye(4) * 100)
    scores, iterations = representative_score(kernel, alpha=1e-300, max_iterations=6)
    assert iterations == 6
    assert scores.tolist() == pytest.approx([0.9785720621] * 4, abs=1e-10)


@pytest.mark.parametrize("score", [density_score, lambda kernel: representative_score(kernel)[0]])
def test_scores_follow_the_geometry_alone(score):
    vectors = torch.randn(60, 16) * 0.3
    expected = score(gaussian_kernel(vectors))
    order = torch.randperm(60)
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    assert torch.allclose(score(gaussian_kernel(vectors[order])), expected[order], atol=1e-14)
    assert torch.allclose(score(gaussian_kernel(vectors + 5)), expected, atol=1e-12)
    assert torch.allclose(score(gaussian_kernel(vectors @ rotation)), expected, atol=1e-12)
    assert torch.allclose(score(gaussian_kernel(vectors * 7, sigma=7.0)), expected, atol=1e-12)
    assert torch.allclose(
        score(gaussian_kernel(vectors * 7, "median")), score(gaussian_kernel(vectors, "median")), atol=1e-12
    )


def test_density_is_one_update():
    vectors = torch.randn(80, 12) * 0.3
    assert torch.allclose(density_score(gaussian_kernel(vectors)), one_update(vectors), atol=1e-14)


def test_the_objective_falls_with_every_update():
    kernel = gaussian_kernel(torch.randn(40, 8) * 0.3)
    mask = torch.full_like(kernel, 1 / 40)
    objective = []
    for _ in range(40):
        objective.append((kernel - 2 * kernel @ mask + mask.T @ kernel @ mask).trace().item())
        mask = mask * (kernel / (kernel @ mask)).sqrt()
    assert all(after <= before + 1e-12 for before, after in zip(objective, objective[1:], strict=False))
    assert torch.allclose(
        representative_score(kernel, alpha=1e-300, max_iterations=40)[0], mask.diagonal(), atol=1e-12
    )


def test_vertices_of_a_hull_score_best():
    vertices = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    inside = torch.distributions.Dirichlet(torch.full((3,), 3.0)).sample((27,)) @ vertices
    scores = one_update(torch.cat([vertices, inside]))  # the printed stopping rule stops here
    assert set(scores.topk(3).indices.tolist()) == {0, 1, 2}


def test_an_isolated_neuron_scores_best():
    vectors = torch.cat([torch.randn(20, 8) * 0.2, torch.full((1, 8), 10.0)])
    scores = density_score(gaussian_kernel(vectors))
    assert scores.argmax() == 20
    assert scores[20].item() == pytest.approx(0.2182178902, abs=1e-10)


def test_the_stopping_rule_is_a_relative_change():
    kernel = gaussian_kernel(torch.randn(50, 8) * 0.3)
    scores, iterations = representative_score(kernel, alpha=0.01, max_iterations=200)
    mask = torch.full_like(kernel, 1 / 50)
    for _ in range(iterations):
        previous, mask = mask, mask * (kernel / (kernel @ mask)).sqrt()
    assert (mask - previous).abs().sum() / previous.sum() <= 0.01
    assert 1 < iterations < 200 and torch.allclose(scores, mask.diagonal())


def test_the_activity_is_normalised_per_layer():
    r2, activity = torch.rand(9), torch.rand(9)
    assert torch.allclose(merged_score(r2, activity), r2 * activity / activity.norm())
    assert torch.allclose(merged_score(r2, activity * 1000), merged_score(r2, activity))


@pytest.fixture
def bert():
    torch.set_default_dtype(torch.float32)
    return tiny_model("bert"), [tiny_batch("bert", size=16, padded=True)]


def test_heads_stay_and_the_attention_share_is_the_floor(bert):
    model, data = bert
    with pytest.raises(hf_prune.InfeasibleBudgetError, match="nearest feasible budget") as error:
        hf_prune.prune(model, KCMConfig(budget={"macs": 0.3}), data)
    feasible = float(str(error.value).rpartition(": ")[2].strip("}."))
    mask = hf_prune.prune(model, KCMConfig(budget={"macs": feasible}), data).mask
    assert mask.density("heads") == 1.0
    assert {int(v.sum()) for name, v in mask.items() if name.endswith("output.dense") and "attention" not in name} <= {
        1,
        2,
    }


def test_the_mask_is_the_top_k_of_the_scores(bert):
    model, data = bert
    calibrator = hf_prune.Calibrator(model, data)
    groups = calibrator.units.of_kind("neurons")
    moments = {g.name: hf_prune.statistics.Moments(g.size, torch.device("cpu")) for g in groups}
    calibrator.collect(moments)
    scores = []
    for group in groups:
        weight = model.base_model.get_submodule(group.name).weight.detach().T
        scores.append(merged_score(density_score(gaussian_kernel(weight)), moments[group.name].rms))
    mask = hf_prune.prune(model, KCMConfig(budget={"macs": 0.7}, recover="none"), calibrator).mask
    kept = torch.cat([mask[group.name] for group in groups])
    assert torch.cat(scores)[kept].min() >= torch.cat(scores)[~kept].max()


@pytest.mark.parametrize(
    "options", [{"score": "r2"}, {"score": "d2"}, {"d2": "mean_abs"}, {"d2": "mean"}, {"sigma": "median"}]
)
def test_options_change_the_mask(bert, options):
    model, data = bert
    default = hf_prune.prune(model, KCMConfig(budget={"macs": 0.7}, recover="none"), data).mask
    hf_prune.remove_mask(model)
    assert hf_prune.prune(model, KCMConfig(budget={"macs": 0.7}, recover="none", **options), data).mask != default


def test_recovery_brings_the_outputs_closer(bert):
    model, data = bert
    with torch.no_grad():
        dense = model(**data[0]).logits
    error = {}
    for recover in ("none", "scale", "lstsq"):
        pruned = tiny_model("bert")
        hf_prune.prune(pruned, KCMConfig(budget={"macs": 0.7}, recover=recover), data)
        with torch.no_grad():
            error[recover] = (pruned(**data[0]).logits - dense).pow(2).mean().item()
    assert error["lstsq"] < error["scale"] and error["lstsq"] < 0.25 * error["none"]


def test_the_report_compares_with_the_plain_norm(bert):
    model, data = bert
    facts = hf_prune.prune(model, KCMConfig(budget={"macs": 0.7}, r2="iterated"), data).report.facts
    assert 0 <= facts["shared_with_norm_times_rms"] <= 1
    assert all(1 <= n <= 20 for n in facts["r2_iterations"].values()) and len(facts["r2_iterations"]) == 3
