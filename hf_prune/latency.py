"""How long a model takes under a mask: a table that is measured where the model runs.

MACs are not time: what a head or a neuron costs depends on the device, the dtype, the batch and the length. The table
comes from forward passes of the model itself, in which cut copies of its layers take turns in the place of whole ones,
so that caches, memory and launches are those of real use; the clock is read between the layers. It is kept on disk.
"""

import copy
import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import constants
from transformers import PreTrainedModel
from transformers.utils import logging

from .errors import ConfigError, PruningError
from .gates import current_mask
from .layer_timing import cut_copies, described, equal_layers, interleave
from .masks import PruningMask
from .surgery import shrink
from .timing import DEFAULT_LENGTH, evaluating, example_inputs, measure_latency
from .units import Kind, PrunableUnits, base_model, prunable_units

logger = logging.get_logger(__name__)

_VERSION = 1


@dataclass(frozen=True)
class BlockTimes:
    """How long blocks of equal shape take by the units that they keep.

    Args:
        names (`tuple[str, ...]`): The groups of units.
        kind (`"heads"` or `"neurons"`): Their kind.
        counts (`tuple[int, ...]`): Numbers of units that were measured, ascending; the last is all of them.
        ms (`tuple[float, ...]`): Milliseconds more than with the fewest, ascending from 0.
    """

    names: tuple[str, ...]
    kind: Kind
    counts: tuple[int, ...]
    ms: tuple[float, ...]


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one forward pass, split so that those of any mask are a sum. Made by [`latency_table`].

    Args:
        setting (`dict`): What was measured, and where: the key under which the table is kept.
        blocks (`tuple[BlockTimes, ...]`): The blocks with heads or neurons that can be pruned.
        layers (`dict[str, list[float]]`): For each stack the milliseconds of each whole layer.
        rest (`float`): Milliseconds of everything else (embeddings, head).
        measured (`float`): Milliseconds of the whole model, measured apart from its layers.
        multiple_of (`int`): Widths that are fast on the device, and were measured, are multiples of this.
    """

    setting: dict[str, Any]
    blocks: tuple[BlockTimes, ...]
    layers: dict[str, list[float]]
    rest: float
    measured: float
    multiple_of: int

    @cached_property
    def units(self) -> dict[str, np.ndarray]:
        """For each group the milliseconds of 0, 1, 2, ... units, of shape (units + 1,); interpolated."""
        curves = {}
        for block in self.blocks:
            curve = np.interp(np.arange(block.counts[-1] + 1), block.counts, block.ms)
            curves.update(dict.fromkeys(block.names, curve))
        return curves

    @property
    def total(self) -> float:
        """Milliseconds of the whole model: what `measured` should be."""
        return self.rest + sum(map(sum, self.layers.values()))

    def __str__(self) -> str:
        stacks = []
        for stack, times in self.layers.items():
            runs = [(ms, len(list(equal))) for ms, equal in groupby(times)]
            stacks.append(f"{stack} {' + '.join(f'{number} × {ms:.3f}' for ms, number in runs)}")
        rows = [
            f"{self.setting['class']}, {self.where}",
            f"{self.total:.3f} ms = {' + '.join(stacks)} + rest {self.rest:.3f}; measured as a whole: "
            f"{self.measured:.3f} ms, the table is off by {self.total / self.measured - 1:+.1%}",
        ]
        for block in self.blocks:
            several = f" and {len(block.names) - 1} more" if len(block.names) > 1 else ""
            points = "  ".join(f"{n}: {ms:.3f}" for n, ms in zip(block.counts, block.ms, strict=True))
            rows.append(f"{block.names[0]}{several}, ms by {block.kind}:  {points}")
        return "\n".join(rows)

    def fits(self, units: PrunableUnits) -> bool:
        """Whether it is for a model with these units.

        Args:
            units ([`PrunableUnits`]): The units. The names and sizes of the prunable groups, and the number of layers
                in each stack, are compared.
        """
        sizes = {name: len(curve) - 1 for name, curve in self.units.items()}
        layers = {stack: len(times) for stack, times in self.layers.items()}
        prunable = {g.name: g.size for g in units.of_kind("heads", "neurons") if g.prunable and g.size}
        return sizes == prunable and layers == {stack: units[stack].size for stack in units.stacks}

    @property
    def where(self) -> str:
        """The setting in words."""
        s = self.setting
        lengths = [s["sequence_length"]] if s["inputs"] == "input_ids" else []
        lengths += [s["target_length"]] if s["target_length"] else []
        each = f" × {' and '.join(map(str, lengths))} tokens" if lengths else ""
        threads = f", {s['threads']} thread{'s' if s['threads'] > 1 else ''}" if s["threads"] else ""
        return f"batch {s['batch_size']}{each}, {s['dtype']}, {s['device']}{threads}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LatencyTable":
        """Inverse of [`~LatencyTable.to_dict`].

        Raises:
            PruningError: The data are malformed, or of another version.
        """
        try:
            if data["version"] != _VERSION:
                raise PruningError(f"A latency table of version {data['version']!r}, this hf_prune reads {_VERSION}.")
            blocks = []
            for block in data["blocks"]:
                names, counts, ms = (tuple(block[key]) for key in ("names", "counts", "ms"))
                rising = all(low < high for low, high in pairwise(counts)) and all(a <= b for a, b in pairwise(ms))
                if not rising or len(counts) != len(ms) or counts[0] < 0 or ms[0] != 0 or not math.isfinite(ms[-1]):
                    raise PruningError(f"The times of {names} don't rise from 0: {block}.")
                blocks.append(BlockTimes(names, block["kind"], counts, ms))
            numbers = (float(data["rest"]), float(data["measured"]))
            table = cls(dict(data["setting"]), tuple(blocks), dict(data["layers"]), *numbers, data["multiple_of"])
            if not (0 < table.total < math.inf and 0 < table.measured < math.inf and table.multiple_of >= 1):
                raise PruningError(f"A latency of {table.total} ms, of {table.measured} ms as a whole.")
            return table
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise PruningError(f"Not a latency table: {type(error).__name__} {error}.") from error


def latency_table(
    model: PreTrainedModel,
    units: PrunableUnits | None = None,
    *,
    batch_size: int = 1,
    sequence_length: int = DEFAULT_LENGTH,
    target_length: int | None = None,
) -> LatencyTable:
    """Measure how long a model takes by the units that it keeps, on its device, with the threads that torch has now.

    It takes about ten seconds, longer for models that need more than 50 ms, and the memory of five layers for each
    kind of layer; the inputs and the order of the measurements are seeded. The table is kept under
    `HF_HOME/hf_prune/latency` (`$HF_PRUNE_CACHE/latency`, if that is set), and measured again for another
    architecture, dtype, device, batch, length, number of threads, or version of torch or transformers.

    Args:
        model (`PreTrainedModel`): The model, without a mask, on one device. It is not changed.
        units ([`PrunableUnits`], *optional*): Its units.
        batch_size (`int`, *optional*, defaults to 1): Examples in the batch.
        sequence_length (`int`, *optional*, defaults to 128): Tokens in each example, all of them real (no padding).
        target_length (`int`, *optional*): Tokens of a decoder that follows an encoder, if there are others.

    Returns:
        [`LatencyTable`]: In milliseconds. Print it to see how far the sum of its parts is from the whole model.

    Raises:
        ConfigError: A size is out of range, or the model carries a mask or lies on several devices.
        UnsupportedModelError: The family is unknown.

    Examples:
        ```python
        >>> print(hf_prune.latency_table(model, batch_size=8, sequence_length=32))
        ```
    """
    units = units if units is not None else prunable_units(model)
    if current_mask(model) is not None:
        raise ConfigError("The model carries a mask, which takes time itself: take it off with remove_mask(model).")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ConfigError("Latency is measured on one device, and this model lies on several: use another budget.")
    inputs = example_inputs(model, batch_size, sequence_length, target_length=target_length)
    setting = {
        "family": model.config.model_type,
        "class": type(model).__name__,
        "modules": _digest(described(model)),
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": _device_name(model.device),
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        "inputs": model.main_input_name,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "target_length": (target_length or sequence_length) if "decoder_input_ids" in inputs else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path = _path(setting)
    table = _tables.get(path) or _load(path, setting, units)
    if table is None:
        table = _measure(model, units, inputs, setting)
        _save(path, table)
        logger.info("Measured %s\nKept in %s", table, path)
    _tables[path] = table
    return table


def measure_pruned(model: PreTrainedModel, mask: PruningMask, table: LatencyTable) -> dict[str, float | None]:
    """Milliseconds of a dense model (`before`) and of what `mask` leaves of it (`after`), in turns; `None` where the
    memory does not suffice.

    Args:
        model (`PreTrainedModel`): The dense model, without a mask.
        mask ([`PruningMask`]): What stays.
        table ([`LatencyTable`]): Whose batch and lengths the inputs have.

    Returns:
        `dict[str, float | None]`: Medians of 5 to 30 passes, the fewer the slower the model.

    Raises:
        As [`~hf_prune.shrink`].
    """
    lengths = {name: table.setting[name] for name in ("batch_size", "sequence_length", "target_length")}
    repeats = min(max(round(5_000 / table.total), 5), 30)
    try:
        # What is not cut is shared: the copy takes as much memory as the kept part of the pruned blocks.
        small = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        measured = measure_latency({"before": model, "after": shrink(small, mask)}, **lengths, repeats=repeats)
    except RuntimeError as error:  # out of memory, as a rule: no reason to lose what has been computed
        logger.warning("The latency of the pruned model could not be measured: %s", error)
        return {"before": None, "after": None}
    return {name: run.p50_ms for name, run in measured.items()}


# Keeping tables

_tables: dict[Path, LatencyTable] = {}  # where the disk can't be written, one run must not see two tables


def _digest(parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux on x86
        return platform.processor() or platform.machine()


def _path(setting: Mapping[str, Any]) -> Path:
    root = os.environ.get("HF_PRUNE_CACHE") or os.path.join(constants.HF_HOME, "hf_prune")
    digest = _digest([_VERSION, *sorted(setting.items())])
    return Path(root).expanduser() / "latency" / f"{setting['family']}-{digest[:16]}.json"


def _load(path: Path, setting: Mapping[str, Any], units: PrunableUnits) -> LatencyTable | None:
    try:
        table = LatencyTable.from_dict(json.loads(path.read_text(encoding="utf-8")))
        return table if table.setting == setting and table.fits(units) else None
    except (OSError, ValueError, PruningError):
        return None


def _save(path: Path, table: LatencyTable) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump(table.to_dict(), file)
        os.replace(file.name, path)  # another process may be reading it
    except OSError as error:
        logger.warning("The latency table is not kept for the next run: %s", error)


# Measuring


def _measure(
    model: PreTrainedModel, units: PrunableUnits, inputs: dict[str, torch.Tensor], setting: dict[str, Any]
) -> LatencyTable:
    base = base_model(model)
    multiple = 32 if model.device.type == "cpu" else 64
    with evaluating(model):
        classes = equal_layers(base, units)
        copies = [cut_copies(base, units, places[0], multiple) for places in classes]
        total, rest, times = interleave(model, inputs, classes, copies)

    layers = {stack: [0.0] * units[stack].size for stack in units.stacks}
    blocks = []
    for (first, *others), own, whole, cut in zip(classes, copies, *times, strict=True):
        for stack, index in (first, *others):
            layers[stack][index] = whole
        for position, group in enumerate(units.of_layer(*first)):
            counts = sorted(count for name, count in own if name == group.name)
            if counts:
                ms = np.array([cut[group.name, count] for count in counts])
                # More units never take less time: half way between the longest of fewer and the shortest of more.
                ms = (np.maximum.accumulate(ms) + np.minimum.accumulate(ms[::-1])[::-1]) / 2
                names = tuple(units.of_layer(*place)[position].name for place in (first, *others))
                blocks.append(BlockTimes(names, group.kind, tuple(counts), tuple((ms - ms[0]).tolist())))
    return LatencyTable(setting, tuple(blocks), layers, rest, total, multiple)
