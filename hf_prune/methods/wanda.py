"""Wanda: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.

A weight is worth its size times the norm of its input over the calibration data; for each output the lowest go.
"""

from dataclasses import dataclass

import torch

from .base import Paper, register_pruner
from .weights import Target, WeightPruner, WeightPruningConfig, keep_highest, square_sum, wanda_score


@dataclass(kw_only=True)
class WandaConfig(WeightPruningConfig):
    """Options of Wanda. See [`WeightPruningConfig`]."""


@register_pruner("wanda", WandaConfig)
class WandaPruner(WeightPruner[WandaConfig]):
    """Zeroes, for each output, the weights with the lowest size times norm of their input."""

    observe = staticmethod(square_sum)
    paper = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models",
        "ICLR 2024",
        "2306.11695",
        "Mingjie Sun and Zhuang Liu and Anna Bair and J. Zico Kolter",
    )

    def solve(self, weight: torch.Tensor, observed: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        return keep_highest(wanda_score(weight, observed), target), weight
