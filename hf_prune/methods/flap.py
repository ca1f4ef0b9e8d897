"""FLAP: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024.

Unlabelled data, one forward pass. An input of an output projection that hardly varies can be replaced by its mean,
which the bias then takes over. The score of an input is its sample variance times the squared norm of the weights that
read it (WIFV), standardised per layer so that one threshold serves all layers.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..calibration import Calibrator
from ..errors import CalibrationError
from ..masks import PruningMask
from ..statistics import Moments
from ..units import PrunableUnits, output_matrix, site
from .base import Paper, Pruner, register_pruner
from .config import Recover, RecoverableConfig


@dataclass(kw_only=True)
class FLAPConfig(RecoverableConfig):
    """Options of FLAP. See [`PruningConfig`] for the others.

    Args:
        recover (`"bias"`, `"lstsq"`, `"lstsq_outputs"`, `"scale"` or `"none"`, *optional*, defaults to `"bias"`): How
            the loss of the pruned units is made good, see [`RecoverableConfig`]; `"bias"` is the paper's compensation.
    """

    recover: Recover = "bias"


def fluctuation(variance: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """WIFV of each input of a projection: Var(x_j)·‖W_j‖².

    Args:
        variance (`torch.Tensor`): Of the inputs, float64 of shape (inputs,).
        matrix (`torch.Tensor`): The weight, (inputs, outputs).

    Returns:
        `torch.Tensor`: float64 of shape (inputs,).
    """
    return variance * matrix.float().square().sum(1).double()


def standardised(score: torch.Tensor) -> torch.Tensor:
    """z-scores of one layer, (inputs,) -> (inputs,). Zeros where all scores are equal."""
    deviation = score - score.mean()
    return deviation / deviation.square().mean().sqrt().clamp_min(torch.finfo(score.dtype).tiny)


@register_pruner("flap", FLAPConfig)
class FLAPPruner(Pruner[FLAPConfig]):
    """Keeps the heads and neurons whose inputs fluctuate most, by z-scores per layer.

    The score of a head is the mean over its inputs. Units are ranked by z-score alone, across kinds and layers, and
    each takes from the budget what it costs: the authors' weight of 512/3 for a head is the ratio of the costs of a
    head (4·128·d) and a neuron (3·d) in LLaMA-7B. Their code squares the scores of heads before it standardises them;
    the paper does not, nor is it done here.
    """

    paper = Paper(
        "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        "AAAI 2024",
        "2312.11983",
        "Yongqi An and Xu Zhao and Tao Yu and Ming Tang and Jinqiao Wang",
    )

    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> PruningMask:
        assert calibrator is not None
        selector = self.selector(model, units, calibrator)
        moments = {g.name: Moments(g.size * g.width, site(model, g).weight.device) for g in selector.groups}
        calls = calibrator.collect(moments, "score units", record=self.walks(model, units))
        scores = {}
        for group in selector.groups:
            variance = moments[group.name].variance
            if not variance.any():
                raise CalibrationError(f"No input of {group.name} varies on the calibration data.")
            columns = standardised(fluctuation(variance, output_matrix(site(model, group)).detach()))
            # The selector ranks by score per cost: this leaves the z-scores, negative ones too, in their order.
            scores[group.name] = columns.reshape(group.size, -1).mean(1) * selector.unit_weight(group)
        mask = selector.select(scores)
        self.recover(model, units, mask, calibrator, calls, moments)
        return mask
