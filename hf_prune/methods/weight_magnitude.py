"""Magnitude of single weights: the baseline that every score must beat.

As in Wanda, weights are compared within an output. That is a stronger baseline than one threshold for a matrix, which
the tables of Wanda show.
"""

from dataclasses import dataclass

import torch

from .base import register_pruner
from .weights import Target, WeightPruner, WeightPruningConfig, keep_highest


@dataclass(kw_only=True)
class WeightMagnitudeConfig(WeightPruningConfig):
    """Options of magnitude pruning. See [`WeightPruningConfig`]."""


@register_pruner("weight_magnitude", WeightMagnitudeConfig)
class WeightMagnitudePruner(WeightPruner[WeightMagnitudeConfig]):
    """Zeroes the smallest weights of each output."""

    needs_data = False

    def solve(self, weight: torch.Tensor, observed: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        return keep_highest(weight.float().abs(), target), weight
