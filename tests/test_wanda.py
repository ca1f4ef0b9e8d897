"""Wanda, RIA, magnitude and OWL: formulas, and what their configs refuse."""

import pytest
import torch
from tiny import tiny_batch, tiny_model

import hf_prune
from hf_prune import ConfigError, RIAConfig, SparseGPTConfig, WandaConfig, WeightMagnitudeConfig
from hf_prune.methods.owl import layer_sparsities, outlier_share
from hf_prune.methods.ria import ria_score
from hf_prune.methods.weights import keep_highest, pruned_count, square_sum, wanda_score


def plain_keep_highest(score, target):
    """The authors' way: a stable sort of each row; for patterns, of each group."""
    if isinstance(target, tuple):
        kept, size = target
        groups = score.reshape(len(score), -1, size)
        lowest = groups.sort(dim=-1, stable=True).indices[..., : size - kept]
        return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, lowest, False).reshape(score.shape)
    lowest = score.sort(dim=1, stable=True).indices[:, : int(score.shape[1] * target)]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, lowest, False)


def test_the_worked_example():
    weight, squares = torch.tensor([[4.0, -1.0, 0.6, 0.5]]), torch.tensor([5.0, 4.0, 9.0, 80.0], dtype=torch.float64)
    score = wanda_score(weight, squares)
    assert torch.allclose(score, torch.tensor([[8.944, 2.0, 1.8, 4.472]]), atol=1e-3)
    assert keep_highest(score, 0.5).tolist() == [[True, False, False, True]]
    assert keep_highest(weight.abs(), 0.5).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.99, (2, 4), (4, 8), (1, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_lowest_of_each_row_go(target, ties):
    score = torch.rand(24, 64)
    if ties:
        score = (score * 4).floor()
        score[3] = 0
    keep = keep_highest(score, target)
    assert torch.equal(keep, plain_keep_highest(score, target))
    if isinstance(target, tuple):
        assert keep.reshape(24, -1, target[1]).sum(-1).eq(target[0]).all()
    else:
        assert (~keep).sum(1).eq(int(64 * target)).all()


def test_invariances():
    weight, squares = torch.randn(24, 64), torch.rand(64)
    keep = keep_highest(wanda_score(weight, squares), 0.5)
    assert torch.equal(keep, keep_highest(wanda_score(weight * (0.5 + torch.rand(24, 1)), squares), 0.5))
    assert torch.equal(keep, keep_highest(wanda_score(weight, squares * 7), 0.5))
    order = torch.randperm(64)
    assert torch.equal(keep[:, order], keep_highest(wanda_score(weight[:, order], squares[order]), 0.5))
    assert torch.equal(keep_highest(wanda_score(weight, torch.ones(64)), 0.5), keep_highest(weight.abs(), 0.5))
    squares[5] = 0  # a feature that is always 0 goes first
    assert not keep_highest(wanda_score(weight, squares), 1 / 64)[:, 5].any()


def test_the_count_is_rounded_down_where_it_is_not_whole():
    assert [pruned_count(100, s) for s in (0.29, 0.57, 0.999, 0.0)] == [29, 57, 99, 0]  # 100 * 0.29 is 28.999...
    assert pruned_count(7, 0.5) == 3


def test_squares_add_up_in_parts():
    inputs = torch.randn(300, 8192).to(torch.bfloat16)  # more than one part
    assert torch.allclose(square_sum(inputs), inputs.double().square().sum(0), rtol=1e-6)
    assert torch.equal(square_sum(inputs[:0]), torch.zeros(8192, dtype=torch.float64))


def test_ria_is_the_released_formula():
    weight, squares = torch.randn(6, 8), torch.rand(8)
    size = weight.abs()
    released = (size / size.sum(0) + size / size.sum(1).reshape(-1, 1)) * squares.sqrt().reshape(1, -1) ** 0.5
    assert torch.allclose(ria_score(weight, squares), released, rtol=1e-5)
    weight[:, 2], weight[4] = 0, 0
    assert ria_score(weight, squares).isfinite().all()


def test_ria_compares_over_the_matrix_or_within_each_output():
    """The authors' `thresh = sort(metric.flatten())[k]`, with exactly k pruned."""
    model, batch = tiny_model("llama"), tiny_batch("llama", size=8)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight, seen = model.get_parameter(name).detach().clone(), []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    score = ria_score(weight, seen[0].flatten(0, 1).double().square().sum(0))
    mask = hf_prune.prune(model, RIAConfig(sparsity=0.6), [batch]).mask
    pruned = int(0.6 * weight.numel())
    assert torch.equal(mask[name], score > score.flatten().sort().values[pruned - 1])
    assert (~mask[name]).sum(1).unique().numel() > 1  # rows differ

    with torch.no_grad():
        model.get_parameter(name).copy_(weight)
    mask = hf_prune.prune(model, RIAConfig(sparsity=0.6, per_output=True), [batch]).mask
    least = score.sort(1).values[:, int(0.6 * weight.shape[1]) - 1, None]
    assert torch.equal(mask[name], score > least)


class TestOWL:
    def test_the_published_numbers(self):
        found = layer_sparsities([0.02, 0.05, 0.11], 0.7)
        assert found == pytest.approx([0.7711, 0.7178, 0.6111], abs=1e-4)
        assert sum(found) / 3 == pytest.approx(0.7)

    def test_equal_shares(self):
        assert layer_sparsities([0.1, 0.1], 0.6) == pytest.approx([0.6, 0.6])

    def test_the_whole_has_the_sparsity_where_blocks_differ_in_size(self):
        found = layer_sparsities([0.02, 0.05, 0.11], 0.7, weights=[1, 2, 5])
        assert (found[0] + 2 * found[1] + 5 * found[2]) / 8 == pytest.approx(0.7)

    @pytest.mark.parametrize("sparsity", [0.02, 0.98])
    def test_sparsities_out_of_range(self, sparsity):
        with pytest.raises(ConfigError, match="lower owl_lambda"):
            layer_sparsities([0.02, 0.05, 0.11], sparsity)

    def test_outliers(self):
        scores = torch.tensor([1.0] * 18 + [30.0, 60.0])
        assert outlier_share(scores) == pytest.approx(0.1)  # the mean is 5.4: both exceed 27
        assert outlier_share(scores, m=10) == pytest.approx(0.05)

    @pytest.mark.parametrize("config", [WandaConfig, WeightMagnitudeConfig, SparseGPTConfig, RIAConfig])
    def test_every_score_takes_its_ratios(self, config):
        data = [tiny_batch("llama", size=16, padded=True)]
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, :8] *= 30
        result = hf_prune.prune(model, config(sparsity=0.5, ratios="owl", owl_lambda=0.1), data)
        ratios = result.report.facts["owl_sparsities"]
        assert min(ratios, key=ratios.get) == "layers.1" and max(ratios.values()) - min(ratios.values()) == (
            pytest.approx(0.2, abs=1e-3)
        )
        for name in result.mask:
            layer = ".".join(name.split(".")[1:3])
            assert result.mask.sparsity(name) == pytest.approx(ratios[layer], abs=0.04)
        assert result.report.sparsity() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "Give either sparsity"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "Give either sparsity"),
        ({"sparsity": 1}, r"in \[0, 1\), the share to zero, got 1"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"sparsity": float("nan")}, "got nan"),
        ({"sparsity": True}, "got True"),
        ({"sparsity": "half"}, "got 'half'"),
        ({"pattern": "5:4"}, "0 < N < M, got '5:4'"),
        ({"pattern": "4:4"}, "0 < N < M"),
        ({"pattern": "0:4"}, "0 < N < M"),
        ({"pattern": "2-4"}, "must be 'N:M'"),
        ({"pattern": 24}, "must be 'N:M'"),
        ({"sparsity": 0.5, "ratios": "OWL"}, "ratios must be one of 'uniform', 'owl'"),
        ({"pattern": "2:4", "ratios": "owl"}, "give sparsity="),
        ({"sparsity": 0.5, "owl_m": 0}, "owl_m must be a positive number"),
        ({"sparsity": 0.5, "owl_lambda": -1}, "owl_lambda must be a positive number"),
        ({"sparsity": 0.5, "exclude": "layers.0.*"}, "exclude must be a tuple"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        WandaConfig(**options)


def test_configs_survive_json():
    config = WandaConfig(sparsity=0.5, ratios="owl", exclude=("layers.0.*",), checkpoint_dir="/tmp/here")
    data = config.to_dict()
    assert data["method"] == "wanda" and "here" not in str(data)  # folders of a machine are nobody's business
    assert hf_prune.MethodConfig.from_dict(data) == WandaConfig(sparsity=0.5, ratios="owl", exclude=("layers.0.*",))
    with pytest.raises(ConfigError, match="Unknown option of WandaConfig 'budget'"):
        hf_prune.MethodConfig.from_dict({"method": "wanda", "budget": {"macs": 0.5}})
