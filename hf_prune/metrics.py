"""Metrics that need no network, and their door to the Trainer.

`evaluate.load("accuracy")` downloads a script. These are the same metrics under the same keys, as classes; any other
`evaluate.EvaluationModule` works beside them.
"""

from collections.abc import Callable

import datasets
import evaluate
import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

from .errors import ConfigError


class _Metric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    dtype = "int64"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description=f"predictions and references: lists of {self.dtype}, one for each example.",
            features=datasets.Features({name: datasets.Value(self.dtype) for name in ("predictions", "references")}),
        )


class Accuracy(_Metric):
    """Share of predictions that equal their reference. Key: `"accuracy"`.

    Examples:
        ```python
        >>> Accuracy().compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
        {'accuracy': 0.75}
        ```
    """

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(_Metric):
    """Harmonic mean of precision and recall. Key: `"f1"`.

    Of two classes `pos_label` counts; for more, `compute(..., average="macro")`, `"micro"` or `"weighted"`.
    """

    def _compute(
        self, predictions: list[int], references: list[int], average: str = "binary", pos_label: int = 1
    ) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average=average, pos_label=pos_label))}


class Matthews(_Metric):
    """Matthews correlation of predicted and true classes, -1 to 1. Key: `"matthews_correlation"`."""

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class Spearman(_Metric):
    """Rank correlation of predicted and true numbers, -1 to 1, for regression. Key: `"spearmanr"`."""

    dtype = "float64"

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"spearmanr": float(spearmanr(references, predictions).statistic)}


def compute_metrics_for(*metrics: evaluate.EvaluationModule) -> Callable[[EvalPrediction], dict[str, float]]:
    """Make the `compute_metrics` of a `Trainer` from metrics.

    Several classes: the class of the highest logit is the prediction. One logit: it is the prediction (regression).
    Positions with the label -100 don't count, so it serves the classification of tokens too.

    Args:
        metrics (`evaluate.EvaluationModule`): The metrics. Their results are merged into one dict.

    Raises:
        ConfigError: No metric is given. The function that comes back raises it if logits and labels don't fit.

    Examples:
        ```python
        >>> trainer = Trainer(model, args, eval_dataset=dataset, compute_metrics=compute_metrics_for(Accuracy(), F1()))
        ```
    """
    if not metrics:
        raise ConfigError("compute_metrics_for needs at least one metric, such as Accuracy().")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, np.asarray(prediction.label_ids)
        # Models that return more than logits (hidden states, the encoder's states) give a tuple with the logits first.
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
        answers = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
        if answers.shape != labels.shape:
            raise ConfigError(
                f"Logits of shape {logits.shape} don't fit labels of shape {labels.shape}: one class or one number is "
                "predicted for each label."
            )
        counts = labels != -100
        results: dict[str, float] = {}
        for metric in metrics:
            results |= metric.compute(predictions=answers[counts], references=labels[counts])
        return results

    return compute_metrics
