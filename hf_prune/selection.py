"""Scores and a budget in, a mask out."""

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError

from .costs import METRICS, Costs, CostTable, Metric
from .errors import CalibrationError, ConfigError, InfeasibleBudgetError, unknown
from .masks import PruningMask
from .units import Kind, UnitGroup

Allocation = Literal["global", "uniform"]


def resolve_budget(budget: Mapping[str, float], dense: Costs) -> dict[Metric, float]:
    """The most that a pruned model may cost, in absolute numbers.

    Args:
        budget (`dict[str, float]`): For `"macs"`, `"params"`, `"memory"` or `"latency"` the kept ratio, in (0, 1], or
            an absolute number above 1: a whole one, of milliseconds any.
        dense ([`Costs`]): Costs of the unpruned model.

    Returns:
        `dict[str, float]`: The limit of each metric of the budget, in the units of [`Costs`].

    Raises:
        ConfigError: The budget is empty, names an unknown metric, is out of range, or above the cost of the dense
            model.
    """
    check_budget(budget)
    limits: dict[Metric, float] = {}
    for metric in METRICS:
        if metric in budget:
            value = float(budget[metric])
            if not dense[metric]:  # all others are counted
                raise ConfigError(f"A budget of {metric} needs CostTable(model, latency=latency_table(model)).")
            limits[metric] = value * dense[metric] if value <= 1 else value
            if limits[metric] > dense[metric]:
                whole = _amount(metric, dense[metric])
                raise ConfigError(f"budget[{metric!r}] = {budget[metric]:,} is more than the {whole} of the model.")
    return limits


def check_budget(budget: Any) -> None:
    """Raise unless a budget is well-formed, see [`resolve_budget`].

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(budget, Mapping) or not budget:
        raise ConfigError(f'budget must be a dict such as {{"macs": 0.6}}, got {budget!r}.')
    for metric, value in budget.items():
        if metric not in METRICS:
            raise ConfigError(unknown("metric in budget", metric, METRICS))
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value <= 0 or (value > 1 and value != int(value) and metric != "latency"):
            above = "milliseconds" if metric == "latency" else "a whole number"
            raise ConfigError(
                f"budget[{metric!r}] must be the ratio to keep, in (0, 1], or {above} above 1, got {value!r}."
            )


def _amount(metric: Metric, cost: float) -> str:
    return f"{cost:,.3f} ms" if metric == "latency" else f"{cost:,.0f}"


def check_floor(table: CostTable, limits: Mapping[Metric, float], least: Costs, how: str) -> None:
    """Raise if the least that a way of pruning can reach is above a limit.

    Args:
        table ([`CostTable`]): Costs of the dense model.
        limits (`dict[str, float]`): What [`resolve_budget`] returned.
        least ([`Costs`]): The least that can be reached.
        how (`str`): The way, for the message: `"dropping layers"`.

    Raises:
        InfeasibleBudgetError: It is; the message names the nearest feasible budget.
    """
    dense = table.of()
    for metric, limit in limits.items():
        if least[metric] > limit:
            ratio = math.ceil(least[metric] / dense[metric] * 1e4) / 1e4
            lengths = ", ".join(f"{n:.4g}" for n in table.lengths.values())
            asked, lowest = _amount(metric, limit), _amount(metric, least[metric])
            raise InfeasibleBudgetError(
                f"A budget of {asked} {metric} ({limit / dense[metric]:.4f} of the dense one) can't be met by {how} "
                f"(n = {lengths} tokens): the least is {lowest}, nearest feasible budget {{{metric!r}: {ratio}}}."
            )


@dataclass(frozen=True)
class _Blocks:
    """What can be added to a mask: runs of units of one group, best first, flattened over the groups."""

    group: torch.Tensor  # index of the group
    count: torch.Tensor  # units in the block
    score: torch.Tensor  # sum of their scores
    latency: torch.Tensor  # milliseconds that the block adds to those before it
    first: torch.Tensor  # the first block of its group, always kept


class Selector:
    """Turns scores into the mask that keeps the most under a budget.

    The first unit of every group is kept: a layer never loses all its heads or neurons. With `allocation="global"`
    units compete over all layers by score per cost. With `"uniform"` each layer keeps as many as the others of its
    stack, in numbers that the stock config can hold, so that plain transformers loads the result; heads stay whole
    where it can't hold fewer.

    Args:
        table ([`CostTable`]): Costs of the model.
        budget (`dict[str, float]`): See [`resolve_budget`]. Several limits hold at once.
        kinds (`tuple[str, ...]`): Kinds of units that may be pruned: `"heads"`, `"neurons"`.
        allocation (`"global"` or `"uniform"`, *optional*, defaults to `"global"`): See above.
        multiple_of (`int`, *optional*, defaults to 1): Each layer keeps a multiple of this many neurons (or all of
            them).
        exclude (`tuple[str, ...]`, *optional*): Shell patterns of group names that stay whole.
        config (`PreTrainedConfig`, *optional*): Config of the model, for `"uniform"`.
        base ([`PruningMask`], *optional*): Layers that are dropped already: they cost nothing, and their units do not
            compete.

    Raises:
        ConfigError: An option is wrong, or there is nothing left to prune.
        InfeasibleBudgetError: The budget lies below the floor.
    """

    def __init__(
        self,
        table: CostTable,
        budget: Mapping[str, float],
        kinds: tuple[Kind, ...] = ("heads", "neurons"),
        *,
        allocation: Allocation = "global",
        multiple_of: int = 1,
        exclude: tuple[str, ...] = (),
        config: Any = None,
        base: PruningMask | None = None,
    ) -> None:
        self.table, self.units = table, table.units
        self.base = base if base is not None else PruningMask({}, self.units)
        self.dense, self.most = table.of(), table.of(self.base)
        self.limits = resolve_budget(budget, self.dense)
        excluded = self.units.matching(exclude)
        present = [g for g in self.units.of_kind(*kinds) if not self.base.drops(g)]
        self.groups = [g for g in present if g.prunable and g.size and g.name not in excluded]
        self.multiple_of, self.allocation = multiple_of, allocation
        if allocation == "uniform":
            self.classes = self._uniform_classes(config)
            floor = {key: counts[0] for key, (_, counts) in self.classes.items()}
            least = self._costs({g.name: floor[key] for key, (members, _) in self.classes.items() for g in members})
            self.groups = [group for members, _ in self.classes.values() for group in members]
        else:
            least = self._costs({g.name: min(self._step(g), g.size) for g in self.groups})
        if not self.groups:
            raise ConfigError(self._nothing_left(kinds, excluded))
        what = " and ".join(sorted({group.kind for group in self.groups}))
        check_floor(table, self.limits, least, f"pruning {what} with {allocation} allocation")

    def select(
        self, scores: Mapping[str, torch.Tensor], decided: Mapping[str, torch.Tensor] | None = None
    ) -> PruningMask:
        """The mask for these scores.

        Args:
            scores (`dict[str, torch.Tensor]`): For each of `self.groups` the importance of its units, of shape
                (units,), higher is better, on one scale for all groups.
            decided (`dict[str, torch.Tensor]`, *optional*): For groups that need no scores any more which of their
                units stay: bool of shape (units,).

        Returns:
            [`PruningMask`]: It costs at most the budget. Of units of a group with equal scores the first stay.

        Raises:
            CalibrationError: A score is NaN or infinite.
        """
        decided = decided or {}
        values = self._values({**scores, **decided})
        if self.allocation == "uniform":
            return self._mask(values, self._uniform_counts())
        fixed = {name: int(keep.sum()) for name, keep in decided.items()}
        return self._fitting(values, partial(self._global_counts, fixed=fixed))

    def _fitting(
        self,
        values: Mapping[str, torch.Tensor],
        count: Callable[[Mapping[str, torch.Tensor], float], dict[str, int]],
    ) -> PruningMask:
        # A budget that is met exactly must count as met, although sums in another order round to another last bit.
        mask = self._mask(values, count(values, 1e-12))
        return mask if self._fits(self.table.of(mask)) else self._mask(values, count(values, -1e-12))

    def search(self, scores: Mapping[str, torch.Tensor]) -> PruningMask:
        """The mask with the largest sum of scores under the budget, if one kind is chosen after the other.

        For every number of heads, best first, the neurons fill what is left of the budget, best first; the number with
        the largest sum wins, the smallest of equals (Kwon et al. 2022, Algorithm 1). Scores are of whole units here,
        not per cost. With uniform allocation it is [`~Selector.select`].

        Args:
            scores (`dict[str, torch.Tensor]`): As in [`~Selector.select`].

        Returns:
            [`PruningMask`]: It costs at most the budget.

        Raises:
            CalibrationError: A score is NaN or infinite.
        """
        if self.allocation == "uniform":
            return self.select(scores)
        return self._fitting(self._values(scores), self._searched_counts)

    def _searched_counts(self, values: Mapping[str, torch.Tensor], slack: float) -> dict[str, int]:
        blocks = self._blocks(values, {})
        cost, _, left = self._room(blocks, slack)
        is_head = torch.tensor([group.kind == "heads" for group in self.groups])[blocks.group]
        per_unit = blocks.score / blocks.count
        chains = []
        for of_kind in (is_head, ~is_head):
            order = per_unit.sort(descending=True, stable=True).indices
            chains.append(order[of_kind[order] & ~blocks.first[order]])
        heads, neurons = chains
        zero = torch.zeros(1, len(left), dtype=torch.float64)
        head_costs = torch.cat([zero, cost[heads].cumsum(0)])
        neuron_costs = torch.cat([zero, cost[neurons].cumsum(0)])
        head_scores = torch.cat([zero[0, :1], blocks.score[heads].cumsum(0)])
        neuron_scores = torch.cat([zero[0, :1], blocks.score[neurons].cumsum(0)])
        # For each number of heads the largest number of neurons (blocks) that fits beside them, in every metric.
        rest = left - head_costs
        room = torch.searchsorted(neuron_costs.T.contiguous(), rest.T.contiguous(), right=True).amin(0) - 1
        total = torch.where(room >= 0, head_scores + neuron_scores[room.clamp_min(0)], -math.inf)
        best = int(total.argmax())
        taken = blocks.first.clone()
        taken[heads[:best]] = True
        taken[neurons[: int(room[best])]] = True
        return self._counts(blocks, taken)

    def _values(self, scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        values = {}
        for group in self.groups:
            values[group.name] = scores[group.name].detach().to("cpu", torch.float64)
            if not values[group.name].isfinite().all():
                raise CalibrationError(f"The scores of {group.name} are not finite: check its weights and the data.")
        return values

    def _room(self, blocks: _Blocks, slack: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In all metrics the cost of each block; its price for ranking; and what the first blocks leave of the limits.

        Blocks of a group are taken in their order, so what a group costs is the sum of what its blocks add, although
        its latency is not proportional to its units. The price is: the best units come first.
        """
        unit = torch.tensor(
            [[self.table.unit[g.name][m] for m in self.limits] for g in self.groups], dtype=torch.float64
        )
        cost = unit[blocks.group] * blocks.count[:, None]
        limit = torch.tensor(list(self.limits.values()), dtype=torch.float64)
        price = (cost / limit).mean(1).clamp_min(1e-30)  # some heads take no time at all
        if "latency" in self.limits:
            cost[:, list(self.limits).index("latency")] = blocks.latency
        whole = sum((self.table.several(g.name, g.size) for g in self.groups), Costs())
        least = torch.tensor([self.most[m] - whole[m] for m in self.limits], dtype=torch.float64)
        return cost, price, limit * (1 + slack) - (least + cost[blocks.first].sum(0))

    def _counts(self, blocks: _Blocks, taken: torch.Tensor) -> dict[str, int]:
        counts = torch.zeros(len(self.groups), dtype=torch.long).index_add_(
            0, blocks.group[taken], blocks.count[taken]
        )
        return {group.name: int(n) for group, n in zip(self.groups, counts, strict=True)}

    def _mask(self, values: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> PruningMask:
        keep = {**self.base}
        for group in self.groups:
            best = values[group.name].sort(descending=True, stable=True).indices[: counts[group.name]]
            keep[group.name] = torch.zeros(group.size, dtype=torch.bool).index_fill(0, best, True)
        return PruningMask(keep, self.units)

    def unit_weight(self, group: UnitGroup) -> float:
        """The share of the budget that one unit of a group takes, averaged over the metrics.

        Args:
            group ([`UnitGroup`]): The group. A score that is multiplied by this is ranked as it is, not per cost.
        """
        return sum(self.table.unit[group.name][m] / limit for m, limit in self.limits.items()) / len(self.limits)

    # Costs

    def _step(self, group: UnitGroup) -> int:
        return self.multiple_of if group.kind == "neurons" else 1

    def _costs(self, counts: Mapping[str, int]) -> Costs:
        """Costs when the groups in `counts` keep that many units, and the others all."""
        several = self.table.several
        lost = (several(name, self.units[name].size) - several(name, count) for name, count in counts.items())
        return self.most - sum(lost, Costs())

    def _fits(self, costs: Costs) -> bool:
        return all(costs[metric] <= limit for metric, limit in self.limits.items())

    # Global

    def _global_counts(
        self, values: Mapping[str, torch.Tensor], slack: float, fixed: Mapping[str, int]
    ) -> dict[str, int]:
        blocks = self._blocks(values, fixed)
        cost, price, left = self._room(blocks, slack)

        density = blocks.score / price
        order = density.masked_fill(blocks.first, -math.inf).sort(descending=True, stable=True).indices
        order = order[: int((~blocks.first).sum())]
        prefix = int((cost[order].cumsum(0) <= left).all(1).sum())
        taken = blocks.first.clone()
        taken[order[:prefix]] = True
        left = left - cost[order[:prefix]].sum(0)
        # What the next best unit leaves of the budget goes to the best of the cheaper ones, one group after another.
        rest = order[prefix:]
        while len(rest):
            following = rest[_first_of_each(blocks.group[rest])]
            following = following[(cost[following] <= left).all(1)]
            if len(following):
                best = following[density[following].argmax()]
                taken[best] = True
                left = left - cost[best]
                rest = rest[rest != best]
            rest = rest[torch.isin(blocks.group[rest], blocks.group[following])]
        return self._counts(blocks, taken)

    def _blocks(self, values: Mapping[str, torch.Tensor], fixed: Mapping[str, int]) -> _Blocks:
        group, count, score, latency, first = [], [], [], [], []
        times = self.table.latency.units if self.table.latency is not None else None
        for index, g in enumerate(self.groups):
            step = self._step(g)
            full = max(g.size // step, 1)
            sizes = [step] * (full - 1) + [g.size - step * (full - 1)]  # the worst block takes what is left over
            if g.name in fixed:
                sizes = [fixed[g.name]]
            runs = torch.split(values[g.name].sort(descending=True).values[: sum(sizes)], sizes)
            group.append(torch.full((len(runs),), index))
            count.append(torch.tensor([len(run) for run in runs]))
            score.append(torch.stack([run.sum() for run in runs]) if max(sizes) > 1 else torch.cat(runs))
            ms = torch.from_numpy(times[g.name]) if times else torch.zeros(g.size + 1)
            latency.append(ms[torch.tensor([0, *accumulate(sizes)])].diff())
            first.append(torch.arange(len(runs)) == 0)
        return _Blocks(*(torch.cat(column) for column in (group, count, score, latency, first)))

    # Uniform

    def _uniform_classes(self, config: Any) -> dict[str, tuple[list[UnitGroup], list[int]]]:
        """Groups that share one number in the stock config, and the numbers that it accepts, ascending."""
        names = {group.name for group in self.groups}
        classes: dict[str, tuple[list[UnitGroup], list[int]]] = {}
        for stack in self.units.stacks.values():
            for kind, attribute in (("heads", stack.config_heads), ("neurons", stack.config_neurons)):
                of_kind = self.units.of_kind(kind)  # type: ignore[arg-type]
                members = [g for g in of_kind if g.stack == stack.layers and not self.base.drops(g)]
                chosen = [g for g in members if g.name in names]
                if not attribute or not chosen:
                    continue
                if len(chosen) < len(members):
                    missing = next(g.name for g in members if g.name not in names)
                    raise ConfigError(
                        f"allocation='uniform' needs all {kind} of {stack.layers}, but {missing} is excluded."
                    )
                members = classes.get(attribute, ([], []))[0] + members
                size = min(g.size for g in members)
                counts = _stock_head_counts(config, stack, members[0], size) if kind == "heads" else self._widths(size)
                classes[attribute] = members, counts
        return {key: value for key, value in classes.items() if value[1]}

    def _widths(self, size: int) -> list[int]:
        return [*range(self.multiple_of, size, self.multiple_of), size]

    def _uniform_counts(self) -> dict[str, int]:
        def at(ratio: float) -> dict[str, int]:
            return {
                key: counts[max(bisect_right(counts, ratio * counts[-1]) - 1, 0)]
                for key, (_, counts) in self.classes.items()
            }

        def fits(chosen: Mapping[str, int]) -> bool:
            return self._fits(
                self._costs({g.name: chosen[key] for key, (members, _) in self.classes.items() for g in members})
            )

        ratios = sorted({count / counts[-1] for _, counts in self.classes.values() for count in counts})
        low, high = 0, len(ratios)  # the largest ratio that fits lies in [low, high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(at(ratios[middle])) else (low, middle)
        chosen = at(ratios[low])
        for key, (_, counts) in sorted(self.classes.items(), key=lambda item: len(item[1][1])):
            for count in counts:  # widen one kind where both together are too much
                if count > chosen[key] and fits({**chosen, key: count}):
                    chosen[key] = count
        return {g.name: chosen[key] for key, (members, _) in self.classes.items() for g in members}

    def _nothing_left(self, kinds: tuple[Kind, ...], excluded: set[str]) -> str:
        what, family = " and ".join(kinds), self.units.model_type
        if excluded:
            return f"exclude leaves no {what} to prune."
        if self.allocation == "uniform":
            return (
                f"The stock config of {family} can't hold fewer {what}: use allocation='global', the result loads "
                "with `import hf_prune`."
            )
        note = self.units.architecture.note
        return f"There are no {what} to prune in this {family} model{': ' + note if note else ''}."


def _first_of_each(group: torch.Tensor) -> torch.Tensor:
    """Positions at which a group index occurs for the first time."""
    ordered, position = group.sort(stable=True)
    return position[torch.cat([torch.ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])]


def _stock_head_counts(config: Any, stack: Any, group: UnitGroup, size: int) -> list[int]:
    """Numbers of heads (KV groups) that a config accepts when it is created, as it is when a checkpoint is loaded."""
    head_dim = int(getattr(config, stack.config_head_dim, 0) or config.hidden_size // config.num_attention_heads)
    accepted = []
    for count in range(1, size + 1):
        candidate = copy.deepcopy(config)
        try:
            setattr(candidate, stack.config_heads, count * group.width // head_dim)
            if stack.config_kv_heads:
                setattr(candidate, stack.config_kv_heads, count)
            setattr(candidate, stack.config_head_dim, head_dim)
            type(candidate).from_dict(candidate.to_dict())
        except (ValueError, StrictDataclassError):
            continue
        accepted.append(count)
    return accepted
