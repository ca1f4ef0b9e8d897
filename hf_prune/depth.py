"""Block Influence: which layers change least what passes through them, and can go.

BI_l = 1 − E cos(x_l, x_{l+1}) over all real tokens, with x_l what goes into layer l: Men et al., "ShortGPT: Layers in
Large Language Models are More Redundant Than You Expect", 2024.
"""

from collections.abc import Iterable, Mapping

import torch

from .calibration import Calibrator
from .costs import CostTable
from .errors import ConfigError
from .masks import PruningMask
from .selection import check_floor, resolve_budget
from .units import PrunableUnits

Layer = tuple[str, int]  # stack, index


class BlockInfluence:
    """Streaming Block Influence of one layer.

    Args:
        device (`torch.device`): Where the sums are kept.

    Attributes:
        total (`torch.Tensor`): Sum of 1 − cos(before, after) over tokens, float64 of shape ().
        count (`torch.Tensor`): Number of tokens, of shape ().
    """

    def __init__(self, device: torch.device) -> None:
        self.total, self.count = torch.zeros(2, dtype=torch.float64, device=device).unbind()

    def update(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take the hidden states of some tokens.

        Args:
            before, after (`torch.Tensor`): What goes into the layer and what comes out, both (tokens, hidden).
        """
        cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
        self.total += (1 - cosine).sum(dtype=torch.float64)
        self.count += len(cosine)

    def sums(self) -> list[torch.Tensor]:
        """The tensors to reduce over processes."""
        return [self.total, self.count]

    @property
    def mean(self) -> float:
        """BI, between 0 (the layer turns no hidden state) and 2."""
        return float(self.total / self.count)


def block_influence(calibrator: Calibrator) -> dict[str, list[float]]:
    """The Block Influence of all layers, from one pass over the data; no hidden states are kept.

    Args:
        calibrator ([`Calibrator`]): The data, and the model.

    Returns:
        `dict[str, list[float]]`: For each stack BI of its layers, from 0 to 2; the lower, the less a layer does.

    Raises:
        CalibrationError: A hidden state is NaN or infinite; the message names the layer.
    """
    device = calibrator.model.device
    layers = {
        f"{g.name}.{i}": BlockInfluence(device) for g in calibrator.units.of_kind("layers") for i in range(g.size)
    }
    calibrator.collect_layers(layers)
    return {g.name: [layers[f"{g.name}.{i}"].mean for i in range(g.size)] for g in calibrator.units.of_kind("layers")}


def droppable(units: PrunableUnits, exclude: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """The layers that can be dropped: others of the family don't need them, and `exclude` keeps no units of them
    whole.

    Args:
        units ([`PrunableUnits`]): Units of the model.
        exclude (`tuple[str, ...]`, *optional*): Shell patterns of unit groups that stay.

    Returns:
        `dict[str, list[int]]`: For each stack the indices of such layers, ascending. A stack has to keep one of its
        layers even where all can be dropped.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    excluded = units.matching(exclude)
    return {
        name: [
            index
            for index in range(units[name].size)
            if index not in stack.fixed_layers
            and excluded.isdisjoint([name, *(group.name for group in units.of_layer(name, index))])
        ]
        for name, stack in units.stacks.items()
    }


def drop_layers(
    calibrator: Calibrator, count: int, exclude: tuple[str, ...] = ()
) -> tuple[PruningMask, dict[str, list[float]]]:
    """Drop the layers of lowest Block Influence.

    Args:
        calibrator ([`Calibrator`]): The data, and the model.
        count (`int`): How many. They compete over all stacks; each stack keeps one.
        exclude (`tuple[str, ...]`, *optional*): Shell patterns of unit groups that stay, and so do their layers.

    Returns:
        The mask and the [`block_influence`] of all layers.

    Raises:
        ConfigError: The model has fewer layers that can be dropped, or a pattern in `exclude` matches nothing.
        CalibrationError: A hidden state is NaN or infinite; the message names the layer.
    """
    units = calibrator.units
    most = sum(min(len(free), units[stack].size - 1) for stack, free in droppable(units, exclude).items())
    if count > most:
        raise ConfigError(
            f"drop_layers is {count}, but of the {sum(g.size for g in units.of_kind('layers'))} layers of this "
            f"{units.model_type} model at most {most} can be dropped: a stack keeps one, those that others need, and "
            "those that exclude matches."
        )
    influence = block_influence(calibrator)
    return _without(units, _order(units, influence, exclude)[:count]), influence


def drop_to_budget(
    table: CostTable, influence: Mapping[str, list[float]], budget: Mapping[str, float], exclude: tuple[str, ...] = ()
) -> PruningMask:
    """Drop the layers of lowest Block Influence until a budget is met; those that still fit come back, best first.

    Args:
        table ([`CostTable`]): Costs of the model.
        influence (`dict[str, list[float]]`): By stack, of each layer.
        budget (`dict[str, float]`): See [`~hf_prune.selection.resolve_budget`].
        exclude (`tuple[str, ...]`, *optional*): Shell patterns of unit groups that stay, and so do their layers.

    Returns:
        [`PruningMask`]: Of whole layers: heads and neurons are all kept.

    Raises:
        InfeasibleBudgetError: It can't be met; the message names the nearest that can.
        ConfigError: The budget is malformed, or a pattern in `exclude` matches nothing.
    """
    limits = resolve_budget(budget, table.of())
    order = _order(table.units, influence, exclude)
    check_floor(table, limits, table.of(_without(table.units, order)), "dropping layers")

    def fits(dropped: list[Layer]) -> bool:
        costs = table.of(_without(table.units, dropped))
        return all(costs[metric] <= limit for metric, limit in limits.items())

    dropped = next(order[:n] for n in range(len(order) + 1) if fits(order[:n]))
    for layer in reversed(dropped):
        if fits(rest := [other for other in dropped if other != layer]):
            dropped = rest
    return _without(table.units, dropped)


def _order(units: PrunableUnits, influence: Mapping[str, list[float]], exclude: tuple[str, ...]) -> list[Layer]:
    """The layers that can be dropped together, lowest influence first."""
    free = droppable(units, exclude)
    layers = sorted((influence[stack][index], stack, index) for stack, indices in free.items() for index in indices)
    left, order = {stack: units[stack].size for stack in free}, []
    for _, stack, index in layers:
        if left[stack] > 1:
            left[stack] -= 1
            order.append((stack, index))
    return order


def _without(units: PrunableUnits, dropped: Iterable[Layer]) -> PruningMask:
    keep = {group.name: torch.ones(group.size, dtype=torch.bool) for group in units.of_kind("layers")}
    for stack, index in dropped:
        keep[stack][index] = False
    return PruningMask(keep, units)
