"""Block Influence layer drop: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You
Expect", 2024.

Unlabelled data, one forward pass. The layers that turn the hidden states least are dropped; the widths of the others
stay, so that plain transformers loads the result.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from ..calibration import Calibrator
from ..depth import block_influence, drop_to_budget
from ..errors import ConfigError
from ..masks import PruningMask
from ..units import PrunableUnits
from .base import Paper, Pruner, register_pruner
from .config import PruningConfig


@dataclass(kw_only=True)
class LayerDropConfig(PruningConfig):
    """Options of layer drop. See [`PruningConfig`].

    The budget says how many layers go; `exclude` keeps the layers of the groups that it matches. `drop_layers` and
    `multiple_of` are for methods that prune heads or neurons.

    Raises:
        ConfigError: An option is out of range, or `drop_layers` or `multiple_of` is given.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, default in (("drop_layers", 0), ("multiple_of", None)):
            if getattr(self, name) != default:
                raise ConfigError(
                    f"layer_drop prunes whole layers until the budget is met: leave {name} at {default}, or choose a "
                    "method that prunes heads or neurons."
                )


@register_pruner("layer_drop", LayerDropConfig)
class LayerDropPruner(Pruner[LayerDropConfig]):
    """Drops the layers with the lowest Block Influence; heads and neurons stay."""

    kinds = ("layers",)
    paper = Paper(
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        "arXiv 2024",
        "2403.03853",
        "Xin Men and Mingyu Xu and Qingyu Zhang and Bingning Wang and Hongyu Lin and Yaojie Lu and Xianpei Han and "
        "Weipeng Chen",
    )

    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> PruningMask:
        assert calibrator is not None
        influence = block_influence(calibrator)
        self.facts["block_influence"] = influence
        return drop_to_budget(
            self.cost_table(model, units, calibrator), influence, self.config.budget, self.config.exclude
        )
