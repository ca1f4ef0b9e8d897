"""Time the layers of a model, whole and cut, in its own forward passes."""

import copy
import inspect
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .architectures import AttentionSpec, FeedForwardSpec
from .gates import observe
from .surgery import cut_heads, cut_neurons
from .units import PrunableUnits, base_model

_POINTS = 8  # measured numbers of units between none and all
_SECONDS = 10.0  # what a measurement should take
_LEAST, _MOST = 5, 20  # rounds

Place: TypeAlias = tuple[str, int]  # stack and index of a layer
Point: TypeAlias = tuple[str, int]  # name of a group, and how many of its units are left


def described(root: nn.Module) -> list[Any]:
    """What the time of a module depends on: kinds, numbers and shapes of all its parts."""

    def plain(module: nn.Module) -> list[tuple[str, Any]]:
        return [
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, int | float | str) and key not in ("training", "layer_idx") and key[0] != "_"
        ]

    modules = [(name, type(module).__name__, plain(module)) for name, module in root.named_modules()]
    return [*modules, *((name, tuple(parameter.shape)) for name, parameter in root.named_parameters())]


def equal_layers(base: nn.Module, units: PrunableUnits) -> list[list[Place]]:
    """Layers that do the same work, together: equal modules, shapes and numbers.

    Args:
        base (`nn.Module`): The base model.
        units ([`PrunableUnits`]): Its units, which name its stacks.

    Returns:
        `list[list[Place]]`: The classes, each with the (stack, index) of its layers, in the order of the forward pass.
        Layers of two stacks are never of one class.
    """
    classes: dict[str, list[Place]] = {}
    for stack, layers in _stacks(base, units.stacks).items():
        for index, layer in enumerate(layers):
            classes.setdefault(repr((stack, described(layer))), []).append((stack, index))
    return list(classes.values())


def _stacks(base: nn.Module, names: Iterable[str]) -> dict[str, nn.ModuleList]:
    stacks = {}
    for name in names:
        layers = base.get_submodule(name)
        assert isinstance(layers, nn.ModuleList)
        stacks[name] = layers
    return stacks


def cut_copies(base: nn.Module, units: PrunableUnits, place: Place, multiple: int) -> dict[Point, nn.Module]:
    """Copies of a layer, each with other numbers of units in one block; all other weights are those of the layer.

    Args:
        base (`nn.Module`): The base model.
        units ([`PrunableUnits`]): Its units.
        place (`Place`): (stack, index) of the layer.
        multiple (`int`): Numbers of neurons are multiples of this, but for the fewest and all of them.

    Returns:
        `dict[Point, nn.Module]`: By (name of a group, number of units that it keeps) the copy: for each prunable group
        at most nine numbers, evenly spaced, from the fewest that the family runs with (0 or 1) to all.
    """
    stack, index = place
    layer = base.get_submodule(f"{stack}.{index}")
    copies = {}
    for group in units.of_layer(stack, index):
        if not group.prunable or not group.size:
            continue
        step = multiple if group.kind == "neurons" else 1
        counts = {-(-group.size * i // (_POINTS * step)) * step for i in range(_POINTS)} | {group.size}
        for count in sorted(count for count in counts if count <= group.size):
            small = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
            keep = torch.arange(group.size) < count
            if isinstance(group.block, AttentionSpec):
                cut_heads(small, group.block, keep)
            elif isinstance(group.block, FeedForwardSpec):
                cut_neurons(small, group.block, keep)
            copies[group.name, count] = small
    return copies


def interleave(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    classes: list[list[Place]],
    copies: list[dict[Point, nn.Module]],
) -> tuple[float, float, tuple[list[float], list[dict[Point, float]]]]:
    """Time the whole model, what lies outside of its layers, and for each class a whole layer and its copies.

    In each round every copy runs once, at a place of its class among whole layers; places and order are random, with a
    fixed seed. All times are the lower quartile over the rounds, in milliseconds.

    Args:
        model (`PreTrainedModel`): The model, in evaluation mode.
        inputs (`dict[str, torch.Tensor]`): What it is called with.
        classes (`list[list[Place]]`): What [`equal_layers`] returned.
        copies (`list[dict[Point, nn.Module]]`): For each class what [`cut_copies`] returned for one of its layers.

    Returns:
        The whole model, what lies outside of its layers, and, in the order of the classes, a list with the whole
        layers and one with a dict of the copies.
    """
    base, rng = base_model(model), random.Random(0)
    places = [place for own in classes for place in own]
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = {**inputs, "use_cache": False}  # type: ignore[dict-item]
    totals: list[float] = []
    rests: list[float] = []
    whole: list[list[float]] = [[] for _ in classes]
    cut: list[dict[Point, list[float]]] = [{point: [] for point in own} for own in copies]
    with torch.inference_mode():
        ms = min(_clocked(model, inputs, [])[0] for _ in range(3))
        passes = max(-(-(len(own) + 1) // len(at)) for own, at in zip(copies, classes, strict=True))
        rounds = min(max(int(1e3 * _SECONDS / (ms * (passes + 1))), _LEAST), _MOST)
        for number in tqdm(range(-1, rounds), desc="Latency table", leave=False, disable=None):
            queues: list[list[Point | None]] = [[*own, None] for own in copies]  # None: a whole layer
            for queue in queues:
                rng.shuffle(queue)
            for _ in range(passes):
                chosen: dict[Place, tuple[int, Point | None]] = {}
                for index, at in enumerate(classes):
                    for place in rng.sample(at, len(at)):
                        chosen[place] = index, queues[index].pop() if queues[index] else None
                with _swapped(base, {p: copies[i][point] for p, (i, point) in chosen.items() if point}):
                    total, layers = _clocked(model, inputs, places)
                if number >= 0:  # the first round warms up
                    rests.append(total - sum(layers.values()))
                    for place, (index, point) in chosen.items():
                        (cut[index][point] if point else whole[index]).append(layers[place])
            total, _ = _clocked(model, inputs, [])
            if number >= 0:
                totals.append(total)

    def typical(samples: list[float]) -> float:
        return float(np.quantile(samples, 0.25))  # what else the machine does only ever adds to a time

    times = [typical(own) for own in whole], [{point: typical(t) for point, t in own.items()} for own in cut]
    return typical(totals), typical(rests), times


@contextmanager
def _swapped(base: nn.Module, layers: Mapping[Place, nn.Module]) -> Iterator[None]:
    """Within the context, other layers are in the place of those of a model."""
    stacks = _stacks(base, {stack for stack, _ in layers})
    own = {(stack, index): stacks[stack][index] for stack, index in layers}
    try:
        for (stack, index), layer in layers.items():
            stacks[stack][index] = layer
        yield
    finally:
        for (stack, index), layer in own.items():
            stacks[stack][index] = layer


def _clocked(
    model: PreTrainedModel, inputs: Mapping[str, Any], places: Iterable[Place]
) -> tuple[float, dict[Place, float]]:
    """Milliseconds of a forward pass, and of some layers in it."""
    device = model.device
    marks: dict[tuple[Place, str], Any] = {}

    def mark(place: Place, side: str) -> Callable[[torch.Tensor], None]:
        return lambda _: marks.update({(place, side): _now(device)})

    names = {f"{stack}.{index}": (stack, index) for stack, index in places}
    before = {name: mark(place, "before") for name, place in names.items()}
    after = {name: mark(place, "after") for name, place in names.items()}
    with observe(base_model(model), before, after):
        start = _now(device)
        model(**inputs)
        end = _now(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return _ms(start, end), {place: _ms(marks[place, "before"], marks[place, "after"]) for place in names.values()}


def _now(device: torch.device) -> Any:
    if device.type != "cpu":  # it works off a queue, and reaches an event when the work before it is done
        event = torch.Event(device=device, enable_timing=True)
        event.record()
        return event
    # One thread alone can tell its own work from the time in which the core served others.
    return time.thread_time() if torch.get_num_threads() == 1 and os.name == "posix" else time.perf_counter()


def _ms(start: Any, end: Any) -> float:
    return 1e3 * (end - start) if isinstance(start, float) else float(start.elapsed_time(end))
