"""What the methods share that zero single weights: their options, the choice of the lowest scores, the walk."""

import json
import math
import re
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..block_walk import Announce, BlockWalk, Observation
from ..blockwise import Checkpoints, digest_outside, prune_blocks
from ..calibration import Calibrator
from ..costs import CostTable
from ..errors import ConfigError
from ..matrices import Matrix, weight_matrices
from ..offload import is_offloaded
from ..processes import process_state
from ..run_files import run_folder
from ..timing import DEFAULT_LENGTH
from ..units import PrunableUnits
from ..weight_masks import WeightMask
from .base import BasePruner
from .config import MethodConfig
from .owl import layer_sparsities, outlier_share

logger = logging.get_logger(__name__)

# How much is pruned: a share of the weights, or N kept in every M consecutive inputs.
Target: TypeAlias = float | tuple[int, int]


@dataclass(kw_only=True)
class WeightPruningConfig(MethodConfig):
    """Options of all methods that zero single weights. Exactly one of `sparsity` and `pattern` is given.

    Args:
        sparsity (`float`, *optional*): Share of the weights to zero, in [0, 1): 0.5 zeroes half of each matrix inside
            the transformer blocks. Embeddings and task head stay.
        pattern (`str`, *optional*): `"N:M"`, such as `"2:4"` or `"4:8"`: of every M consecutive inputs of an output
            at most N weights stay. (In the code of Wanda and SparseGPT, N counts the pruned ones.)
        exclude (`tuple[str, ...]`, *optional*): Shell patterns of projections that stay dense:
            `("layers.0.*", "*.down_proj")`.
        ratios (`"uniform"` or `"owl"`, *optional*, defaults to `"uniform"`): The same sparsity in every block, or,
            with OWL (Yin et al., ICML 2024), less in blocks whose scores have more outliers. OWL needs calibration
            data, and one more pass over them.
        owl_m (`float`, *optional*, defaults to 5.0): OWL's M: an outlier exceeds the mean score M times.
        owl_lambda (`float`, *optional*, defaults to 0.08): OWL's λ: sparsities differ by at most 2λ.
        offload_folder (`str`, *optional*): Keep what the blocks read (hidden states, attention masks, what an encoder
            returned) and what an error would put back in files there, until the run ends. In CPU memory by default.
        checkpoint_dir (`str`, *optional*): Keep each finished block there. A run that was interrupted continues behind
            them when it is started again in the same way, and ends with the same weights.

    Raises:
        ConfigError: An option is out of range.
    """

    sparsity: float | None = None
    pattern: str | None = None
    ratios: Literal["uniform", "owl"] = "uniform"
    owl_m: float = 5.0
    owl_lambda: float = 0.08
    offload_folder: str | None = None
    checkpoint_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sparsity is None) == (self.pattern is None):
            raise ConfigError(
                f"Give either sparsity, such as 0.5, or pattern, such as '2:4'; got sparsity={self.sparsity!r}, "
                f"pattern={self.pattern!r}."
            )
        if self.sparsity is not None:
            number = isinstance(self.sparsity, int | float) and not isinstance(self.sparsity, bool)
            if not number or not 0 <= self.sparsity < 1:
                raise ConfigError(f"sparsity must be a number in [0, 1), the share to zero, got {self.sparsity!r}.")
        elif not isinstance(self.pattern, str) or not re.fullmatch(r"\d{1,4}:\d{1,4}", self.pattern):
            raise ConfigError(f"pattern must be 'N:M', such as '2:4', got {self.pattern!r}.")
        else:
            kept, size = map(int, self.pattern.split(":"))
            if not 0 < kept < size:
                raise ConfigError(f"pattern 'N:M' keeps N of M weights, 0 < N < M, got {self.pattern!r}.")
        self.check_choice("ratios", ("uniform", "owl"))
        if self.ratios == "owl" and self.sparsity is None:
            raise ConfigError(
                "ratios='owl' shares out a sparsity over the blocks: give sparsity= instead of pattern=."
            )
        self.check_positive("owl_m")
        self.check_positive("owl_lambda")

    @property
    def target(self) -> Target:
        """The sparsity, or (kept, of) as numbers: 0.5, or (2, 4)."""
        if self.pattern is None:
            assert self.sparsity is not None
            return float(self.sparsity)
        kept, size = map(int, self.pattern.split(":"))
        return kept, size

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, with the name of the method and without folders of this machine."""
        return {k: v for k, v in super().to_dict().items() if k not in ("offload_folder", "checkpoint_dir")}


# Mathematics


def pruned_count(count: int, sparsity: float) -> int:
    """floor(count · sparsity), exact where the product is whole: 29 of 100 at 0.29, whose product is 28.999…

    Args:
        count (`int`): Number of weights.
        sparsity (`float`): Share to prune, in [0, 1).

    Returns:
        `int`: Number of weights to prune.
    """
    return math.floor(round(count * sparsity, 6))


def square_sum(inputs: torch.Tensor) -> torch.Tensor:
    """Σ x² of each input over tokens: (tokens, inputs) -> float64 of shape (inputs,)."""
    total = torch.zeros(inputs.shape[1], dtype=torch.float64, device=inputs.device)
    rows = max(1, 2**20 // inputs.shape[1])
    for start in range(0, len(inputs), rows):  # parts small enough for the caches
        total += inputs[start : start + rows].float().square().sum(0)
    return total


def wanda_score(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Wanda's S_ij = |W_ij|·‖X_j‖₂ (Eq. 1).

    Args:
        weight (`torch.Tensor`): W, (outputs, inputs).
        squares (`torch.Tensor`): Σ x² of the inputs over tokens, (inputs,), see [`square_sum`].

    Returns:
        `torch.Tensor`: S, float32 in the shape of W.
    """
    return weight.float().abs() * squares.sqrt().float()


def keep_highest(score: torch.Tensor, target: Target) -> torch.Tensor:
    """Which weights stay when the lowest scores of each row are pruned; of equal scores the later columns stay.

    Args:
        score (`torch.Tensor`): (outputs, inputs), each row compared for itself.
        target (`float` or `tuple[int, int]`): The share to prune of each row, rounded down to whole weights; or
            (N, M): in every group of M consecutive columns N stay. M must divide the columns.

    Returns:
        `torch.Tensor`: bool of the same shape, `True` = keep.
    """
    if isinstance(target, tuple):
        return _keep_in_groups(score, *target)
    pruned = pruned_count(score.shape[1], target)
    if not pruned:
        return torch.ones_like(score, dtype=torch.bool)
    limit = kth_lowest(score, pruned)[:, None]
    keep = score > limit
    surplus = pruned - (~keep).sum(1)  # negative where scores equal to the limit have to stay
    for row in surplus.nonzero().flatten().tolist():
        ties = (score[row] == limit[row]).nonzero().flatten()
        keep[row, ties[len(ties) + int(surplus[row]) :]] = True
    return keep


def kth_lowest(score: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th lowest score of each row.

    Args:
        score (`torch.Tensor`): (rows, columns).
        k (`int`): From 1 to the number of columns.

    Returns:
        `torch.Tensor`: (rows,).
    """
    if score.device.type == "cpu":  # NumPy's selection is ten times as fast as torch.kthvalue
        return torch.from_numpy(np.partition(score.numpy(), k - 1, axis=1)[:, k - 1])
    return score.kthvalue(k, 1).values


def _keep_in_groups(score: torch.Tensor, kept: int, size: int) -> torch.Tensor:
    groups = score.reshape(-1, size).T.contiguous()
    rank = torch.zeros_like(groups, dtype=torch.int16)  # how many of the group are pruned before
    for first in range(size):
        for second in range(first + 1, size):
            ahead = groups[first] <= groups[second]
            rank[second] += ahead
            rank[first] += ~ahead
    return (rank >= size - kept).T.reshape(score.shape)


# The pruner

W = TypeVar("W", bound=WeightPruningConfig)


class WeightPruner(BasePruner[W]):
    """A one-shot method that zeroes single weights, block by block. Subclasses say what to observe and what to keep.

    Args:
        config ([`WeightPruningConfig`]): Its options.

    Attributes:
        observe (`Callable`, *optional*): What to add up over the inputs of a projection: (tokens, inputs) -> a tensor.
    """

    observe: Observation | None = None
    prunes_offloaded = True

    @property
    def wants_data(self) -> bool:
        return self.needs_data or self.config.ratios == "owl"

    @abstractmethod
    def solve(self, weight: torch.Tensor, observed: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        """Decide which weights of a matrix stay.

        Args:
            weight (`torch.Tensor`): (outputs, inputs), in the dtype of the model. Not to be changed.
            observed (`torch.Tensor`): What `observe` returned, summed over all data; `None` where nothing was
                observed.
            target (`float` or `tuple[int, int]`): The share to prune, or (N, M).

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: A bool tensor of the shape of the weight, `True` = keep, and the
            weight in which the others are zeroed: the given one, or a new one, of any dtype.
        """

    def workspace(self, matrix: Matrix) -> int:
        """Bytes that it takes to solve a matrix, beside what was observed of its inputs: for the log."""
        return 4 * 3 * matrix.inputs * matrix.outputs  # the scores, their copy to select from, and what is compared

    def check(self, matrices: list[Matrix], calibrator: Calibrator | None) -> None:
        """Raise unless all matrices can be pruned.

        Args:
            matrices (`list[Matrix]`): All matrices that will be pruned.
            calibrator ([`Calibrator`], *optional*): The data.

        Raises:
            ConfigError: The pattern does not divide the inputs of one.
        """
        if isinstance(self.config.target, tuple):
            for matrix in matrices:
                if matrix.inputs % self.config.target[1]:
                    raise ConfigError(
                        f"{matrix.module} has {matrix.inputs} inputs, no multiple of the {self.config.target[1]} in "
                        f"pattern={self.config.pattern!r}: exclude it, or choose another pattern."
                    )

    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> WeightMask:
        config = self.config
        matrices = weight_matrices(model, units, config.exclude)
        self.check(matrices, calibrator)
        if process_state().is_main_process:
            logger.warning(
                f"{config.method} zeroes single weights and keeps all shapes. Zeros in dense tensors make a model "
                "neither smaller nor faster: that takes kernels or files for sparse tensors."
            )
        with run_folder(config.offload_folder) as folder:
            return self._prune(model, units, calibrator, matrices, folder)

    def _prune(
        self,
        model: PreTrainedModel,
        units: PrunableUnits,
        calibrator: Calibrator | None,
        matrices: list[Matrix],
        folder: Path | None,
    ) -> WeightMask:
        config, checkpoints = self.config, None
        if config.checkpoint_dir is not None:
            architecture = model.config.to_dict()
            for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):  # set when it is saved
                architecture.pop(name, None)
            run = [config.to_dict(), calibrator and calibrator.fingerprint, type(model).__name__, architecture]
            names, outside = [m.name for m in matrices], digest_outside(model, units)
            identity = json.dumps([*run, names, outside], sort_keys=True, default=str)
            checkpoints = Checkpoints(config.checkpoint_dir, identity)
        announce: Announce | None = partial(self._log_memory, model, matrices)
        targets = {}
        if config.ratios == "owl":
            targets = self._owl_targets(model, units, matrices, calibrator, folder=folder, announce=announce)
            announce = None
        walk = BlockWalk(
            model,
            units,
            matrices,
            calibrator,
            self.observe,
            start=checkpoints.finished() if checkpoints is not None else 0,
            folder=folder,
            announce=announce,
        )

        def solve(matrix: Matrix, weight: torch.Tensor, observed: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return self.solve(weight, observed, targets.get((matrix.stack, matrix.layer), config.target))

        mask, self._rows = prune_blocks(model, walk, solve, checkpoints)
        return mask

    def _log_memory(self, model: PreTrainedModel, matrices: list[Matrix], input_bytes: int) -> None:
        if not process_state().is_main_process:
            return
        blocks: dict[tuple[str, int], int] = {}
        for matrix in matrices:
            size = 0 if self.observe is None else self.observe(torch.zeros(0, matrix.inputs, device="meta")).nbytes
            blocks[matrix.stack, matrix.layer] = blocks.get((matrix.stack, matrix.layer), 0) + size
        weights, place = sum(m.inputs * m.outputs for m in matrices), " (on disk)" * bool(self.config.offload_folder)
        parts = {
            f"inputs of a block{place}": input_bytes,
            "statistics of a block": max(blocks.values()),
            "to solve a matrix": max(map(self.workspace, matrices)),
            f"dense weights that change, kept until the end{place}, at most": 0
            if is_offloaded(model)
            else weights * model.dtype.itemsize,
            "the mask": weights // 8,
        }
        listed = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in parts.items() if size)
        logger.warning(
            f"Pruning {len(matrices)} matrices in {len(blocks)} blocks. Memory beside the model and one forward pass "
            f"of a block: {listed}."
        )

    def _owl_targets(
        self,
        model: PreTrainedModel,
        units: PrunableUnits,
        matrices: list[Matrix],
        calibrator: Calibrator | None,
        **options: Any,
    ) -> dict[tuple[str, int], float]:
        """A sparsity for each block, from one pass through the dense model."""
        config, shares, sizes = self.config, {}, {}
        assert config.sparsity is not None
        walk = BlockWalk(model, units, matrices, calibrator, square_sum, changes=False, **options)
        for block, sums in walk.visit():
            if block.matrices:
                key = block.stack, block.layer
                scores = [wanda_score(m.of(model), sums[m.name].total).flatten() for m in block.matrices]
                shares[key] = outlier_share(torch.cat(scores), config.owl_m)
                sizes[key] = sum(m.inputs * m.outputs for m in block.matrices)
        found = layer_sparsities(
            list(shares.values()), config.sparsity, config.owl_lambda, weights=list(sizes.values())
        )
        targets = dict(zip(shares, found, strict=True))
        self.facts["owl_sparsities"] = {f"{stack}.{layer}": round(s, 4) for (stack, layer), s in targets.items()}
        return targets

    def finish(
        self, model: PreTrainedModel, units: PrunableUnits, mask: WeightMask, calibrator: Calibrator | None
    ) -> dict[str, Any]:
        length, target = calibrator.lengths if calibrator is not None else (DEFAULT_LENGTH, None)
        table = CostTable(model, units, sequence_length=length, target_length=target)
        dense = table.of().to_dict()
        before, after = (sum(row[key] for row in self._rows) for key in ("zeros_before", "zeros"))
        return {
            "before": {**dense, "nonzero": dense["params"] - before},
            "after": {**dense, "nonzero": dense["params"] - after},
            "sequence_lengths": table.lengths,
            "weights": self._rows,
        }
