"""Walk through a model block by block, and observe what goes into the projections of each.

For each block: one forward pass on its current inputs observes what goes into its projections, the visitor may change
them, and a second pass through the changed block gives the inputs of the next. Only one block has to be on the device
that computes; the hidden states between two blocks wait in CPU memory or on disk. The decoder of an encoder-decoder
follows the changed encoder.
"""

import itertools
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from tqdm import tqdm
from transformers import PreTrainedModel

from .calibration import Calibrator, select_real
from .gates import observe, replace_layers
from .matrices import Matrix
from .offload import execution_device, resident
from .processes import process_state
from .run_files import Filed, Shelf, fetched
from .units import PrunableUnits, base_model

Observation = Callable[[torch.Tensor], torch.Tensor]
Announce = Callable[[int], None]


class InputSum:
    """A sum over the tokens that go into a projection.

    Args:
        zeros (`torch.Tensor`): The sum over no tokens.

    Attributes:
        total (`torch.Tensor`): The sum.
        count (`torch.Tensor`): The number of tokens, float64 of shape ().
    """

    def __init__(self, zeros: torch.Tensor) -> None:
        self.total, self.count = zeros, torch.zeros((), dtype=torch.float64, device=zeros.device)

    def add(self, total: torch.Tensor, count: int) -> None:
        """Take the sum over some tokens.

        Args:
            total (`torch.Tensor`): The sum, in the shape of `total` so far.
            count (`int`): The number of tokens.
        """
        self.total += total
        self.count += count

    def sums(self) -> list[torch.Tensor]:
        """The tensors to reduce over processes."""
        return [self.total, self.count]


@dataclass(frozen=True)
class Block:
    """A layer of a stack, and the matrices in it that are pruned.

    Args:
        stack (`str`): The stack.
        layer (`int`): Index of the layer in its stack.
        matrices (`tuple[Matrix, ...]`): The matrices to prune. Empty where `exclude` keeps all of them.
    """

    stack: str
    layer: int
    matrices: tuple[Matrix, ...]


class _Stop(Exception):
    """All that was to be seen of a forward pass has been seen."""


class BlockWalk:
    """The way through the blocks of a model, with the sums that are observed in each.

    Args:
        model (`PreTrainedModel`): The model. Its weights may be offloaded.
        units ([`PrunableUnits`]): Its units.
        matrices (`list[Matrix]`): What to observe.
        calibrator ([`Calibrator`], *optional*): The data.
        observation (`Callable`, *optional*): What to add up over the inputs of a projection: (tokens, inputs) -> a
            tensor, zeros for no tokens. Without it, no data run through the model.
        changes (`bool`, *optional*, defaults to `True`): The weights of a block change while it is visited; what it
            then computes goes into the next. Without changes one pass through each block is enough.
        start (`int`, *optional*, defaults to 0): The first block in which something is observed.
        folder (`Path`, *optional*): Where to keep what the blocks read (hidden states, masks, what an encoder
            returned) instead of in CPU memory.
        announce (`Callable`, *optional*): Called before the first block runs, with the bytes of what the blocks read
            that this process keeps then.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: PrunableUnits,
        matrices: list[Matrix],
        calibrator: Calibrator | None,
        observation: Observation | None,
        *,
        changes: bool = True,
        start: int = 0,
        folder: Path | None = None,
        announce: Announce | None = None,
    ) -> None:
        self.announce = announce or (lambda size: None)
        self.units, self.base, self.calibrator = units, base_model(model), calibrator
        self.observation, self.changes, self.start, self.folder = observation, changes, start, folder
        every = [
            Block(stack, index, tuple(m for m in matrices if (m.stack, m.layer) == (stack, index)))
            for stack in units.stacks
            for index in range(len(self._layers(stack)))
        ]
        # Nothing reads what comes out of the last block.
        self.blocks = every[: 1 + max(position for position, block in enumerate(every) if block.matrices)]

    def _layers(self, stack: str) -> nn.ModuleList:
        layers = self.base.get_submodule(stack)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def layer(self, block: Block) -> nn.Module:
        """The layer of a block."""
        return self._layers(block.stack)[block.layer]

    def visit(self) -> Generator[tuple[Block, dict[str, InputSum]], None, None]:
        """Each block, with the sums over the inputs of its matrices by their names.

        Yields:
            [`Block`] and `dict[str, InputSum]`: A block, whose weights are on the device that computes and, with
            `changes`, may be changed until the next one is asked for; and the sums over all processes, empty where
            nothing is observed.

        Raises:
            CalibrationError: A sum is NaN or infinite, or the padding of its inputs can't be told apart; the message
                names the projection.
        """
        quiet = not process_state().is_main_process or None
        positions = tqdm(range(len(self.blocks)), desc="prune blocks", disable=quiet, leave=False)
        if self.observation is None or self.calibrator is None or self.start >= len(self.blocks):
            self.announce(0)
            for position in positions:
                block = self.blocks[position]
                with resident(self.layer(block), write=self.changes):
                    yield block, {}
            return
        with self.calibrator.evaluating():
            stream = _Stream(self.calibrator, self.base, Shelf(self.folder))
            for position in positions:
                block, followed = self.blocks[position], position + 1 < len(self.blocks)
                layer = self.layer(block)
                stream.enter(block)
                if position == 0:
                    self.announce(stream.shelf.nbytes)
                with resident(layer, write=self.changes):
                    sums: dict[str, InputSum] = {}
                    if position >= self.start and block.matrices:
                        sums = stream.observe(layer, block, self.observation, advance=not self.changes)
                    yield block, sums
                    if followed and (self.changes or not sums):
                        stream.advance(layer, block)


class _Stream:
    """The hidden states of all batches of this process, on their way through the blocks."""

    def __init__(self, calibrator: Calibrator, base: nn.Module, shelf: Shelf) -> None:
        self.calibrator, self.base, self.shelf = calibrator, base, shelf
        # By stack and batch; of finished stacks what their last layer returned.
        self.hidden: dict[str, dict[int, torch.Tensor | Filed]] = {}
        self.calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # by batch and layer: other arguments
        self.real: dict[str, list[torch.Tensor | None]] = {}
        self.first = 0  # the layer whose call is the first in `calls`
        self.gaps: set[tuple[str, int]] = set()  # layers that do not read what the layer below returned
        self.extras: dict[str, tuple[Any, ...] | None] = {}  # what layers return beyond hidden states, if constant

    @cached_property
    def encoder(self) -> str:
        """The stack whose tokens cross-attention reads."""
        return next(iter(self.calibrator.units.stacks))

    def enter(self, block: Block) -> None:
        """Find out how the layers of a stack are called, where that is not known yet, without running them."""
        stack, at = block.stack, block.layer
        if stack in self.hidden and (stack, at) not in self.gaps:
            return
        self.hidden.setdefault(stack, {})
        self.calls, self.first, self.real[stack] = [], at, []
        for index, batch in self.calibrator.batches(f"enter {stack}"):
            self.calls.append([])
            with ExitStack() as replaced:
                for other in self.hidden:
                    replaced.enter_context(
                        replace_layers(self.base, other, self._replacement(other, stack, at, index))
                    )
                try:
                    self.calibrator.forward(batch)
                except _Stop:
                    pass
            self.real[stack].append(self.calibrator.real_tokens(batch, stack))

    def _replacement(self, stack: str, entered: str, at: int, batch: int) -> Callable[..., Any]:
        """What runs in place of a layer: it hands hidden states on, and notes the calls of the entered stack."""
        count, names = len(list(self.base.get_submodule(stack).children())), itertools.count()
        kept = _Once(torch.Tensor, lambda value: self.shelf.put(f"argument-{batch}-{next(names)}", value))
        extras: tuple[Any, ...] | None = None
        last: torch.Tensor | None = None

        def layer(index: int, forward: Callable[..., Any], hidden: torch.Tensor, others: Any) -> Any:
            nonlocal extras, last
            if index == 0:
                extras = self._extras(stack, forward, hidden, others)
            if stack != entered or index < at:
                last = fetched(self.hidden[stack][batch]).to(hidden.device)
            else:
                if index == at:
                    self._keep(stack, batch, hidden)
                elif hidden is not last:
                    self.gaps.add((stack, index))
                self.calls[-1].append(tree_map(kept, others))
                last = hidden
                if index == count - 1:
                    raise _Stop
            return last if extras is None else (last, *extras)

        return layer

    def _extras(self, stack: str, forward: Callable[..., Any], hidden: torch.Tensor, others: Any) -> Any:
        """What the first layer returns beyond hidden states: in T5 the position bias of all layers."""
        if stack in self.extras:
            return self.extras[stack]
        output = forward(hidden, *others[0], **others[1])
        extras = output[1:] if isinstance(output, tuple) else None
        if not any(isinstance(extra, torch.Tensor) for extra in extras or ()):
            self.extras[stack] = extras
        return extras

    def observe(self, layer: nn.Module, block: Block, observation: Observation, advance: bool) -> dict[str, InputSum]:
        """Run all batches through a block and add up what goes into its projections."""
        device = execution_device(layer)
        sums = {m.name: InputSum(observation(torch.zeros(0, m.inputs, device=device))) for m in block.matrices}
        seen: list[str] = []
        final = None  # a projection after which there is nothing to see: what it computes is not needed
        for index in range(len(self.calls)):
            hidden = fetched(self.hidden[block.stack][index])
            real = {True: self.real[self.encoder][index], False: self.real[block.stack][index]}
            watch = _Watch(observation, sums, len(hidden), seen, None if advance else final)
            with observe(layer, {m.path: watch.feed(m, real[m.reads_encoder]) for m in block.matrices}):
                try:
                    output = self._call(layer, block, index, hidden)
                    if advance:
                        self._keep(block.stack, index, output)
                except _Stop:
                    pass
            if index == 0:
                down = self.calibrator.units.stacks[block.stack].feed_forward.output
                once = [m.name for m in block.matrices if m.path == down and seen.count(m.name) == 1]
                final = once[0] if once and seen[-1] == once[0] else None
        self.calibrator.reduce({m.module: sums[m.name] for m in block.matrices})
        return sums

    def advance(self, layer: nn.Module, block: Block) -> None:
        """Run all batches through a block."""
        for index in range(len(self.calls)):
            output = self._call(layer, block, index, fetched(self.hidden[block.stack][index]))
            self._keep(block.stack, index, output)

    def _keep(self, stack: str, batch: int, hidden: torch.Tensor) -> None:
        self.hidden[stack][batch] = self.shelf.put(f"{stack}-{batch}", hidden)

    def _call(self, layer: nn.Module, block: Block, index: int, hidden: torch.Tensor) -> torch.Tensor:
        device = execution_device(layer)
        moved = _Once(torch.Tensor | Filed, lambda kept: fetched(kept).to(device))
        args, kwargs = tree_map(moved, self.calls[index][block.layer - self.first])
        output = layer(hidden.to(device), *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


class _Once:
    """Changes objects of a kind; the same object once, so that what layers share stays shared."""

    def __init__(self, kind: Any, change: Callable[[Any], Any]) -> None:
        self.kind, self.change = kind, change
        self.known: dict[int, tuple[Any, Any]] = {}  # with the object itself, whose id would else be free again

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, self.kind):
            return value
        if id(value) not in self.known:
            self.known[id(value)] = value, self.change(value)
        return self.known[id(value)][1]


class _Watch:
    """Feeds the sums of a block in one forward pass."""

    def __init__(
        self, observation: Observation, sums: Mapping[str, InputSum], examples: int, seen: list[str], final: str | None
    ) -> None:
        self.observation, self.sums, self.examples = observation, sums, examples
        self.seen, self.final = seen, final
        self.last: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, int] | None = None

    def feed(self, matrix: Matrix, real: torch.Tensor | None) -> Callable[[torch.Tensor], None]:
        def feed(inputs: torch.Tensor) -> None:
            # Queries, keys and values read the same tensor, one after the other: it is observed once.
            if self.last is None or self.last[0] is not inputs or self.last[1] is not real:
                self.last = inputs, real, *self._observed(inputs, real, matrix.module)
            self.sums[matrix.name].add(*self.last[2:])
            self.seen.append(matrix.name)
            if matrix.name == self.final:
                raise _Stop

        return feed

    def _observed(self, inputs: torch.Tensor, real: torch.Tensor | None, name: str) -> tuple[torch.Tensor, int]:
        if inputs.dim() > 2 and len(inputs) == 1 and (real is None or inputs.shape[:2] != real.shape):
            # Not of an example but of all, such as relative positions: they count once for each.
            rows = select_real(inputs, None, name)
            return self.observation(rows) * self.examples, len(rows) * self.examples
        rows = select_real(inputs, real, name)
        return self.observation(rows), len(rows)
