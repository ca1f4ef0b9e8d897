"""What a search space is: sub-networks of a model, each described by a few whole numbers.

A *member* of a space is a dict of whole numbers, such as `{"num_layers": 4, "num_heads": 6, "num_units": 1024}`. In
an encoder-decoder each stack has parameters of its own: `"encoder.num_layers"`, `"decoder.num_layers"`. Heads are KV
groups under grouped-query attention, units are the neurons of feed-forward blocks.

A sub-network is what [`apply_mask`] makes of its mask: a block without heads or units still adds its output bias and
runs its norm, where the paper's code skips it. A layer with neither goes, norms and all. What a family can't lose
stays in every member: a stack keeps its first layer.
"""

import hashlib
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ..architectures import AttentionSpec
from ..costs import CostTable
from ..errors import ConfigError, unknown
from ..masks import PruningMask
from ..methods import Paper
from ..selection import check_floor, resolve_budget
from ..units import UnitGroup, prunable_units

PAPER = Paper(
    "Structural Pruning of Pre-trained Language Models via Neural Architecture Search",
    "TMLR 2024",
    "2405.02267",
    "Aaron Klein and Jacek Golebiowski and Xingchen Ma and Valerio Perrone and Cedric Archambeau",
)
Member = dict[str, int]
_LISTED = 1_000_000  # members that a space will list
_HALVINGS = 24


class SearchSpace(ABC):
    """The sub-networks that a search may find.

    Args:
        model (`PreTrainedModel`): The super-network.
        bounds (`dict[str, tuple[int, int]]`, *optional*): Narrower ranges of parameters, ends included, by name or
            shell pattern: `{"num_layers": (2, 6)}`, `{"num_heads_*": (4, 12)}`.
        budget (`dict[str, float]`, *optional*): The most that a member may cost, as for pruning: `{"params": 0.5}`.
            Members that cost more are no members.
        table ([`CostTable`], *optional*): The costs for the budget. Defaults to those at 128 tokens.

    Attributes:
        units ([`PrunableUnits`]): Units of the model.
        parameters (`dict[str, range]`): The values that each parameter may take, in the order of the forward pass.

    Raises:
        ConfigError: A bound names no parameter, is empty, or lies outside of the model; the model has nothing to
            search for; the budget is malformed.
        InfeasibleBudgetError: The smallest member costs more than the budget.
        UnsupportedModelError: The model can't be pruned.

    Examples:
        ```python
        >>> space = SmallSpace(model, bounds={"num_layers": (2, 6)})
        >>> space.size
        110592
        >>> hf_prune.apply_mask(model, space.mask({"num_layers": 4, "num_heads": 6, "num_units": 1024}))
        ```
    """

    name: ClassVar[str]
    bits: ClassVar[bool] = False  # whether all parameters are 0 or 1

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        bounds: Mapping[str, tuple[int, int]] | None = None,
        budget: Mapping[str, float] | None = None,
        table: CostTable | None = None,
    ) -> None:
        self.units = prunable_units(model)
        # Per stack, per layer: what a member can narrow. The prefix tells the stacks of an encoder-decoder apart.
        self._layers = {
            stack: [
                [g for g in self.units.of_layer(stack, index) if g.prunable and g.size]
                for index in range(self.units[stack].size)
            ]
            for stack in self.units.stacks
        }
        self._prefix = {s: f"{s.partition('.')[0]}." if len(self._layers) > 1 else "" for s in self._layers}
        self.parameters = _clipped(self._parameters(), bounds or {})
        if all(len(values) == 1 for values in self.parameters.values()):
            raise ConfigError(
                f"The space {self.name!r} of this {self.units.model_type} model has one member: there is nothing to "
                "search for."
            )
        self._table, self.limits = None, {}
        if budget is not None:
            self._table = table if table is not None else CostTable(model, self.units)
            self.limits = resolve_budget(budget, self._table.of())
            lowest = self._mask({name: values[0] for name, values in self.parameters.items()})
            check_floor(self._table, self.limits, self._table.of(lowest), f"the space {self.name!r}")

    @abstractmethod
    def _parameters(self) -> dict[str, range]:
        """The parameters, before bounds."""

    @abstractmethod
    def _keep(self, member: Member) -> dict[str, torch.Tensor]:
        """The mask, by unit group. A stack that is missing keeps the layers that keep a unit."""

    # Members

    @property
    def largest(self) -> Member:
        """The member with the highest numbers; under a budget the largest of its shape."""
        return self.fit({name: values[-1] for name, values in self.parameters.items()})

    @property
    def middle(self) -> Member:
        """The midpoint of all ranges; of parameters that are 0 or 1 the first half is 0."""
        if not self.bits:
            return self.fit({name: values[(len(values) - 1) // 2] for name, values in self.parameters.items()})
        half = len(self.parameters) // 2
        ends = enumerate(self.parameters.items())
        return self.fit({name: values[-1 if index >= half else 0] for index, (name, values) in ends})

    @property
    def smallest(self) -> Member:
        """One head and one unit in each layer, in as few layers as there may be."""
        return self.fit({name: max(values[0], min(values[-1], 1)) for name, values in self.parameters.items()})

    def sample(self, generator: torch.Generator) -> Member:
        """A member by chance, as the paper draws them for training: see the spaces.

        Under a budget a draw that costs too much is cut down by [`~SearchSpace.fit`].

        Args:
            generator (`torch.Generator`): On the CPU. The same seed gives the same members.
        """
        return self.fit(self._sample(generator), generator)

    def _sample(self, generator: torch.Generator) -> Member:
        return {name: values[below(len(values), generator)] for name, values in self.parameters.items()}

    def fit(self, member: Member, generator: torch.Generator | None = None) -> Member:
        """The member itself where it meets the budget, else one that does: all numbers are lowered alike.

        Args:
            member (`dict[str, int]`): Numbers within their ranges.
            generator (`torch.Generator`, *optional*): Which numbers round up, by chance. By default those of the
                first layers.

        Raises:
            ConfigError: A number is missing, unknown or out of range.
        """
        self._check(member)
        if self.meets_budget(member):
            return member
        count = len(self.parameters)
        up = torch.rand(count, generator=generator) if generator else 1 - torch.arange(1, count + 1) / (count + 1)
        ranges = list(zip(self.parameters.items(), up.tolist(), strict=True))

        def lowered(share: float) -> Member:
            return {
                name: values[int(share * (member[name] - values[0]) + chance)] for (name, values), chance in ranges
            }

        low, high = 0.0, 1.0  # the least member meets every budget
        for _ in range(_HALVINGS):
            share = (low + high) / 2
            low, high = (share, high) if self.meets_budget(lowered(share)) else (low, share)
        return lowered(low)

    def meets_budget(self, member: Member) -> bool:
        """Whether a member costs at most the budget. Without one, all do.

        Args:
            member (`dict[str, int]`): Numbers within their ranges: they are not checked.
        """
        if self._table is None:
            return True
        costs = self._table.of(self._mask(member))
        return all(costs[metric] <= limit for metric, limit in self.limits.items())

    def mask(self, member: Mapping[str, int]) -> PruningMask:
        """The mask of a member: what stays.

        Args:
            member (`dict[str, int]`): A number for each of `parameters`.

        Returns:
            [`PruningMask`]: For the units of the model. What the family can't lose stays, whatever the numbers say.

        Raises:
            ConfigError: A number is missing, unknown or out of range, or the member costs more than the budget.
        """
        member = dict(member)
        self._check(member)
        if not self.meets_budget(member):
            raise ConfigError(
                f"The sub-network {_shown(member)} costs more than the budget of the space: fit(member) lowers it."
            )
        return self._mask(member)

    def _check(self, member: Member) -> None:
        for name in member:
            if name not in self.parameters:
                raise ConfigError(unknown(f"parameter of the space {self.name!r}", name, self.parameters))
        for name, values in self.parameters.items():
            value = member.get(name)
            if type(value) is not int or value not in values:
                raise ConfigError(
                    f"{name} must be a whole number from {values[0]} to {values[-1]}, got {value!r}."
                    if name in member
                    else f"The sub-network {_shown(member)} lacks {name}, from {values[0]} to {values[-1]}."
                )

    def _mask(self, member: Member) -> PruningMask:
        keep = self._keep(member)
        for stack, layers in self._layers.items():
            spec = self.units.stacks[stack]
            if stack not in keep:
                used = [
                    any(g.name not in keep or bool(keep[g.name].any()) for g in self.units.of_layer(stack, index))
                    for index in range(len(layers))
                ]
                keep[stack] = torch.tensor([use or index in spec.fixed_layers for index, use in enumerate(used)])
            if not keep[stack].any():
                keep[stack][0] = True
            for index, groups in enumerate(layers):
                for group in groups:
                    vector = keep.setdefault(group.name, torch.ones(group.size, dtype=torch.bool))
                    if not keep[stack][index]:
                        vector[:] = False
        return PruningMask(keep, self.units)

    # The space as a whole

    @property
    def size(self) -> int:
        """How many members there are; at most, where there is a budget: those that it rules out are not counted off.

        Several may have the same mask.
        """
        return math.prod(len(values) for values in self.parameters.values())

    def __iter__(self) -> Iterator[Member]:
        if self.size > _LISTED:
            digits = int(self.size.bit_length() * math.log10(2))
            count = f"{self.size:,}" if digits < 16 else f"about 10^{digits}"
            raise ConfigError(
                f"The space {self.name!r} has {count} members, too many to list: draw some with sample(generator), or "
                "narrow it with bounds."
            )
        members = itertools.product(*self.parameters.values())
        return filter(self.meets_budget, (dict(zip(self.parameters, values, strict=True)) for values in members))

    def describe(self) -> dict[str, Any]:
        """JSON-serialisable: equal for equal spaces of equally shaped models, by which a stored search is known."""
        exact = {
            "groups": {group.name: group.size for group in self.units.values()},
            "parameters": {name: [values[0], values[-1]] for name, values in self.parameters.items()},
        }
        return {
            "space": self.name,
            "model_type": self.units.model_type,
            "parameters": len(self.parameters),
            "budget": dict(self.limits),
            "fingerprint": hashlib.sha256(json.dumps(exact).encode()).hexdigest()[:16],
        }

    def __repr__(self) -> str:
        shown = {name: f"{values[0]}..{values[-1]}" for name, values in self.parameters.items()}
        return f"{type(self).__name__}({_shown(shown)})"

    # For the spaces

    def _groups(self) -> Iterator[tuple[str, UnitGroup]]:
        """All groups, each with the name of its parameters: `"decoder.cross_heads_2"`."""
        for stack, layers in self._layers.items():
            for index, groups in enumerate(layers):
                for group in groups:
                    cross = isinstance(group.block, AttentionSpec) and group.block.cross
                    kind = "cross_heads" if cross else {"heads": "heads", "neurons": "units"}[group.kind]
                    yield f"{self._prefix[stack]}{kind}_{index}", group


def below(count: int, generator: torch.Generator) -> int:
    """A whole number from 0 to one less than `count`, each as likely."""
    return int(torch.randint(count, (), generator=generator))


def _clipped(parameters: dict[str, range], bounds: Mapping[str, tuple[int, int]]) -> dict[str, range]:
    clipped = dict(parameters)
    for pattern, bound in bounds.items():
        names = [name for name in parameters if fnmatchcase(name, pattern)]
        if not names:
            raise ConfigError(unknown("parameter in bounds", pattern, parameters, "Shell patterns work."))
        if not isinstance(bound, tuple | list) or len(bound) != 2 or not all(type(end) is int for end in bound):
            raise ConfigError(f"bounds[{pattern!r}] must be two whole numbers (low, high), got {bound!r}.")
        low, high = bound
        for name in names:
            values = parameters[name]
            if low > high:
                raise ConfigError(f"bounds[{pattern!r}] = ({low}, {high}) is empty: the first number is the lower.")
            if low not in values or high not in values:
                raise ConfigError(
                    f"bounds[{pattern!r}] = ({low}, {high}) is outside of the model: {name} is from {values[0]} to "
                    f"{values[-1]}."
                )
            both = range(max(low, clipped[name][0]), min(high, clipped[name][-1]) + 1)
            if not both:
                raise ConfigError(f"bounds contradict each other: ({low}, {high}) leaves no value for {name}.")
            clipped[name] = both
    return clipped


def _shown(member: Mapping[str, Any]) -> str:
    items = [f"{name}={value}" for name, value in itertools.islice(member.items(), 6)]
    return ", ".join(items) + (f", ... ({len(member)} numbers)" if len(member) > 6 else "")
