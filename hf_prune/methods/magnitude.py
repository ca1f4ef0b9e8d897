"""Weight magnitude: keep the units whose output weights are largest."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..calibration import Calibrator
from ..masks import PruningMask
from ..units import PrunableUnits, output_matrix, site
from .base import Pruner, register_pruner
from .config import RecoverableConfig


@dataclass(kw_only=True)
class MagnitudeConfig(RecoverableConfig):
    """Structured magnitude pruning. See [`PruningConfig`] for the other options.

    Args:
        recover (`"lstsq"`, `"lstsq_outputs"`, `"scale"`, `"bias"` or `"none"`, *optional*, defaults to `"none"`): How
            what is kept is refitted to the dense model, see [`RecoverableConfig`]; all but `"none"` needs calibration
            data.
    """


def output_energy(matrix: torch.Tensor, units: int) -> torch.Tensor:
    """Squared Frobenius norm of what each unit writes: (columns, outputs) -> (units,)."""
    return matrix.detach().float().square().sum(1).reshape(units, -1).sum(1)


@register_pruner("magnitude", MagnitudeConfig)
class MagnitudePruner(Pruner[MagnitudeConfig]):
    """Scores a unit by the squared Frobenius norm of its columns in the output projection.

    Per cost, as units are ranked, this is about the mean square of a weight: heads and neurons share one scale.
    """

    needs_data = False

    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> PruningMask:
        selector = self.selector(model, units, calibrator)
        energies = {g.name: output_energy(output_matrix(site(model, g)), g.size) for g in selector.groups}
        mask = selector.select(energies)
        self.recover(model, units, mask, calibrator)
        return mask
