"""Fisher mask search: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022.

Labelled data, one backward pass. The Fisher information of unit masks, from the gradients of the task loss by masks of
ones, scores heads and neurons; the best split of the budget between them is searched; within each layer units are
swapped so that their gradients cancel; the kept weights are refitted.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..calibration import Calibrator
from ..errors import CalibrationError, ConfigError
from ..gradients import collect_gradients
from ..masks import PruningMask
from ..units import PrunableUnits, site
from .base import Paper, Pruner, register_pruner
from .config import Recover, RecoverableConfig


@dataclass(kw_only=True)
class FisherConfig(RecoverableConfig):
    """Options of Fisher mask search. See [`PruningConfig`] for the others.

    Args:
        per_sample (`bool`, *optional*, defaults to `False`): Square the gradients of single examples, as the paper
            writes, rather than those of batches, as its code does. The latter depend on the batch size.
        rearrange (`bool`, *optional*, defaults to `True`): Swap units within each layer to lower the block-diagonal
            Fisher objective (Section 4.2 of the paper).
        recover (`"lstsq"`, `"lstsq_outputs"`, `"scale"`, `"bias"` or `"none"`, *optional*, defaults to `"lstsq"`): How
            what is kept is refitted to the dense model, see [`RecoverableConfig`]; `"scale"` is the paper's tuning.

    Raises:
        ConfigError: An option is out of range.
    """

    per_sample: bool = False
    rearrange: bool = True
    recover: Recover = "lstsq"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("per_sample", "rearrange"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}.")


class FisherBlock:
    """Streaming Fisher information of the units of one group: the sum of g·gᵀ over gradients g.

    Args:
        units (`int`): Number of units.

    Attributes:
        matrix (`torch.Tensor`): float64 of shape (units, units).
    """

    def __init__(self, units: int, device: torch.device) -> None:
        self.matrix = torch.zeros(units, units, dtype=torch.float64, device=device)

    def update(self, inputs: torch.Tensor) -> None:
        self.matrix += inputs.T @ inputs

    def sums(self) -> list[torch.Tensor]:
        return [self.matrix]


def rearranged(fisher: torch.Tensor, pruned: int) -> torch.Tensor:
    """Units to keep so that m̄ᵀ·F·m̄ is small, with m̄ the indicator of those that are pruned: greedy, one pass.

    It starts with the units of the lowest diagonal. Each other unit, in ascending order, joins them, and the one whose
    return leaves the least leaves.

    Args:
        fisher (`torch.Tensor`): F, (units, units).
        pruned (`int`): How many are pruned.

    Returns:
        `torch.Tensor`: bool of shape (units,), `True` = keep.
    """
    fisher = fisher.cpu()
    order = fisher.diagonal().sort(stable=True).indices
    out, rest = order[:pruned].clone(), order[pruned:]
    keep = torch.ones(len(fisher), dtype=torch.bool)
    if pruned:
        sums = fisher[:, out].sum(1)
        diagonal = fisher.diagonal()
        for unit in rest:
            sums = sums + fisher[:, unit]
            candidates = torch.cat([out, unit[None]])
            # Objective without candidate m, up to a constant: −2·Σ_j F_mj + F_mm.
            back = int((diagonal[candidates] - 2 * sums[candidates]).argmin())
            sums = sums - fisher[:, candidates[back]]
            if back < pruned:
                out[back] = unit
        keep[out] = False
    return keep


@register_pruner("fisher", FisherConfig)
class FisherPruner(Pruner[FisherConfig]):
    """Keeps the heads and neurons with the largest Fisher information under the best split of the budget."""

    needs_labels = True
    paper = Paper(
        "A Fast Post-Training Pruning Framework for Transformers",
        "NeurIPS 2022",
        "2204.09656",
        "Woosuk Kwon and Sehoon Kim and Michael W. Mahoney and Joseph Hassoun and Kurt Keutzer and Amir Gholami",
    )

    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> PruningMask:
        assert calibrator is not None
        selector = self.selector(model, units, calibrator)
        fisher = {g.name: FisherBlock(g.size, site(model, g).weight.device) for g in selector.groups}
        collect_gradients(calibrator, selector.groups, fisher, per_sample=self.config.per_sample)
        scores = {name: block.matrix.diagonal() for name, block in fisher.items()}
        if not any(score.any() for score in scores.values()):
            raise CalibrationError("The loss has no gradient by any unit: are the labels those of this model's task?")
        mask = selector.search(scores)
        if self.config.rearrange:
            keep = {n: rearranged(block.matrix, int((~mask[n]).sum())) for n, block in fisher.items()}
            mask = PruningMask(keep, units)
        self.recover(model, units, mask, calibrator)
        return mask
