"""Search spaces: which sub-networks of a model there are, each described by a few whole numbers.

Klein et al., "Structural Pruning of Pre-trained Language Models via Neural Architecture Search", TMLR 2024.

A *member* of a space is a dict of whole numbers, such as `{"num_layers": 4, "num_heads": 6, "num_units": 1024}`. In
an encoder-decoder each stack has parameters of its own: `"encoder.num_layers"`, `"decoder.num_layers"`. Heads are KV
groups under grouped-query attention, units are the neurons of feed-forward blocks.

A sub-network is what [`apply_mask`] makes of its mask: a block without heads or units still adds its output bias and
runs its norm, where the paper's code skips it. A layer with neither goes, norms and all. What a family can't lose
stays in every member: a stack keeps its first layer, and a block that must not be empty its first unit.
"""

import hashlib
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
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
        half = len(self.parameters) // 2
        return self.fit(
            {
                name: values[-1 if index >= half else 0] if self._is_bit(name) else values[(len(values) - 1) // 2]
                for index, (name, values) in enumerate(self.parameters.items())
            }
        )

    @property
    def smallest(self) -> Member:
        """One head and one unit in each layer, in as few layers as there may be."""
        return self.fit({name: max(values[0], min(values[-1], 1)) for name, values in self.parameters.items()})

    def sample(self, generator: torch.Generator) -> Member:
        """A member by chance, as the paper draws them for training: see the spaces. `generator` lives on the CPU.

        Under a budget a draw that costs too much is cut down by [`~SearchSpace.fit`].
        """
        return self.fit(self._sample(generator), generator)

    def _sample(self, generator: torch.Generator) -> Member:
        return {name: values[_below(len(values), generator)] for name, values in self.parameters.items()}

    def fit(self, member: Member, generator: torch.Generator | None = None) -> Member:
        """The member itself where it meets the budget, else one that does: all numbers are lowered alike.

        Args:
            member (`dict[str, int]`): Numbers within their ranges.
            generator (`torch.Generator`, *optional*): Which numbers round up, by chance. By default those of the
                first layers.
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
        """Whether a member costs at most the budget. Without one, all do."""
        if self._table is None:
            return True
        costs = self._table.of(self._mask(member))
        return all(costs[metric] <= limit for metric, limit in self.limits.items())

    def mask(self, member: Mapping[str, int]) -> PruningMask:
        """The mask of a member: what stays.

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
                keep[stack] = torch.tensor(
                    [
                        index in spec.fixed_layers
                        or any(g.name not in keep or bool(keep[g.name].any()) for g in groups)
                        for index in range(len(layers))
                        for groups in [self.units.of_layer(stack, index)]
                    ]
                )
            if not keep[stack].any():
                keep[stack][0] = True
            for index, groups in enumerate(layers):
                for group in groups:
                    vector = keep.setdefault(group.name, torch.ones(group.size, dtype=torch.bool))
                    if not keep[stack][index]:
                        vector[:] = False
                    elif group.kind not in spec.empty and not vector.any():
                        vector[0] = True
        return PruningMask(keep, self.units)

    # The space as a whole

    @property
    def size(self) -> int:
        """How many members there are, with a budget at most. Several may have the same mask."""
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

    def _is_bit(self, name: str) -> bool:
        return False

    def _groups(self) -> Iterator[tuple[str, UnitGroup]]:
        """All groups, each with the name of its parameters: `"decoder.cross_heads_2"`."""
        for stack, layers in self._layers.items():
            for index, groups in enumerate(layers):
                for group in groups:
                    cross = isinstance(group.block, AttentionSpec) and group.block.cross
                    kind = "cross_heads" if cross else {"heads": "heads", "neurons": "units"}[group.kind]
                    yield f"{self._prefix[stack]}{kind}_{index}", group


class SmallSpace(SearchSpace):
    """SMALL: the first layers, and in each of them equally many heads and units, the first.

    `num_layers` from 1, `num_heads` from 1 and `num_units` from 1; a decoder has as many heads for cross- as for
    self-attention. Sampled uniformly and independently. The paper also draws 0 layers, which no model can be saved
    with.
    """

    name = "small"

    def _parameters(self) -> dict[str, range]:
        found = {}
        for stack, layers in self._layers.items():
            spec, prefix = self.units.stacks[stack], self._prefix[stack]
            found[f"{prefix}num_layers"] = range(max((*spec.fixed_layers, 0)) + 1, len(layers) + 1)
            for kind, name in (("heads", "num_heads"), ("neurons", "num_units")):
                sizes = [group.size for groups in layers for group in groups if group.kind == kind]
                if sizes:
                    found[prefix + name] = range(1, max(sizes) + 1)
        return found

    def _keep(self, member: Member) -> dict[str, torch.Tensor]:
        keep = {}
        for stack, layers in self._layers.items():
            prefix = self._prefix[stack]
            keep[stack] = torch.arange(len(layers)) < member[f"{prefix}num_layers"]
            for group in itertools.chain(*layers):
                name = "num_heads" if group.kind == "heads" else "num_units"
                keep[group.name] = torch.arange(group.size) < member[prefix + name]
        return keep


class MediumSpace(SearchSpace):
    """MEDIUM: in each layer a number of heads and a number of units, the first: `num_heads_0`, `num_units_0`, ...

    From 0 where the family can do without, and a layer with neither is dropped. A decoder has `num_cross_heads_0` too.
    Sampled uniformly and independently.
    """

    name = "medium"

    def _parameters(self) -> dict[str, range]:
        return {
            _numbered(label): range(0 if g.kind in self.units.stacks[g.stack].empty else 1, g.size + 1)
            for label, g in self._groups()
        }

    def _keep(self, member: Member) -> dict[str, torch.Tensor]:
        return {g.name: torch.arange(g.size) < member[_numbered(label)] for label, g in self._groups()}


class LayerSpace(SearchSpace):
    """LAYER: any subset of the layers, whole: `layer_0`, ... are 1 where the layer stays.

    Layers that others need have no parameter; the member without any layer keeps the first. In each stack the number
    of layers is sampled uniformly from 1 to one less than all, and then that many by chance.
    """

    name = "layer"

    def _parameters(self) -> dict[str, range]:
        return {
            f"{self._prefix[stack]}layer_{index}": range(2)
            for stack, layers in self._layers.items()
            for index in range(len(layers))
            if index not in self.units.stacks[stack].fixed_layers
        }

    def _keep(self, member: Member) -> dict[str, torch.Tensor]:
        return {
            stack: torch.tensor(
                [bool(member.get(f"{self._prefix[stack]}layer_{index}", 1)) for index in range(len(layers))]
            )
            for stack, layers in self._layers.items()
        }

    def _is_bit(self, name: str) -> bool:
        return True

    @property
    def smallest(self) -> Member:
        """One layer in each stack, the first that bounds allow."""
        return self.fit(self._some(lambda free, least: free[:least]))

    def _sample(self, generator: torch.Generator) -> Member:
        return self._some(lambda free, least: _subset(free, least, generator))

    def _some(self, choose: Any) -> Member:
        """In each stack the layers that must stay, and those that `choose(free, least number)` returns."""
        member = {name: values[0] for name, values in self.parameters.items()}
        for stack, layers in self._layers.items():
            names = [f"{self._prefix[stack]}layer_{index}" for index in range(len(layers))]
            free = [name for name in names if len(self.parameters.get(name, ())) == 2]
            needed = any(self.parameters.get(name, range(1, 2))[0] for name in names)
            member.update(dict.fromkeys(choose(free, 0 if needed else 1), 1))
        return member


class LargeSpace(SearchSpace):
    """LARGE: any heads and units: `head_0_3`, `unit_0_17`, ... (layer, unit) are 1 where the unit stays.

    A layer without any is dropped. The number of units that go is sampled uniformly from 1 to one less than all, and
    then that many by chance.
    """

    name = "large"

    def _parameters(self) -> dict[str, range]:
        return {name: range(2) for names in self._names.values() for name in names}

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """For each group the parameters of its units."""
        names = {}
        for label, group in self._groups():
            kind, _, layer = label.rpartition("_")
            names[group.name] = [f"{kind.removesuffix('s')}_{layer}_{unit}" for unit in range(group.size)]
        return names

    def _keep(self, member: Member) -> dict[str, torch.Tensor]:
        return {group: torch.tensor([bool(member[n]) for n in names]) for group, names in self._names.items()}

    def _is_bit(self, name: str) -> bool:
        return True

    @property
    def smallest(self) -> Member:
        """One head and one unit in the first layer of each stack."""
        member = {name: values[0] for name, values in self.parameters.items()}
        names = self._names
        for layers in self._layers.values():
            first = [names[group.name][0] for group in layers[0]]
            member |= {name: self.parameters[name][-1] for name in first}
        return self.fit(member)

    def _sample(self, generator: torch.Generator) -> Member:
        free = [name for name, values in self.parameters.items() if len(values) == 2]
        member = {name: values[0] for name, values in self.parameters.items()}
        return member | dict.fromkeys(_subset(free, 1, generator), 1)


_SPACES: dict[str, type[SearchSpace]] = {cls.name: cls for cls in (SmallSpace, LayerSpace, MediumSpace, LargeSpace)}


def known_spaces() -> list[str]:
    """Names of the spaces: `"small"`, `"layer"`, `"medium"`, `"large"`."""
    return list(_SPACES)


def search_space(name: str, model: PreTrainedModel, **options: Any) -> SearchSpace:
    """The space of a name for a model.

    Args:
        name (`str`): `"small"`, `"layer"`, `"medium"` or `"large"`.
        model (`PreTrainedModel`): The super-network.
        options: See [`SearchSpace`].

    Raises:
        ConfigError: There is no such space, or see [`SearchSpace`].
    """
    if name not in _SPACES:
        raise ConfigError(unknown("search space", name, _SPACES))
    return _SPACES[name](model, **options)


def _numbered(label: str) -> str:
    """The parameter that counts the units of a group: `"decoder.heads_2"` -> `"decoder.num_heads_2"`."""
    stack, dot, rest = label.rpartition(".")
    return f"{stack}{dot}num_{rest}"


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _subset(names: list[str], least: int, generator: torch.Generator) -> list[str]:
    """At least `least` of the names, and not all; each number of them is as likely."""
    count = least + _below(max(len(names) - least, 1), generator)
    return [names[index] for index in torch.randperm(len(names), generator=generator)[:count].tolist()]


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
