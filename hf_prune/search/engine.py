"""[`search_subnetworks`]: a super-network, a space and validation data in, a Pareto front out."""

import hashlib
import math
import os
import reprlib
from collections.abc import Callable
from typing import Any

from optuna.storages import BaseStorage
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..batches import update_digest
from ..calibration import Calibrator
from ..costs import METRICS, CostTable, Metric
from ..errors import CalibrationError, ConfigError, check_whole, unknown
from ..evaluation import ComputeMetrics, Evaluator
from ..gates import current_mask
from ..latency import latency_table
from ..masks import PruningMask
from ..offload import refuse_offloaded
from ..processes import from_main_process, process_state
from ..slicing import subnetwork
from ..timing import DEFAULT_LENGTH, evaluating
from .base import SearchSpace
from .front import ParetoFront, SubNetwork
from .study import Sample, SearchStudy, quiet

logger = logging.get_logger(__name__)


def search_subnetworks(
    model: PreTrainedModel,
    space: SearchSpace,
    data: Any,
    *,
    metric: str = "accuracy",
    compute_metrics: ComputeMetrics | None = None,
    greater_is_better: bool = True,
    cost: Metric = "params",
    table: CostTable | None = None,
    method: str = "nsga2",
    num_samples: int = 100,
    seed: int = 0,
    storage: str | os.PathLike[str] | BaseStorage | None = None,
    study_name: str = "hf_prune",
    processing_class: Any = None,
    text_column: str | None = None,
    max_samples: int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
) -> ParetoFront:
    """Search a super-network for the sub-networks with the best trade-offs between error and cost.

    Sub-networks are evaluated as they are, with the weights of the super-network: train that one to be good at all
    sizes before, with [`SuperNetTrainer`]. None is evaluated twice. The largest, the smallest and the middle one come
    first, as in Klein et al., "Structural Pruning of Pre-trained Language Models via Neural Architecture Search", TMLR
    2024.

    Args:
        model (`PreTrainedModel`): The super-network. It stays as it is.
        space ([`SearchSpace`]): Which sub-networks there are, made for this model.
        data: Labelled validation examples as for [`Calibrator`], for causal language models also texts alone, or a
            [`Calibrator`] with labels; or a function that is given a sub-network and returns its error: the lower the
            better.
        metric (`str`, *optional*, defaults to `"accuracy"`): `"accuracy"`, `"f1"`, `"matthews"` or `"spearman"`, of
            which the error is 1 - metric; `"loss"` or `"perplexity"` (language models), which are the error; or a key
            of what `compute_metrics` returns.
        compute_metrics (`Callable`, *optional*): As for `Trainer`.
        greater_is_better (`bool`, *optional*, defaults to `True`): Of the metric of `compute_metrics`: the error is
            1 - metric then, otherwise the metric.
        cost (`"params"`, `"macs"`, `"memory"` or `"latency"`, *optional*, defaults to `"params"`): The other
            objective, of the shrunk sub-network. Latency is added up from a table of measured blocks, see
            [`latency_table`].
        table ([`CostTable`], *optional*): Which costs to count. By default MACs and latency of one example of the
            data's mean length.
        method (`str`, *optional*, defaults to `"nsga2"`): How sub-networks are drawn: `"random"`; `"local"`, which
            changes one number of a random point of the front so far; or by Optuna's `"nsga2"` (populations of 10),
            `"tpe"` or `"gp"` (a Gaussian process with expected hypervolume improvement). Only the first two are for
            spaces of more than 1,000 parameters, and `"gp"` is for at most 100.
        num_samples (`int`, *optional*, defaults to 100): Sub-networks to draw in all, earlier runs included.
        seed (`int`, *optional*, defaults to 0): Of the draws.
        storage (`str`, path or Optuna's `BaseStorage`, *optional*): Where to keep what was evaluated: an URL such as
            `"sqlite:///search.db"`, or the path of a journal. A search that was broken off goes on from there; several
            workers may share it. By default nothing is kept.
        study_name (`str`, *optional*, defaults to `"hf_prune"`): Tells the searches in a storage apart.
        processing_class, text_column, max_samples, batch_size, max_length (*optional*): See [`Calibrator`].

    Returns:
        [`ParetoFront`]: The best trade-offs, and all that was evaluated.

    Raises:
        ConfigError: An option is wrong; the space is for another model; the study in the storage was begun with
            another space, model, metric (its `compute_metrics` and `greater_is_better` too), cost or other data.
        CalibrationError: The data are malformed, or no sub-network has a finite error.
        UnsupportedModelError: The model can't be pruned.

    A sub-network whose error is NaN or infinite is left out, with a warning that names it. The whole model is
    evaluated to compare with, even where bounds or a budget leave it out. Under torchrun or `accelerate launch` all
    processes evaluate each sub-network together, on their shares of the data.

    Examples:
        ```python
        >>> space = hf_prune.search_space("small", model)
        >>> front = hf_prune.search_subnetworks(model, space, validation, processing_class=tokenizer)
        >>> front.extract(front.select({"params": 0.5}), model).save_pretrained("half")
        ```
    """
    if cost not in METRICS:
        raise ConfigError(unknown("cost", cost, METRICS))
    if current_mask(model) is not None:
        raise ConfigError("The model carries a mask: take it off with remove_mask(model) before the search.")
    refuse_offloaded(model)
    calibrator, error_of = None, data
    if isinstance(data, Calibrator) or not callable(data):
        calibrator = _labelled(
            model,
            data,
            processing_class=processing_class,
            text_column=text_column,
            max_samples=max_samples,
            batch_size=batch_size,
            max_length=max_length,
        )
        error_of = Evaluator(calibrator, metric, compute_metrics, greater_is_better)
    table = table if table is not None else _cost_table(model, cost, calibrator)
    if not table.of()[cost]:
        raise ConfigError("A search for latency needs a table of it: CostTable(model, latency=latency_table(model)).")
    known = isinstance(error_of, Evaluator)
    identity = {
        "space": space.describe(),
        "metric": metric if known else "of a function",
        "compute_metrics": _name(compute_metrics) if known and compute_metrics is not None else None,
        "greater_is_better": known and error_of.greater_is_better,
        "cost": cost,
        "model": fingerprint(model),
        "data": calibrator.describe() if calibrator is not None else None,
    }

    def evaluate(_: Sample | None, mask: PruningMask) -> float:
        small = subnetwork(model, mask, space.units)
        with evaluating(small):
            return float(error_of(small))

    options = {"method": method, "seed": seed, "storage": storage, "name": study_name}
    search = Search(space, table, cost, identity, num_samples, options)
    whole = PruningMask({}, space.units)
    # Where bounds or a budget leave the whole model out.
    dense = evaluate(None, whole) if space.mask(space.largest) != whole else math.nan
    front = search.run(evaluate)
    if math.isfinite(dense):
        front.facts["dense_error"] = dense
    return front


class Search:
    """The main process asks a study for sub-networks, all processes evaluate them, the main process tells.

    Args:
        space ([`SearchSpace`]): The sub-networks.
        table ([`CostTable`]): Their costs.
        cost (`str`): The one that counts.
        identity (`dict`): What must stay the same in a study.
        num_samples (`int`): Sub-networks to draw in all.
        options (`dict`): For [`SearchStudy`].
        trained (`bool`, *optional*, defaults to `False`): Whether sub-networks are trained before they are evaluated.

    Raises:
        ConfigError: `num_samples` is out of range.
        MaskError: The table is of another model than the space.
    """

    study: SearchStudy  # in the main process alone

    def __init__(
        self,
        space: SearchSpace,
        table: CostTable,
        cost: Metric,
        identity: dict[str, Any],
        num_samples: int,
        options: dict[str, Any],
        trained: bool = False,
    ) -> None:
        check_whole(1, num_samples=num_samples)
        space.mask(space.largest).check(table.units)
        self.space, self.table, self.cost, self.dense = space, table, cost, table.of()
        self.identity, self.num_samples, self.options, self.trained = identity, num_samples, options, trained

    def run(self, evaluate: Callable[[Sample, PruningMask], float | None]) -> ParetoFront:
        """Search with a function that returns the error of a sub-network.

        Args:
            evaluate (`Callable`): Given a [`Sample`] and its mask, called in all processes at once, returns the error;
                NaN or infinite leaves the sub-network out, `None` means that it was given up early.

        Returns:
            [`ParetoFront`]: Of all that was evaluated, in earlier runs of the study too.

        Raises:
            ConfigError: The study can't be opened, see [`SearchStudy`], or all sub-networks were given up early.
            CalibrationError: No sub-network has a finite error.
        """
        with quiet():
            done = from_main_process(self._open)
            hidden = not process_state().is_main_process or None  # None: only where stderr is a terminal
            with tqdm(
                total=self.num_samples, initial=min(done, self.num_samples), desc="search", disable=hidden
            ) as bar:
                while (sample := from_main_process(self._next)) is not None:
                    self._evaluate(sample, evaluate)
                    bar.update()
            evaluated, given_up = from_main_process(lambda: (self.study.evaluated(), self.study.given_up()))
        if not evaluated:
            if given_up:
                raise ConfigError(
                    f"The pruner gave all {given_up} sub-networks up early: let it wait for more evaluations, or pass "
                    "pruner=optuna.pruners.NopPruner() and another study_name."
                )
            raise CalibrationError(
                f"None of {self.num_samples} sub-networks has a finite error: check the metric and the weights."
            )
        points = []
        for member, error in evaluated:
            mask = self.space.mask(member)
            points.append(SubNetwork(member, error, self.table.of(mask).to_dict(), mask))
        facts = {**self.identity, "samples": self.num_samples, "search": self.options["method"]}
        facts["seed"] = self.options["seed"]
        if self.trained:
            facts["trained"] = True
        if self.table.latency is not None:
            facts["latency"] = {"where": self.table.latency.where, "table": str(self.table.latency).splitlines()}
        return ParetoFront(points, self.dense.to_dict(), cost=self.cost, lengths=self.table.lengths, facts=facts)

    def _open(self) -> int:
        self.study = SearchStudy(self.space, self.identity, **self.options)
        return len(self.study)

    def _next(self) -> Sample | None:
        return self.study.ask() if len(self.study) < self.num_samples else None

    def cost_of(self, mask: PruningMask) -> float:
        """The cost that counts, as a ratio to that of the whole model."""
        return self.table.of(mask)[self.cost] / self.dense[self.cost]

    def _evaluate(self, sample: Sample, evaluate: Callable[[Sample, PruningMask], float | None]) -> None:
        mask = self.space.mask(sample.member)
        try:
            error = sample.error if sample.error is not None else evaluate(sample, mask)
        except BaseException as failure:
            if process_state().is_main_process:
                # An interrupted sub-network comes again, one that can't be evaluated does not.
                self.study.fail(sample, repr(failure) if isinstance(failure, Exception) else None)
            raise
        if error is None:
            from_main_process(lambda: self.study.stop(sample))
        elif math.isfinite(error):
            from_main_process(lambda: self.study.tell(sample, error, self.cost_of(mask)))
        else:
            reason = f"The sub-network {reprlib.repr(sample.member)} has the error {error}"
            logger.warning("%s: it is left out.", reason)
            from_main_process(lambda: self.study.fail(sample, reason))


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of the weights."""
    return update_digest(hashlib.sha256(), model.state_dict()).hexdigest()


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _labelled(model: PreTrainedModel, data: Any, **options: Any) -> Calibrator:
    calibrator = data if isinstance(data, Calibrator) else Calibrator(model, data, labels=True, **options)
    if calibrator.model is not model or not calibrator.labels:
        raise ConfigError("A Calibrator must be made for the model that is searched, with labels=True.")
    return calibrator


def _cost_table(model: PreTrainedModel, cost: Metric, calibrator: Calibrator | None) -> CostTable:
    length, target = calibrator.lengths if calibrator is not None else (float(DEFAULT_LENGTH), None)
    lengths: dict[str, Any] = {"sequence_length": length, "target_length": target}
    if cost != "latency":
        return CostTable(model, **lengths)
    rounded = {name: value and max(round(value), 1) for name, value in lengths.items()}
    return CostTable(model, **lengths, latency=from_main_process(lambda: latency_table(model, **rounded)))
