"""Important units first: the prefixes that search spaces keep are then the best units by the score of a method."""

from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from ..calibration import Calibrator
from ..errors import CalibrationError, ConfigError
from ..gates import current_mask
from ..methods import MagnitudeConfig, Pruner, PruningConfig, get_pruner
from ..surgery import reorder
from ..units import base_model, prunable_units


class _Scored(Exception):
    def __init__(self, scores: dict[str, torch.Tensor]) -> None:
        self.scores = scores


def order_units(
    model: PreTrainedModel, config: PruningConfig | None = None, data: Any = None, **options: Any
) -> dict[str, torch.Tensor]:
    """Sort heads and neurons inside each layer, the most important first. The model computes the same function.

    Do this before a super-network is trained: sub-networks keep the first units of each layer. (In the paper they are
    in no order.)

    Args:
        model (`PreTrainedModel`): The model. Its weights are permuted in place.
        config ([`PruningConfig`], *optional*): The method whose scores say what is important, such as
            `FisherConfig(budget={"macs": 0.5})`. Its budget plays no role. Units that it does not score keep their
            places. Defaults to [`MagnitudeConfig`].
        data (*optional*): Calibration data for the method, or a [`Calibrator`].
        options: See [`Calibrator`].

    Returns:
        `dict[str, torch.Tensor]`: For each group of heads and neurons the old indices in their new order.

    Raises:
        ConfigError: The method scores no units, or the model carries a mask.
        CalibrationError: The method needs data and there are none, or they are unfit.
        UnsupportedModelError: The model can't be pruned.

    The model is unchanged after an error.
    """
    config = config if config is not None else MagnitudeConfig(budget={"macs": 1.0})
    pruner = get_pruner(config.method)(config)
    refused = ConfigError(f"{config.method} scores no heads or neurons: take another method, such as Fisher.")
    if not isinstance(pruner, Pruner) or {"heads", "neurons"}.isdisjoint(pruner.kinds):
        raise refused
    if current_mask(model) is not None:
        raise ConfigError("The model carries a mask: shrink it first, or take the mask off with remove_mask(model).")
    units, base = prunable_units(model), base_model(model)
    calibrator = data
    if data is not None and not isinstance(data, Calibrator):
        calibrator = Calibrator(model, data, labels=pruner.wants_labels, **options)
    if calibrator is None and pruner.needs_data:
        raise CalibrationError(f"{config.method} needs calibration data: pass data=.")
    selector = pruner.selector(model, units, calibrator)

    def stop(scores: dict[str, torch.Tensor], *_: Any, **__: Any) -> NoReturn:
        raise _Scored(scores)

    # Once a method hands its scores on it has seen all that it needs, and changed nothing yet.
    pruner.selector = lambda *_: selector  # type: ignore[method-assign]
    selector.select = selector.search = stop  # type: ignore[assignment]
    try:
        pruner.prune(model, units, calibrator)
    except _Scored as scored:
        scores = scored.scores
    else:
        raise refused
    orders = {}
    for group in units.of_kind("heads", "neurons"):
        if group.name in scores and group.prunable:
            order = scores[group.name].detach().cpu().sort(descending=True, stable=True).indices
            orders[group.name] = order
            reorder(base.get_submodule(f"{group.stack}.{group.layer}"), group, order)
    return orders
