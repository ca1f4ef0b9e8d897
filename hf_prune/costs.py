"""What a model costs under a mask, without building it: MACs, parameters, bytes of weights, and milliseconds.

MACs are multiply-accumulates of one forward pass over one example of n tokens: for a head 4·n·d·d_h + 2·n²·d_h, for a
neuron 2·n·d (3·n·d if gated), generalised to KV groups, cross-attention and relative positions. Embeddings, norms,
biases, activations, softmax and task heads are left out, as in Kwon et al. 2022, KCM and K-prune, so that ratios agree
with the papers. Parameters, bytes and milliseconds are of the whole model, embeddings and head included; the last come
from a [`LatencyTable`].
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from .architectures import AttentionSpec, FeedForwardSpec
from .errors import ConfigError
from .gates import current_mask
from .latency import LatencyTable
from .masks import PruningMask
from .surgery import present_inputs
from .timing import DEFAULT_LENGTH
from .units import Projection, PrunableUnits, UnitGroup, base_model, features, head_counts, projection, prunable_units

Metric = Literal["macs", "params", "memory", "latency"]
METRICS: tuple[Metric, ...] = ("macs", "params", "memory", "latency")


@dataclass(frozen=True)
class Costs:
    """Costs of a model.

    Args:
        macs (`float`): Multiply-accumulates of one forward pass over one example.
        params (`int`): Parameters, shared ones once.
        memory (`int`): Bytes of the parameters in their dtypes.
        latency (`float`): Milliseconds of one forward pass over a batch. 0 where there is no table of them.
    """

    macs: float = 0.0
    params: float = 0
    memory: float = 0
    latency: float = 0.0

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            self.macs + other.macs,
            self.params + other.params,
            self.memory + other.memory,
            self.latency + other.latency,
        )

    def __mul__(self, times: float) -> "Costs":
        return Costs(self.macs * times, self.params * times, self.memory * times, self.latency * times)

    def __sub__(self, other: "Costs") -> "Costs":
        return self + other * -1

    def __getitem__(self, metric: Metric) -> float:
        return float(getattr(self, metric))

    def to_dict(self) -> dict[str, float]:
        """As a dict with the metrics for keys; without latency, where there is no table of it."""
        return {metric: cost for metric, cost in asdict(self).items() if cost or metric != "latency"}


class CostTable:
    """The costs of a model, split so that those of any mask are a sum.

    Args:
        model (`PreTrainedModel`): The model, shrunk or not.
        units ([`PrunableUnits`], *optional*): Its units.
        sequence_length (`float`, *optional*, defaults to 128): Tokens per example, n. The stacks of ViT and of
            Whisper's encoder have a length of their own.
        target_length (`float`, *optional*): Tokens per example of a decoder that follows an encoder. Defaults to
            `sequence_length`.
        latency ([`LatencyTable`], *optional*): Its latency, for the costs to have one.

    Attributes:
        unit (`dict[str, Costs]`): For each group of heads or neurons the cost of one unit. Its latency is a mean: see
            [`~CostTable.several`].
        layer (`dict[str, list[Costs]]`): For each stack what each layer costs without its units (norms, output
            biases).
        rest (`Costs`): Everything else (embeddings, head).
        lengths (`dict[str, float]`): For each stack its n.

    Raises:
        ConfigError: A length is not positive, or the table of latency is for another model.
        UnsupportedModelError: The family is unknown, or the model can't be pruned.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: PrunableUnits | None = None,
        *,
        sequence_length: float = DEFAULT_LENGTH,
        target_length: float | None = None,
        latency: LatencyTable | None = None,
    ) -> None:
        for name, length in (("sequence_length", sequence_length), ("target_length", target_length)):
            if length is not None and not 0 < length < float("inf"):
                raise ConfigError(f"{name} must be a positive number of tokens, got {length!r}.")
        self.units = units if units is not None else prunable_units(model)
        if latency is not None and not latency.fits(self.units):
            raise ConfigError("The table of latency is for another model: measure this one with latency_table(model).")
        self.latency = latency
        base = base_model(model)
        self.lengths: dict[str, float] = {}
        for name, stack in self.units.stacks.items():
            own = stack.fixed_length(model.config) if stack.fixed_length else None
            asked = target_length if stack.decoder and target_length is not None else sequence_length
            self.lengths[name] = float(own if own is not None else asked)
        source = next(iter(self.lengths.values()))

        self.unit: dict[str, Costs] = {}
        self.layer: dict[str, list[Costs]] = {}
        for name in self.units.stacks:
            layers = base.get_submodule(name)
            assert isinstance(layers, nn.ModuleList)
            self.layer[name] = []
            for index, layer in enumerate(layers):
                groups = self.units.of_layer(name, index)
                for group in groups:
                    self.unit[group.name] = _unit_costs(layer, group, self.lengths[name], source)
                    if latency is not None and group.name in latency.units:
                        mean = float(latency.units[group.name][-1]) / group.size
                        self.unit[group.name] += Costs(latency=mean)
                whole = _parameter_costs(layer.parameters())
                if latency is not None:
                    whole += Costs(latency=latency.layers[name][index])
                inside = sum((_without_macs(self.several(g.name, g.size)) for g in groups), Costs())
                self.layer[name].append(whole - inside)
        layers_cost = sum((_parameter_costs(base.get_submodule(name).parameters()) for name in self.layer), Costs())
        self.rest = _parameter_costs(model.parameters()) - layers_cost
        if latency is not None:
            self.rest += Costs(latency=latency.rest)

    def several(self, name: str, count: int) -> Costs:
        """What `count` units of a group cost. Only their latency is not proportional to their number.

        Args:
            name (`str`): The group of heads or neurons.
            count (`int`): How many of its units, from 0 to all.

        Returns:
            [`Costs`]: Without what the layer costs anyway.
        """
        costs = self.unit[name] * count
        if self.latency is None or name not in self.latency.units:
            return costs
        return replace(costs, latency=float(self.latency.units[name][count]))

    def of(self, mask: PruningMask | None = None) -> Costs:
        """The costs of the model that `mask` leaves; without one, of the whole model.

        Args:
            mask ([`PruningMask`], *optional*): What stays, for these units: it is not checked.

        Returns:
            [`Costs`]: Of all layers that stay, and the rest of the model.
        """
        total = self.rest
        for stack, layers in self.layer.items():
            for index, fixed in enumerate(layers):
                if mask is None or mask[stack][index]:
                    total = total + fixed
                    for group in self.units.of_layer(stack, index):
                        kept = group.size if mask is None else int(mask[group.name].sum())
                        total = total + self.several(group.name, kept)
        return total


def model_costs(
    model: PreTrainedModel,
    mask: PruningMask | None = None,
    *,
    sequence_length: float = DEFAULT_LENGTH,
    target_length: float | None = None,
) -> Costs:
    """What a model costs under a mask.

    Args:
        model (`PreTrainedModel`): The model, shrunk or not.
        mask ([`PruningMask`], *optional*): Defaults to the one that the model carries.
        sequence_length, target_length (`float`, *optional*): Tokens per example, see [`CostTable`].

    Returns:
        [`Costs`]: Without latency: that takes a [`CostTable`] with a [`LatencyTable`].

    Raises:
        UnsupportedModelError: The family is unknown.
        MaskError: The mask is for another model.
        ConfigError: A length is not positive.
    """
    table = CostTable(model, sequence_length=sequence_length, target_length=target_length)
    if mask is not None:
        mask.check(table.units)
    return table.of(mask if mask is not None else current_mask(model))


def _parameter_costs(parameters: Iterable[nn.Parameter]) -> Costs:
    listed = list(parameters)
    return Costs(0.0, sum(p.numel() for p in listed), sum(p.numel() * p.element_size() for p in listed))


def _without_macs(costs: Costs) -> Costs:
    return replace(costs, macs=0.0)


def _unit_costs(layer: nn.Module, group: UnitGroup, length: float, source: float) -> Costs:
    """One unit: its rows in the input projections, its columns in the output one, and its part of the attention."""
    if isinstance(group.block, AttentionSpec):
        return _head_costs(layer, group.block, length, source if group.block.cross else length)
    assert isinstance(group.block, FeedForwardSpec)
    rows = 2 if group.block.fused_gate else 1
    inputs = [_slice(projection(layer, name), length, outputs=rows) for name in present_inputs(layer, group.block)]
    return sum(inputs, _slice(projection(layer, group.block.output), length, inputs=1))


def _head_costs(layer: nn.Module, spec: AttentionSpec, length: float, source: float) -> Costs:
    queries, keys, size = head_counts(layer, spec)
    if not keys:
        return Costs()
    attention = layer.get_submodule(spec.module)
    part = partial(projection, attention)
    wide = queries // keys * size  # query columns of one KV group
    total = _slice(projection(layer, spec.output), length, inputs=wide)
    if spec.fused:
        total += _slice(part(spec.fused), length, outputs=wide + 2 * size)
    else:
        total += _slice(part(spec.query), length, outputs=wide)
        total += _slice(part(spec.key), source, outputs=size) + _slice(part(spec.value), source, outputs=size)
        total += sum((_slice(part(name), 0, outputs=wide) for name in spec.extra if hasattr(attention, name)), Costs())
    macs = 2 * length * source * wide
    if spec.relative_rows is not None:
        projected, met = spec.relative_rows(attention)
        macs += projected * features(part(spec.query))[0] * wide + length * met * wide
    return total + Costs(macs)


def _slice(module: Projection, tokens: float, *, inputs: int | None = None, outputs: int | None = None) -> Costs:
    """Some inputs, or some outputs with their biases, of a projection that is applied to `tokens`."""
    total_in, total_out = features(module)
    weights = (inputs if inputs is not None else total_in) * (outputs if outputs is not None else total_out)
    costs = Costs(tokens * weights, weights, weights * module.weight.element_size())
    if outputs is not None and module.bias is not None:
        costs += Costs(0.0, outputs, outputs * module.bias.element_size())
    return costs
