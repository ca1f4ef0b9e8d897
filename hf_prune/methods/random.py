"""Random units: the baseline that every score must beat. Needs no data."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..calibration import Calibrator
from ..errors import check_whole
from ..masks import PruningMask
from ..units import PrunableUnits
from .base import Pruner, register_pruner
from .config import PruningConfig


@dataclass(kw_only=True)
class RandomConfig(PruningConfig):
    """Random structured pruning. See [`PruningConfig`] for the other options.

    Args:
        seed (`int`, *optional*, defaults to 0): Of the scores; the same seed gives the same mask everywhere.

    Raises:
        ConfigError: An option is out of range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(0, seed=self.seed)


@register_pruner("random", RandomConfig)
class RandomPruner(Pruner[RandomConfig]):
    """Scores a unit by a uniform random number times its cost, so that heads and neurons are hit alike."""

    needs_data = False

    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> PruningMask:
        selector = self.selector(model, units, calibrator)
        generator = torch.Generator().manual_seed(self.config.seed)
        return selector.select(
            {g.name: torch.rand(g.size, generator=generator) * selector.unit_weight(g) for g in selector.groups}
        )
