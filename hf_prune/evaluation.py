"""The quality of a model, on labelled data that are read once and kept."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import EvalPrediction, PreTrainedModel

from .batches import Batch, is_causal_lm
from .calibration import Calibrator
from .errors import ConfigError, PruningError, unknown
from .timing import evaluating

ComputeMetrics = Callable[[EvalPrediction], Mapping[str, float]]
_KEYS = {"accuracy": "accuracy", "f1": "f1", "matthews": "matthews_correlation", "spearman": "spearmanr"}
METRICS = (*_KEYS, "loss", "perplexity")


class Evaluator:
    """Runs models over labelled examples, and says how good they are ([`measure`]), or how wrong (a call).

    Args:
        calibrator ([`Calibrator`]): The examples, with labels.
        metric (`str`): `"accuracy"`, `"f1"`, `"matthews"` or `"spearman"`, of which the error is 1 - metric;
            `"loss"` or its exponential, `"perplexity"`, which are the error; or a key of what `compute_metrics`
            returns.
        compute_metrics (`Callable`, *optional*): As for `Trainer`: takes an `EvalPrediction`, returns a dict.
        greater_is_better (`bool`, *optional*, defaults to `True`): Of the metric of `compute_metrics`: its error is
            1 - metric, otherwise the metric.

    Raises:
        ConfigError: The metric is unknown, or one of classifiers for a causal language model.

    With several processes each runs its share of the batches, and all return the result on all of them.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        metric: str,
        compute_metrics: ComputeMetrics | None = None,
        greater_is_better: bool = True,
    ) -> None:
        if compute_metrics is None and metric not in METRICS:
            raise ConfigError(
                unknown("metric", metric, METRICS, "For another one pass compute_metrics=, as to Trainer.")
            )
        if compute_metrics is None and metric in _KEYS and is_causal_lm(calibrator.model):
            raise ConfigError(
                f"{metric!r} is for classifiers, a {type(calibrator.model).__name__} predicts the next token: choose "
                "'perplexity' or 'loss', or pass compute_metrics=, as to Trainer."
            )
        self.calibrator, self.metric = calibrator, metric
        self.key = metric if compute_metrics is not None else _KEYS.get(metric, metric)
        self.compute_metrics = compute_metrics
        if compute_metrics is None and metric in _KEYS:
            self.compute_metrics = _named(metric)
        self.greater_is_better = greater_is_better and self.compute_metrics is not None  # loss and perplexity are not

    def __call__(self, model: PreTrainedModel) -> float:
        """The error of a model of the calibrator's class, the lower the better. NaN as for [`measure`]."""
        value = self.measure(model)
        return 1 - value if self.greater_is_better else value

    def measure(self, model: PreTrainedModel) -> float:
        """The metric of a model of the calibrator's class.

        Args:
            model (`PreTrainedModel`): The model, such as a sub-network of the calibrator's.

        Returns:
            `float`: Over the examples of all processes. NaN where a logit or the loss is NaN or infinite.

        Raises:
            ConfigError: The model returns no logits, or no loss for these labels; logits and labels don't fit; or
                `compute_metrics` does not return the metric.
        """
        measure = self._loss if self.compute_metrics is None else self._predictions
        with evaluating(model):
            mine = [
                (self.calibrator.examples[index][0], *measure(model, batch))
                for index, batch in self.calibrator.batches("evaluate")
            ]
        # In the order of the batches, so that sums do not depend on the number of processes.
        found = [tuple(entries) for _, *entries in sorted(gather_object(mine), key=lambda entry: entry[0])]
        if self.compute_metrics is None:
            items = sum(count for _, count in found)
            loss = sum(value * count for value, count in found) / items
            return torch.tensor(loss, dtype=torch.float64).exp().item() if self.metric == "perplexity" else loss
        predictions, labels = (_joined(parts) for parts in zip(*found, strict=True))
        if not all(np.isfinite(array).all() for array in _several(predictions)):
            return math.nan
        results = self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
        if self.key not in results:
            raise ConfigError(unknown("metric", self.key, results, "These are what compute_metrics returns."))
        return float(results[self.key])

    def _loss(self, model: PreTrainedModel, batch: Batch) -> tuple[float, int]:
        """The mean loss of a batch, and over how many labels it is a mean."""
        loss = self.calibrator.forward(batch, model).loss
        if loss is None:
            raise ConfigError(f"{type(model).__name__} returns no loss for these labels: choose another metric.")
        labels = batch.get("labels")
        if labels is None:
            return loss.item(), len(next(iter(batch.values())))
        if labels.dim() == 2 and is_causal_lm(model):
            labels = labels[:, 1:]  # each token is predicted from those before it
        return loss.item(), int(labels.ne(-100).sum())

    def _predictions(self, model: PreTrainedModel, batch: Batch) -> tuple[Any, Any]:
        outputs = self.calibrator.forward(batch, model)
        logits = [_array(outputs[name]) for name in outputs if name.endswith("logits")]
        names = ["labels"] if "labels" in batch else ["start_positions", "end_positions"]
        labels = [batch[name].cpu().numpy() for name in names]
        if not logits:
            raise ConfigError(
                f"{type(model).__name__} returns no logits but {', '.join(outputs)}: choose the metric 'loss'."
            )
        return _one_or_all(logits), _one_or_all(labels)


def load_metrics() -> Any:
    """The module [`metrics`], which needs packages that hf_prune does not.

    Raises:
        PruningError: One of them is not installed.
    """
    try:
        from . import metrics
    except ImportError as error:
        raise PruningError(f"Metrics need {error.name}: pip install 'hf_prune[examples]'") from error
    return metrics


def _named(metric: str) -> ComputeMetrics:
    metrics = load_metrics()
    compute: ComputeMetrics = metrics.compute_metrics_for(getattr(metrics, metric.capitalize())())
    return compute


def _array(logits: torch.Tensor) -> np.ndarray:
    return logits.float().cpu().numpy()


def _one_or_all(arrays: list[np.ndarray]) -> Any:
    return arrays[0] if len(arrays) == 1 else tuple(arrays)


def _several(arrays: Any) -> tuple[np.ndarray, ...]:
    return arrays if isinstance(arrays, tuple) else (arrays,)


def _joined(parts: tuple[Any, ...]) -> Any:
    """Batches as one array, or as a tuple of them; where they have tokens, padded with -100 as `Trainer` does."""
    columns = list(zip(*map(_several, parts), strict=True))
    joined = []
    for column in columns:
        if column[0].ndim > 1:
            longest = max(array.shape[1] for array in column)
            column = tuple(
                np.pad(
                    array, [(0, 0), (0, longest - array.shape[1])] + [(0, 0)] * (array.ndim - 2), constant_values=-100
                )
                for array in column
            )
        joined.append(np.concatenate(column))
    return _one_or_all(joined)
