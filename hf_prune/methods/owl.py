"""OWL, outlier-weighed layer sparsity: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024.

Blocks whose Wanda scores have more outliers keep more of their weights. A ratio for each block, for any score.
"""

from collections.abc import Sequence

import torch

from ..errors import ConfigError


def outlier_share(scores: torch.Tensor, m: float = 5.0) -> float:
    """D of a block: the share of its Wanda scores that exceed M times their mean (section 3.2).

    Args:
        scores (`torch.Tensor`): The scores of all weights of the block, of any shape, none below zero.
        m (`float`, *optional*, defaults to 5.0): M.

    Returns:
        `float`: From 0 to 1.
    """
    return float((scores > m * scores.mean(dtype=torch.float64)).double().mean())


def layer_sparsities(
    shares: Sequence[float], sparsity: float, lambda_: float = 0.08, weights: Sequence[float] | None = None
) -> list[float]:
    """Sparsities of the blocks: 1 − S, S = 2λ(D − min D) / (max D − min D), shifted so that the mean is `sparsity`.

    Args:
        shares (sequence of `float`): D of each block.
        sparsity (`float`): What the whole shall have.
        lambda_ (`float`, *optional*, defaults to 0.08): λ.
        weights (sequence of `float`, *optional*): Sizes of the blocks, for the mean. Equal ones by default, as in the
            paper.

    Returns:
        `list[float]`: The share to zero of each block, in their order.

    Raises:
        ConfigError: A sparsity would fall out of [0, 1).
    """
    share = torch.tensor(shares, dtype=torch.float64)
    size = torch.ones_like(share) if weights is None else torch.tensor(weights, dtype=torch.float64)
    spread = share.max() - share.min()
    kept = 2 * lambda_ * (share - share.min()) / spread if spread > 0 else torch.zeros_like(share)
    found = sparsity - kept + (kept * size).sum() / size.sum()
    if found.min() < 0 or found.max() >= 1:
        raise ConfigError(
            f"OWL with λ = {lambda_} and sparsity {sparsity} asks blocks for sparsities from {float(found.min()):.3f} "
            f"to {float(found.max()):.3f}: lower owl_lambda."
        )
    return [float(value) for value in found]
