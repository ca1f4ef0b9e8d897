"""SparseGPT: formulas against an eager reference, and the oracles of the paper."""

import pytest
import torch
from tiny import tiny_batch, tiny_model

import hf_prune
from hf_prune import CalibrationError, ConfigError, SparseGPTConfig
from hf_prune.methods.sparsegpt import gram, inverse_factor, sparsegpt


def eager(weight, hessian, target, block_size=128, damping=0.01, extra=1):
    """Optimal brain surgery column by column, every update at once."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead], weight[:, dead] = 1, 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    scale = factor.diagonal()
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if isinstance(target, tuple):
            kept, size = target
            if j % size == 0:
                group = slice(j, j + size)
                order = (weight[:, group] / scale[group]).square().argsort(1)
                pruned[:, group] = order.argsort(1) < size - kept
        elif j % block_size == 0:
            block = slice(j, min(j + block_size, weight.shape[1]))
            saliency = (weight[:, block] / scale[block]).square()
            count = int(saliency.numel() * target) + extra
            if count:
                pruned[:, block] = saliency <= saliency.flatten().sort().values[count - 1]
        error = weight[:, j] * pruned[:, j] / scale[j]
        weight[:, j:] -= error.outer(factor[j, j:])
    weight[pruned] = 0
    return ~pruned, weight


@pytest.fixture
def layer():
    inputs = torch.randn(256, 24) @ torch.randn(24, 24)
    return torch.randn(10, 24), inputs.T @ inputs


def test_one_of_two_weights():
    hessian, weight = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 3.0]])
    keep, new = sparsegpt(weight, hessian, 0.0, damping=0.0, threshold="paper")
    assert keep.tolist() == [[False, True]] and torch.allclose(new, torch.tensor([[0.0, 3.5]]))
    keep, new = sparsegpt(weight, hessian, 0.0, damping=0.0)
    assert keep.all() and torch.equal(new, weight)


def test_without_correlation_it_is_magnitude():
    weight = torch.randn(5, 12)
    keep, new = sparsegpt(weight, torch.eye(12), 0.5)
    assert torch.equal(new, weight * keep)
    assert weight[keep].abs().min() > weight[~keep].abs().max()


@pytest.mark.parametrize("target", [0.3, 0.5, (2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("block_size", [8, 16, 128])
@pytest.mark.parametrize("threshold", ["exact", "paper"])
def test_lazy_updates_are_eager_updates(layer, target, block_size, threshold):
    weight, hessian = layer
    hessian[3], hessian[:, 3] = 0, 0  # a dead input
    keep, new = sparsegpt(weight, hessian, target, block_size=block_size, threshold=threshold)
    theirs, reference = eager(weight, hessian, target, block_size, extra=int(threshold == "paper"))
    if threshold == "exact" and not isinstance(target, tuple):
        for start in range(0, 24, block_size):
            block = keep[:, start : start + block_size]
            assert (~block).sum() == int(block.numel() * target)
    assert torch.equal(keep, theirs)
    assert torch.allclose(new.double(), reference, atol=1e-3) and not new[~keep].any()


def test_the_error_lies_between_zeroing_and_the_exact_solution(layer):
    weight, hessian = layer
    keep, new = sparsegpt(weight, hessian, 0.5, block_size=8)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    exact = torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        exact[row, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight[row])

    def error(other):
        return float((((other - weight) @ damped) * (other - weight)).sum())

    assert error(weight * keep) > 1.5 * error(new) and error(new) > 1.05 * error(exact)


def test_more_damping_where_the_hessian_is_not_positive_definite():
    inputs = torch.randn(3, 24)
    factor = inverse_factor(gram(inputs), damping=1e-9)
    assert factor.isfinite().all() and torch.equal(factor, factor.triu())
    hessian = gram(torch.randn(100, 24))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    factor = inverse_factor(hessian)
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(damped), atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 0}, "block_size must be a whole number"),
        ({"damping": -1}, "damping must be a positive number"),
        ({"threshold": "row"}, "threshold must be one of 'exact', 'paper'"),
        ({"sparsity": None, "pattern": "2:4", "block_size": 6}, "block_size 6 is no multiple of the M"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        SparseGPTConfig(**{"sparsity": 0.5, **options})


def test_too_few_tokens():
    model = tiny_model("llama")
    with pytest.raises(CalibrationError, match=r"mlp.down_proj has 64 inputs, and 18 tokens of the calibration data"):
        hf_prune.prune(model, SparseGPTConfig(sparsity=0.5), [tiny_batch("llama", size=2)])
    ids = torch.randint(3, 90, (4, 20))
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}  # 80 tokens for the encoder, 12 for the decoder
    with pytest.raises(CalibrationError, match=r"decoder.* inputs, and 12 tokens"):
        hf_prune.prune(tiny_model("t5"), SparseGPTConfig(sparsity=0.5), [batch])


def test_inputs_that_are_always_zero_weigh_as_in_the_paper():
    """H is 2/n·XᵀX with ones on the diagonal of dead inputs, which count for the damping."""
    model, batch = tiny_model("llama"), tiny_batch("llama", size=16)
    projection = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:40] = 0
    dense, inputs = projection.weight.detach().clone(), []
    handle = projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    exclude = ("layers.[!0].*", "layers.0.self_attn.*", "*.gate_proj", "*.up_proj")
    hf_prune.prune(model, SparseGPTConfig(sparsity=0.5, threshold="paper", exclude=exclude), [batch])
    handle.remove()
    x = inputs[0][batch["attention_mask"].bool()]
    keep, new = eager(dense, 2 / 16 * x.T @ x, 0.5)
    assert torch.equal(projection.weight != 0, keep & (new != 0))
    assert torch.allclose(projection.weight.double(), new, atol=1e-5)
