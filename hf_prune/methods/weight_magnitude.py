"""Magnitude of single weights: the baseline that every score must beat."""

from dataclasses import dataclass

import torch

from .base import register_pruner
from .weights import Target, WeightPruner, WeightPruningConfig, keep_highest


@dataclass(kw_only=True)
class WeightMagnitudeConfig(WeightPruningConfig):
    """Options of magnitude pruning. See [`WeightPruningConfig`]."""


def keep_largest(weight: torch.Tensor, target: Target) -> torch.Tensor:
    """Which weights stay when the smallest of a matrix are pruned, of each group for a pattern: bool of its shape."""
    size = weight.float().abs()
    if isinstance(target, tuple):
        return keep_highest(size, target)
    return keep_highest(size.reshape(1, -1), target).reshape(size.shape)


@register_pruner("weight_magnitude", WeightMagnitudeConfig)
class WeightMagnitudePruner(WeightPruner[WeightMagnitudeConfig]):
    """Zeroes the smallest weights of each matrix."""

    needs_data = False

    def solve(self, weight: torch.Tensor, observed: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        return keep_largest(weight, target), weight
