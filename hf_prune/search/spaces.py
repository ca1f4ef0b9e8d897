"""The four search spaces of the paper.

Klein et al., "Structural Pruning of Pre-trained Language Models via Neural Architecture Search", TMLR 2024.
"""

import itertools
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ConfigError, unknown
from .base import Member, SearchSpace, below


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

    From 0, and a layer with neither is dropped. A decoder has `num_cross_heads_0` too.
    Sampled uniformly and independently.
    """

    name = "medium"

    def _parameters(self) -> dict[str, range]:
        return {_numbered(label): range(g.size + 1) for label, g in self._groups()}

    def _keep(self, member: Member) -> dict[str, torch.Tensor]:
        return {g.name: torch.arange(g.size) < member[_numbered(label)] for label, g in self._groups()}


class LayerSpace(SearchSpace):
    """LAYER: any subset of the layers, whole: `layer_0`, ... are 1 where the layer stays.

    Layers that others need have no parameter; the member without any layer keeps the first. In each stack the number
    of layers is sampled uniformly from 1 to one less than all, and then that many by chance.
    """

    name = "layer"
    bits = True

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

    @property
    def smallest(self) -> Member:
        """One layer in each stack, the first that bounds allow."""
        return self.fit(self._some(lambda free, least: free[:least]))

    def _sample(self, generator: torch.Generator) -> Member:
        return self._some(lambda free, least: _subset(free, least, generator))

    def _some(self, choose: Callable[[list[str], int], list[str]]) -> Member:
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
    bits = True

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
        options: See [`SearchSpace`]: `bounds`, `budget`, `table`.

    Returns:
        [`SmallSpace`], [`LayerSpace`], [`MediumSpace`] or [`LargeSpace`].

    Raises:
        ConfigError: There is no such space, or see [`SearchSpace`].
        InfeasibleBudgetError, UnsupportedModelError: See [`SearchSpace`].
    """
    if name not in _SPACES:
        raise ConfigError(unknown("search space", name, _SPACES))
    return _SPACES[name](model, **options)


def _numbered(label: str) -> str:
    """The parameter that counts the units of a group: `"decoder.heads_2"` -> `"decoder.num_heads_2"`."""
    stack, dot, rest = label.rpartition(".")
    return f"{stack}{dot}num_{rest}"


def _subset(names: list[str], least: int, generator: torch.Generator) -> list[str]:
    """At least `least` of the names, and not all; each number of them is as likely."""
    count = least + below(max(len(names) - least, 1), generator)
    return [names[index] for index in torch.randperm(len(names), generator=generator)[:count].tolist()]
