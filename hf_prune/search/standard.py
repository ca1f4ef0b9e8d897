"""[`standard_nas`]: the search that trains every sub-network, to compare with."""

import os
from collections.abc import Callable
from typing import Any

from optuna.pruners import BasePruner, SuccessiveHalvingPruner
from optuna.storages import BaseStorage
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..costs import METRICS, CostTable, Metric
from ..errors import ConfigError, unknown
from ..masks import PruningMask
from ..processes import from_main_process
from ..surgery import shrunk_copy
from .base import SearchSpace
from .engine import Search, fingerprint
from .front import ParetoFront
from .study import Sample


def standard_nas(
    model: PreTrainedModel,
    space: SearchSpace,
    trainer: Callable[[PreTrainedModel], Trainer],
    *,
    metric: str = "eval_loss",
    greater_is_better: bool = False,
    cost: Metric = "params",
    table: CostTable | None = None,
    method: str = "random",
    num_samples: int = 20,
    pruner: BasePruner | None = None,
    seed: int = 0,
    storage: str | os.PathLike[str] | BaseStorage | None = None,
    study_name: str = "hf_prune_standard",
) -> ParetoFront:
    """Search by training every sub-network on its own, from the weights that the model has.

    What a search in a super-network ([`search_subnetworks`]) is to be compared with: it costs a training for each
    sub-network. Those that do badly after an evaluation are given up. Klein et al. 2024 do so by successive halving
    over both objectives (MO-ASHA); Optuna's pruners know one objective, so that here they see the sum of the error and
    of the cost, as a ratio to that of the whole model.

    Args:
        model (`PreTrainedModel`): The pretrained model. It stays as it is.
        space ([`SearchSpace`]): Which sub-networks there are, made for this model.
        trainer (`Callable`): Given a sub-network, as a model of its own, returns the `Trainer` that trains it. It
            needs an `eval_strategy`.
        metric (`str`, *optional*, defaults to `"eval_loss"`): Which result of an evaluation counts.
        greater_is_better (`bool`, *optional*, defaults to `False`): Of the metric: its error is 1 - metric then.
        cost, table, seed, storage: See [`search_subnetworks`].
        method (`str`, *optional*, defaults to `"random"`): See [`search_subnetworks`].
        num_samples (`int`, *optional*, defaults to 20): Sub-networks to draw in all, earlier runs included.
        pruner (`optuna.pruners.BasePruner`, *optional*): Which ones to give up. Defaults to asynchronous successive
            halving: after 1, 3, 9, ... evaluations the best third goes on.
        study_name (`str`, *optional*, defaults to `"hf_prune_standard"`): Tells the searches in a storage apart.

    Returns:
        [`ParetoFront`]: Of the sub-networks that were trained to the end. Its errors are those after training;
        `extract` gives a sub-network as it was before, to be trained again, and `save_models` refuses.

    Raises:
        ConfigError: An option is wrong; the trainer does not evaluate, or has no such metric; the study in the storage
            was begun with other options.
        CalibrationError: No sub-network has a finite error.

    Examples:
        ```python
        >>> def trainer(small):
        ...     return Trainer(small, args, train_dataset=train, eval_dataset=validation, processing_class=tokenizer)
        >>> front = standard_nas(model, space, trainer, num_samples=30)
        ```
    """
    if cost not in METRICS:
        raise ConfigError(unknown("cost", cost, METRICS))
    pruner = pruner if pruner is not None else SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    identity = {
        "space": space.describe(),
        "metric": metric,
        "greater_is_better": greater_is_better,
        "cost": cost,
        "model": fingerprint(model),
    }
    options = {"method": method, "seed": seed, "storage": storage, "name": study_name, "pruner": pruner}
    table = table if table is not None else CostTable(model)
    search = Search(space, table, cost, identity, num_samples, options, trained=True)

    def train(sample: Sample, mask: PruningMask) -> float | None:
        run = trainer(shrunk_copy(model, mask))
        watch = _Watch(search, sample, search.cost_of(mask), metric, greater_is_better)
        run.add_callback(watch)
        run.train()
        if watch.error is None:
            if watch.others:
                raise ConfigError(
                    unknown("metric", metric, watch.others, "These are what the trainer's evaluations return.")
                )
            raise ConfigError("The trainer did not evaluate: give its arguments an eval_strategy, such as 'epoch'.")
        return None if watch.stopped else watch.error

    return search.run(train)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Reports each evaluation, and stops a training that is not worth going on."""

    def __init__(self, search: Search, sample: Sample, cost: float, metric: str, greater_is_better: bool) -> None:
        self.search, self.sample, self.cost = search, sample, cost
        self.metric, self.greater_is_better = metric, greater_is_better
        self.error: float | None = None
        self.others: set[str] = set()  # metrics of evaluations without the one that counts
        self.evaluations, self.stopped = 0, False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if self.metric not in metrics:  # of the dense model, or of another one of several data sets
            self.others |= set(metrics)
            return
        value = metrics[self.metric]
        self.error = 1 - value if self.greater_is_better else value
        self.evaluations += 1
        if state.global_step < state.max_steps and not from_main_process(self._goes_on):
            self.stopped = control.should_training_stop = True

    def _goes_on(self) -> bool:
        assert self.error is not None
        return self.search.study.report(self.sample, self.evaluations, self.error, self.cost)
