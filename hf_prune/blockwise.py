"""Zero single weights, one transformer block after the other (the procedure of SparseGPT and Wanda).

For each block: one forward pass on its current inputs observes what goes into its projections, all are pruned, and a
second pass through the pruned block gives the inputs of the next. Only one block has to be on the device that
computes; the hidden states between two blocks wait in CPU memory or on disk. The decoder of an encoder-decoder follows
the pruned encoder.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_map
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .calibration import Calibrator, process_state, select_real
from .errors import CalibrationError, ConfigError, UnsupportedModelError, unknown
from .gates import observe, replace_layers
from .offload import execution_device, is_offloaded, resident
from .units import PrunableUnits, base_model, features
from .weight_masks import WeightMask, pack, unpack

logger = logging.get_logger(__name__)

Observation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a projection inside a block.

    Args:
        name (`str`): Its name in `model.named_parameters()`.
        stack, layer (`str`, `int`): The block.
        path (`str`): The projection, relative to the block.
        inputs, outputs (`int`): Its features.
        transposed (`bool`): The parameter is stored as (inputs, outputs), as `Conv1D` does.
        reads_encoder (`bool`): Its inputs are the encoder's tokens: keys and values of cross-attention.
    """

    name: str
    stack: str
    layer: int
    path: str
    inputs: int
    outputs: int
    transposed: bool
    reads_encoder: bool

    @property
    def module(self) -> str:
        """The name of the projection in the model."""
        return self.name.removesuffix(".weight")

    def of(self, model: nn.Module) -> torch.Tensor:
        """The matrix as (outputs, inputs): a view of the parameter's data."""
        weight = model.get_parameter(self.name).data
        return weight.T if self.transposed else weight


def weight_matrices(model: PreTrainedModel, units: PrunableUnits, exclude: tuple[str, ...] = ()) -> list[Matrix]:
    """The weights of all `nn.Linear` and `Conv1D` inside the blocks of a model, in the order of the forward pass.

    Args:
        model (`PreTrainedModel`): The model.
        units ([`PrunableUnits`]): Its units, whose stacks are the blocks. Embeddings and head lie outside.
        exclude (`tuple[str, ...]`, *optional*): Shell patterns of parameters or projections to leave out, such as
            `"model.layers.0.*"` or, relative to the base model, `"layers.*.mlp.down_proj"`.

    Raises:
        ConfigError: A pattern matches nothing, or all is excluded.
        UnsupportedModelError: One of the weights is shared with another module.
    """
    base = base_model(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    found, names = [], []
    hits = {pattern: False for pattern in exclude}
    for stack, spec in units.stacks.items():
        encoder = {f"{b.module}.{path}" for b in spec.attention if b.cross for path in (b.key, b.value)}
        for index, layer in base.get_submodule(stack).named_children():
            for path, module in layer.named_modules():
                if not isinstance(module, nn.Linear | Conv1D):
                    continue
                name = f"{prefix}{stack}.{index}.{path}.weight"
                short = f"{stack}.{index}.{path}"
                names.append(f"{prefix}{short}")
                matching = [p for p in exclude if any(fnmatchcase(n, p) for n in (name, names[-1], short))]
                hits |= dict.fromkeys(matching, True)
                if matching:
                    continue
                sharing = owners[id(module.weight)]
                if len(sharing) > 1:
                    raise UnsupportedModelError(
                        f"{' and '.join(sharing)} share one weight, which would be pruned for the inputs of one of "
                        "them: untie them, or exclude it."
                    )
                inputs, outputs = features(module)
                conv = isinstance(module, Conv1D)
                found.append(Matrix(name, stack, int(index), path, inputs, outputs, conv, path in encoder))
    for pattern, hit in hits.items():
        if not hit:
            raise ConfigError(
                unknown("pattern in exclude", pattern, names, "Shell patterns such as 'layers.0.*' work.")
            )
    if not found:
        raise ConfigError("There is nothing left to prune: exclude fewer projections.")
    return found


class InputSum:
    """A sum over the tokens that go into a projection.

    Attributes:
        total (`torch.Tensor`): The sum.
        count (`torch.Tensor`): The number of tokens, of shape ().
    """

    def __init__(self, zeros: torch.Tensor) -> None:
        self.total, self.count = zeros, torch.zeros((), dtype=torch.float64, device=zeros.device)

    def add(self, total: torch.Tensor, count: int) -> None:
        """Take the sum over some tokens."""
        self.total += total
        self.count += count

    def sums(self) -> list[torch.Tensor]:
        """The tensors to reduce over processes."""
        return [self.total, self.count]


@dataclass(frozen=True)
class Block:
    """A layer of a stack, and the matrices in it that are pruned."""

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
        folder (`str`, *optional*): Where to keep the hidden states instead of in CPU memory.

    Attributes:
        hidden_bytes (`int`): Size of the hidden states of this process, from the first visit on.
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
        folder: str | None = None,
    ) -> None:
        self.units, self.base, self.calibrator = units, base_model(model), calibrator
        self.observation, self.changes, self.start, self.folder = observation, changes, start, folder
        every = [
            Block(stack, index, tuple(m for m in matrices if (m.stack, m.layer) == (stack, index)))
            for stack in units.stacks
            for index in range(len(self._layers(stack)))
        ]
        # Nothing reads what comes out of the last block.
        self.blocks = every[: 1 + max(position for position, block in enumerate(every) if block.matrices)]
        self.hidden_bytes = 0

    def _layers(self, stack: str) -> nn.ModuleList:
        layers = self.base.get_submodule(stack)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def visit(self) -> Generator[tuple[Block, dict[str, InputSum]], None, None]:
        """Each block, with the sums over the inputs of its matrices by their names.

        Raises:
            CalibrationError: A sum is NaN or infinite; the message names the projection.
        """
        quiet = not process_state().is_main_process or None
        positions = tqdm(range(len(self.blocks)), desc="prune blocks", disable=quiet, leave=False)
        if self.observation is None or self.calibrator is None or self.start >= len(self.blocks):
            for position in positions:
                block = self.blocks[position]
                with resident(self._layers(block.stack)[block.layer], write=self.changes):
                    yield block, {}
            return
        with self.calibrator.evaluating(), ExitStack() as stack:
            folder = None
            if self.folder is not None:
                os.makedirs(self.folder, exist_ok=True)
                folder = stack.enter_context(tempfile.TemporaryDirectory(dir=self.folder))
            stream = _Stream(self.calibrator, self.base, folder)
            for position in positions:
                block, followed = self.blocks[position], position + 1 < len(self.blocks)
                layer = self._layers(block.stack)[block.layer]
                stream.enter(block)
                self.hidden_bytes = self.hidden_bytes or stream.hidden[block.stack].nbytes
                with resident(layer, write=self.changes):
                    sums: dict[str, InputSum] = {}
                    if position >= self.start and block.matrices:
                        sums = stream.observe(layer, block, self.observation, advance=not self.changes)
                    yield block, sums
                    if followed and (self.changes or not sums):
                        stream.advance(layer, block)


class _Stream:
    """The hidden states of all batches of this process, on their way through the blocks."""

    def __init__(self, calibrator: Calibrator, base: nn.Module, folder: str | None) -> None:
        self.calibrator, self.base = calibrator, base
        self.hidden: dict[str, _Activations] = {}  # by stack; of finished stacks what their last layer returned
        self.folder = folder
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
        self.hidden.setdefault(stack, _Activations(self.folder, stack))
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
        count, moved = len(list(self.base.get_submodule(stack).children())), _Moved("cpu")
        extras: tuple[Any, ...] | None = None
        last: torch.Tensor | None = None

        def layer(index: int, forward: Callable[..., Any], hidden: torch.Tensor, others: Any) -> Any:
            nonlocal extras, last
            if index == 0:
                extras = self._extras(stack, forward, hidden, others)
            if stack != entered or index < at:
                last = self.hidden[stack][batch].to(hidden.device)
            else:
                if index == at:
                    self.hidden[stack][batch] = hidden
                elif hidden is not last:
                    self.gaps.add((stack, index))
                self.calls[-1].append(tree_map(moved, others))
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
            hidden = self.hidden[block.stack][index]
            real = {True: self.real[self.encoder][index], False: self.real[block.stack][index]}
            watch = _Watch(observation, sums, len(hidden), seen, None if advance else final)
            with observe(layer, {m.path: watch.feed(m, real[m.reads_encoder]) for m in block.matrices}):
                try:
                    output = self._call(layer, block, index, hidden)
                    if advance:
                        self.hidden[block.stack][index] = output
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
            self.hidden[block.stack][index] = self._call(layer, block, index, self.hidden[block.stack][index])

    def _call(self, layer: nn.Module, block: Block, index: int, hidden: torch.Tensor) -> torch.Tensor:
        moved = _Moved(execution_device(layer))
        args, kwargs = tree_map(moved, self.calls[index][block.layer - self.first])
        output = layer(moved(hidden), *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


class _Moved:
    """Moves tensors to a device; the same tensor once, so that what layers share stays shared."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = device
        self.known: dict[int, tuple[Any, torch.Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self.known:
            self.known[id(value)] = value, value.to(self.device)
        return self.known[id(value)][1]


class _Activations:
    """Hidden states by the index of their batch, in CPU memory or in files."""

    def __init__(self, folder: str | None, stack: str) -> None:
        self.folder, self.stack = folder, stack
        self.kept: dict[int, torch.Tensor] = {}
        self.nbytes = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.kept[index] if self.folder is None else load_file(self._path(index))["hidden"]

    def __setitem__(self, index: int, hidden: torch.Tensor) -> None:
        self.nbytes += hidden.nbytes
        if self.folder is None:
            self.kept[index] = hidden.to("cpu")
        else:
            save_file({"hidden": hidden.contiguous()}, self._path(index))

    def _path(self, index: int) -> str:
        return os.path.join(str(self.folder), f"{self.stack}-{index}.safetensors")


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


def prune_blocks(
    model: PreTrainedModel,
    walk: BlockWalk,
    solve: Callable[[Matrix, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]],
    checkpoints: "Checkpoints | None" = None,
) -> tuple[WeightMask, list[dict[str, Any]]]:
    """Prune all matrices of a walk, in place.

    Args:
        model (`PreTrainedModel`): The model.
        walk ([`BlockWalk`]): The way through it, from the first block that no checkpoint holds.
        solve (`Callable`): Given a matrix, its weight as (outputs, inputs) and what was observed, which weights stay
            (a bool tensor of the same shape) and the weight to zero the others in: the given one, or a new one.
        checkpoints ([`Checkpoints`], *optional*): Where finished blocks are kept.

    Returns:
        [`WeightMask`], and for each matrix a row of a report.

    After an error the weights are as they were. Those of an offloaded model would not fit twice into memory: the log
    says how many blocks are pruned already.
    """
    bits: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    rows: list[dict[str, Any]] = []
    undo: dict[Matrix, tuple[torch.Tensor, torch.Tensor]] = {}  # where a matrix changes, packed, and what was there
    offloaded, started, done = is_offloaded(model), False, 0
    try:
        with torch.no_grad(), closing(walk.visit()) as visits:
            for position, (block, sums) in enumerate(visits):
                if not started:
                    _log_memory(model, walk, sums, offloaded)
                    started = True
                dense = {m.name: model.get_parameter(m.name).data for m in block.matrices}
                digest = _digest(dense) if checkpoints is not None else ""
                saved = checkpoints.load(position, digest) if checkpoints and position < walk.start else None
                for matrix in block.matrices:
                    weight = matrix.of(model)
                    zeros = weight.numel() - int(weight.count_nonzero())
                    if saved is not None:
                        new = saved[matrix.name].T if matrix.transposed else saved[matrix.name]
                        new = new.to(weight.device)
                        bits[matrix.name] = saved[f"{matrix.name}:keep"]
                    else:
                        keep, new = _solved(matrix, weight, sums.get(matrix.name), solve)
                        bits[matrix.name] = pack(keep.T if matrix.transposed else keep)
                    if not offloaded:
                        changed = weight != new
                        undo[matrix] = pack(changed), weight[changed].cpu()
                    weight.copy_(new)
                    shapes[matrix.name] = tuple(dense[matrix.name].shape)
                    rows.append(
                        {"name": matrix.name, "stack": matrix.stack, "layer": matrix.layer, "size": weight.numel()}
                        | {"zeros_before": zeros, "zeros": weight.numel() - int(weight.count_nonzero())}
                    )
                if checkpoints is not None and saved is None:
                    checkpoints.save(position, digest, dense, bits)
                done += 1
    except BaseException:
        with torch.no_grad():
            for matrix, (changed, before) in undo.items():
                weight = matrix.of(model)
                weight[unpack(changed, tuple(weight.shape)).to(weight.device)] = before.to(weight.device)
        if offloaded and started:
            logger.error(
                f"{done} of {len(walk.blocks)} blocks are pruned already, the next perhaps in part: load the model "
                "again. With checkpoint_dir the next run continues behind them."
            )
        raise
    return WeightMask.from_bits(bits, shapes), rows


def _solved(
    matrix: Matrix,
    weight: torch.Tensor,
    observed: InputSum | None,
    solve: Callable[[Matrix, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune one matrix: what stays, and the new matrix."""
    if observed is not None and not observed.count:
        logger.warning(f"No token of the calibration data reached {matrix.module}: it is left as it is.")
        return torch.ones_like(weight, dtype=torch.bool), weight
    keep, new = solve(matrix, weight, observed.total if observed is not None else None)
    if new is not weight and not new.isfinite().all():
        raise CalibrationError(f"The new weights of {matrix.module} are not finite: give more data.")
    return keep, new.to(weight.dtype).masked_fill(~keep, 0)


def _log_memory(model: PreTrainedModel, walk: BlockWalk, sums: Mapping[str, InputSum], offloaded: bool) -> None:
    if not process_state().is_main_process:
        return
    matrices = [m for block in walk.blocks for m in block.matrices]
    weights = sum(m.inputs * m.outputs for m in matrices)
    parts = {
        "hidden states" + (" on disk" if walk.folder else ""): walk.hidden_bytes,
        "statistics": sum(s.total.nbytes for s in sums.values()),
        "dense weights that change, kept until the end, at most": 0 if offloaded else weights * model.dtype.itemsize,
        "the mask": weights // 8,
    }
    listed = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in parts.items() if size)
    logger.warning(
        f"Pruning {len(matrices)} matrices in {len(walk.blocks)} blocks. Memory beside the model and one forward pass "
        f"of a block: {listed}."
    )


# Going on after an interruption


class Checkpoints:
    """The finished blocks of a run, one file each, from which another run of the same kind continues.

    Args:
        folder (`str` or path): Where they are. It is made if need be.
        run (`str`): What was asked for: a run continues only from files with the same.

    Raises:
        ConfigError: The folder holds blocks of another run, or can't be written.
    """

    def __init__(self, folder: str | os.PathLike[str], run: str) -> None:
        self.folder, self.run = Path(folder), hashlib.sha256(run.encode()).hexdigest()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"checkpoint_dir {str(folder)!r} can't be made: {error.strerror}.") from error

    def finished(self) -> int:
        """Number of blocks that all processes find."""
        count = 0
        while self._path(count).exists():
            if self._head(count)["run"] != self.run:
                raise ConfigError(
                    f"checkpoint_dir {str(self.folder)!r} holds blocks of a run with other options, data or another "
                    "model: give an empty folder, or the same of all."
                )
            count += 1
        return int(min(gather_object([count])))

    def load(self, position: int, digest: str) -> dict[str, torch.Tensor]:
        """The weights of a block, and the packed masks under `name:keep`.

        Raises:
            ConfigError: The run started from other weights.
        """
        if self._head(position)["dense"] != digest:
            raise ConfigError(
                f"checkpoint_dir {str(self.folder)!r} holds blocks of a run that started from other weights: give the "
                "model as it was then, or an empty folder."
            )
        return dict(load_file(self._path(position)))

    def save(self, position: int, digest: str, weights: Mapping[str, torch.Tensor], bits: Any) -> None:
        """Write a block. All processes have the same, the main one writes."""
        if process_state().is_main_process:
            tensors = {name: weight.cpu().contiguous() for name, weight in weights.items()}
            tensors |= {f"{name}:keep": bits[name] for name in weights}
            waiting = self._path(position).with_suffix(".tmp")
            save_file(tensors, waiting, metadata={"run": self.run, "dense": digest})
            os.replace(waiting, self._path(position))

    def _head(self, position: int) -> dict[str, str]:
        try:
            with safe_open(self._path(position), "pt") as file:
                return {"run": "", "dense": "", **(file.metadata() or {})}
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self._path(position)} holds no pruned block: {error}.") from error

    def _path(self, position: int) -> Path:
        return self.folder / f"block-{position:04d}.safetensors"


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
