"""SparseGPT: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023.

Goes through the inputs of a matrix from the first to the last. Each pruned weight is made up for by those of the same
output behind it, as the Hessian of the layer's squared error, H = XᵀX, says (optimal brain surgery).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from ..calibration import Calibrator
from ..errors import CalibrationError, ConfigError, check_whole
from ..matrices import Matrix
from ..units import PrunableUnits
from ..weight_masks import WeightMask
from .base import Paper, register_pruner
from .weights import Target, WeightPruner, WeightPruningConfig, keep_highest, kth_lowest, pruned_count


@dataclass(kw_only=True)
class SparseGPTConfig(WeightPruningConfig):
    """Options of SparseGPT. See [`WeightPruningConfig`] for the others.

    Args:
        block_size (`int`, *optional*, defaults to 128): Inputs among which weights are compared, and after which the
            rest of the matrix is updated.
        damping (`float`, *optional*, defaults to 0.01): Added to the diagonal of the Hessian, as a share of its mean;
            ten times as much where that is not positive definite.
        threshold (`"exact"` or `"paper"`, *optional*, defaults to `"exact"`): Prune exactly the share asked for of
            each `block_size` inputs, or, as the authors' code does, one weight more.

    Raises:
        ConfigError: An option is out of range, or the M of `pattern` does not divide `block_size`.
    """

    block_size: int = 128
    damping: float = 0.01
    threshold: Literal["exact", "paper"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, block_size=self.block_size)
        if isinstance(self.target, tuple) and self.block_size % self.target[1]:
            raise ConfigError(f"block_size {self.block_size} is no multiple of the M in pattern={self.pattern!r}.")
        self.check_positive("damping")
        self.check_choice("threshold", ("exact", "paper"))


def gram(inputs: torch.Tensor) -> torch.Tensor:
    """XᵀX in float32: (tokens, inputs) -> (inputs, inputs)."""
    x = inputs.float()
    return x.T @ x


def inverse_factor(hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """U, upper triangular, with UᵀU = (H + damping·mean(diag H)·I)⁻¹. Damping grows until that exists.

    Args:
        hessian (`torch.Tensor`): H, (inputs, inputs), with a diagonal above zero.
        damping (`float`, *optional*, defaults to 0.01): See above.

    Returns:
        `torch.Tensor`: U, of the shape and dtype of H.

    Raises:
        CalibrationError: It does not exist at any damping.
    """
    mean = hessian.diagonal().mean()
    while damping < 1e6:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor: torch.Tensor
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and factor.isfinite().all():
                return factor
        damping = damping * 10 if damping else 1e-4
    raise CalibrationError("SparseGPT's Hessian can't be inverted: check the calibration data for extreme values.")


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    target: Target,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    threshold: Literal["exact", "paper"] = "exact",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1: choose weights to prune, and update the others.

    Args:
        weight (`torch.Tensor`): W, (outputs, inputs).
        hessian (`torch.Tensor`): H = 2/n·XᵀX of n examples, (inputs, inputs). The factor matters only beside inputs
            that are always zero, whose diagonal becomes 1.
        target (`float` or `tuple[int, int]`): The share to prune of every `block_size` inputs over all outputs; or
            (N, M): N stay in every group of M inputs of an output.
        block_size, damping, threshold (*optional*): See [`SparseGPTConfig`].

    Returns:
        What stays, bool of the shape of W, and the new W in float32, with zeros.

    Raises:
        CalibrationError: H can't be inverted at any damping.
    """
    hessian, dead = hessian.clone(), hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    columns = weight.float().T.clone(memory_format=torch.contiguous_format)  # (inputs, outputs): a row at a time
    columns[dead] = 0  # inputs that are always zero
    factor = inverse_factor(hessian, damping)
    keep = torch.ones_like(columns, dtype=torch.bool)
    for start in range(0, len(columns), block_size):
        block = slice(start, min(start + block_size, len(columns)))
        rows, kept, inner = columns[block], keep[block], factor[block, block]
        scale = inner.diagonal()[:, None]
        if not isinstance(target, tuple):
            kept.copy_(_keep_in_block(rows.square() / scale.square(), target, threshold))
        errors = torch.zeros_like(rows)
        for j in range(len(rows)):
            if isinstance(target, tuple) and j % target[1] == 0:
                group = slice(j, j + target[1])
                kept[group] = keep_highest((rows[group].square() / scale[group].square()).T, target).T
            errors[j] = rows[j].masked_fill(kept[j], 0) / inner[j, j]
            rows[j:].addr_(inner[j, j:], errors[j], alpha=-1)
        columns[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    return keep.T, columns.masked_fill_(~keep, 0).T


def _keep_in_block(saliency: torch.Tensor, sparsity: float, threshold: str) -> torch.Tensor:
    flat = saliency.reshape(1, -1)
    if threshold == "exact":
        return keep_highest(flat, sparsity).reshape(saliency.shape)
    return saliency > kth_lowest(flat, pruned_count(flat.numel(), sparsity) + 1)


@register_pruner("sparsegpt", SparseGPTConfig)
class SparseGPTPruner(WeightPruner[SparseGPTConfig]):
    """Zeroes the weights that matter least to the output of their layer, and updates the others to make up for it."""

    observe = staticmethod(gram)
    paper = Paper(
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "ICML 2023",
        "2301.00774",
        "Elias Frantar and Dan Alistarh",
    )

    def check(self, matrices: list[Matrix], calibrator: Calibrator | None) -> None:
        super().check(matrices, calibrator)
        assert calibrator is not None
        encoder = next(iter(calibrator.tokens_of))
        for matrix in sorted(matrices, key=lambda matrix: -matrix.inputs):
            tokens = calibrator.tokens_of[encoder if matrix.reads_encoder else matrix.stack]
            if tokens < matrix.inputs:
                raise CalibrationError(
                    f"{matrix.module} has {matrix.inputs} inputs, and {tokens} tokens of the calibration data reach "
                    "it: SparseGPT needs at least as many. Give more data, or use WandaConfig."
                )

    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> WeightMask:
        assert calibrator is not None
        self._scale = 2 / calibrator.samples
        return super().prune(model, units, calibrator)

    def workspace(self, matrix: Matrix) -> int:
        return 4 * (5 * matrix.inputs**2 + 3 * matrix.inputs * matrix.outputs)  # Hessians and factors; rows, scores

    def solve(self, weight: torch.Tensor, observed: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        return sparsegpt(
            weight,
            observed * self._scale,
            target,
            block_size=config.block_size,
            damping=config.damping,
            threshold=config.threshold,
        )
