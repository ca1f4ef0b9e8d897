"""Zero single weights, one transformer block after the other (the procedure of SparseGPT and Wanda).

Each block of a walk is pruned while it is visited, and what is finished can be kept in files.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from .block_walk import BlockWalk, InputSum
from .errors import CalibrationError, ConfigError
from .matrices import Matrix
from .offload import is_offloaded, stored
from .processes import process_state
from .run_files import Filed, Shelf, fetched
from .units import PrunableUnits, base_model
from .weight_masks import WeightMask, pack, unpack

logger = logging.get_logger(__name__)


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
        [`WeightMask`], and for each matrix a row of a report: `name`, `stack`, `layer`, `size`, and how many of its
        weights are zero (`zeros`) and were so before (`zeros_before`).

    Raises:
        CalibrationError: What was observed, or a new weight, is NaN or infinite; the message names the projection.
        ConfigError: A checkpoint is of a run that started from other weights, or is damaged.

    After an error the weights are as they were. Those of an offloaded model would not fit twice into memory: the log
    says how many blocks are pruned already.
    """
    bits: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    rows: list[dict[str, Any]] = []
    # Where a matrix changes, packed, and what was there.
    undo: dict[Matrix, tuple[torch.Tensor | Filed, torch.Tensor | Filed]] = {}
    shelf = Shelf(walk.folder)
    offloaded, started, done = is_offloaded(model), False, 0
    try:
        with torch.no_grad(), closing(walk.visit()) as visits:
            for position, (block, sums) in enumerate(visits):
                started = True
                dense = {m.name: model.get_parameter(m.name).data for m in block.matrices}
                digest = _digest(walk.layer(block).state_dict().items()) if checkpoints is not None else ""
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
                        undo[matrix] = (
                            shelf.put(f"changed-{matrix.name}", pack(changed)),
                            shelf.put(f"before-{matrix.name}", weight[changed]),
                        )
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
            for matrix, (places, before) in undo.items():
                weight = matrix.of(model)
                where = unpack(fetched(places), tuple(weight.shape)).to(weight.device)
                weight[where] = fetched(before).to(weight.device)
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
        """Number of blocks that all processes find.

        Raises:
            ConfigError: The folder holds blocks of another run, or a file that holds none.
        """
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

        Args:
            position (`int`): Number of the block, counted over all stacks.
            digest (`str`): SHA-256 of the weights that the block has now, before it is pruned.

        Returns:
            `dict[str, torch.Tensor]`: By name of a parameter its pruned weight as it is stored in the model, and under
            `name:keep` its mask as [`~hf_prune.weight_masks.pack`] writes it.

        Raises:
            ConfigError: The run started from other weights, or the file holds no block.
        """
        if self._head(position)["dense"] != digest:
            raise ConfigError(
                f"checkpoint_dir {str(self.folder)!r} holds blocks of a run that started from other weights: give the "
                "model as it was then, or an empty folder."
            )
        return dict(load_file(self._path(position)))

    def save(self, position: int, digest: str, weights: Mapping[str, torch.Tensor], bits: Any) -> None:
        """Write a block. All processes have the same, the main one writes.

        Args:
            position (`int`): Number of the block, counted over all stacks.
            digest (`str`): SHA-256 of the weights that the block had before it was pruned.
            weights (`dict[str, torch.Tensor]`): The pruned weights by name of their parameter.
            bits (`dict[str, torch.Tensor]`): Their packed masks by the same names; others are left out.
        """
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


def digest_outside(model: PreTrainedModel, units: PrunableUnits) -> str:
    """SHA-256 of the weights that no block holds: embeddings, norms, head."""
    names = {module: name for name, module in model.named_modules()}
    inside = tuple(f"{names[base_model(model).get_submodule(stack)]}." for stack in units.stacks)
    return _digest(
        (name, stored(model, name) if value.is_meta else value)
        for name, value in model.state_dict().items()
        if not name.startswith(inside)
    )


def _digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
