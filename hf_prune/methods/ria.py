"""RIA, relative importance and activations: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method
for Large Language Models", ICLR 2024.

As Wanda, but a weight counts relative to those of the same input and of the same output, so that no whole channel is
pruned. A score that is relative to its row can be compared beyond it: as the authors' code does by default, over the
whole matrix.
"""

from dataclasses import dataclass

import torch

from .base import Paper, register_pruner
from .weights import Target, WeightPruner, WeightPruningConfig, keep_highest, square_sum


@dataclass(kw_only=True)
class RIAConfig(WeightPruningConfig):
    """Options of RIA. See [`WeightPruningConfig`] for the others.

    Args:
        alpha (`float`, *optional*, defaults to 0.5): Power of the norm of the inputs, the paper's a.
        per_output (`bool`, *optional*, defaults to `False`): Compare the weights of each output by themselves, as
            Wanda does, instead of all in a matrix. Under a pattern they always are.

    Raises:
        ConfigError: An option is out of range.
    """

    alpha: float = 0.5
    per_output: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("alpha")
        self.check_choice("per_output", (True, False))


def ria_score(weight: torch.Tensor, squares: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """|W_ij|·(1/Σ_i|W_ij| + 1/Σ_j|W_ij|)·‖X_j‖₂^a (Eq. 4).

    Args:
        weight (`torch.Tensor`): W, (outputs, inputs).
        squares (`torch.Tensor`): Σ x² of the inputs over tokens, (inputs,).
        alpha (`float`, *optional*, defaults to 0.5): a.

    Returns:
        `torch.Tensor`: float32 in the shape of W.
    """
    size = weight.float().abs()
    tiny = torch.finfo(torch.float32).tiny  # where all are zero, so are the scores
    relative = size / size.sum(0).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return relative * squares.pow(alpha / 2).float()


@register_pruner("ria", RIAConfig)
class RIAPruner(WeightPruner[RIAConfig]):
    """Zeroes, in each matrix, the weights with the lowest relative size times power of the norm of their input."""

    observe = staticmethod(square_sum)
    paper = Paper(
        "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
        "ICLR 2024",
        "",
        "Yingtao Zhang and Haoli Bai and Haokun Lin and Jialin Zhao and Lu Hou and Carlo Vittorio Cannistraci",
        "https://openreview.net/forum?id=Tr0lPx9woF",
    )

    def solve(self, weight: torch.Tensor, observed: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        score = ria_score(weight, observed, self.config.alpha)
        if isinstance(target, tuple) or self.config.per_output:
            return keep_highest(score, target), weight
        return keep_highest(score.reshape(1, -1), target).reshape(score.shape), weight
