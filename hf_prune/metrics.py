"""Metrics that need no network, and their door to the Trainer.

`evaluate.load("accuracy")` downloads a script. These are the same metrics under the same keys, as classes; any other
`evaluate.EvaluationModule` works beside them.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from scipy.stats import spearmanr, t as student
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedModel

from .errors import CalibrationError, ConfigError, UnsupportedModelError, unknown
from .offload import execution_device
from .timing import evaluating


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


class Perplexity(_Metric):
    """Perplexity of a causal language model on texts. Key: `"perplexity"`. See [`perplexity`] for the options.

    Examples:
        ```python
        >>> Perplexity().compute(predictions=dataset["text"], model=model, tokenizer=tokenizer, window=1024)
        {'perplexity': 15.79}
        ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="predictions: list of str, the texts.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self, predictions: list[str], model: PreTrainedModel, tokenizer: Any, **options: Any
    ) -> dict[str, float]:
        if all(len(text) == 1 for text in predictions):  # evaluate takes a str for a list of its letters
            raise ConfigError(
                "Perplexity().compute got texts of one letter each, as of a single str: give a list of texts. For a "
                "file call hf_prune.metrics.perplexity(model, tokenizer, path)."
            )
        return {"perplexity": perplexity(model, tokenizer, predictions, **options)}


def perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: str | os.PathLike[str] | Iterable[str],
    *,
    window: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, each predicted from those before it in a window.

    The texts become one, with empty lines between them. Windows over its tokens begin every `stride` tokens, and a
    token counts in the first window that holds it. With a smaller stride a token sees at least `window - stride`
    others; by default windows don't overlap, as in the tables of papers, and their first tokens are not predicted.

    Args:
        model (`PreTrainedModel`): A causal language model.
        tokenizer: Its tokenizer. Special tokens are those that it puts around the whole text.
        texts (`str`, path, or iterable of `str`): A text file (UTF-8), or texts: a list, or a column of a `Dataset`.
        window (`int`, *optional*, defaults to 1024): Tokens in a window.
        stride (`int`, *optional*): Tokens between the begins of two windows. Defaults to `window`.
        max_tokens (`int`, *optional*): Read only the first tokens.

    Returns:
        `float`: 1 or more; infinite where a float64 does not hold it.

    Raises:
        ConfigError: An option is out of range, or the model has fewer positions than `window`.
        CalibrationError: There is no such file, or the text has fewer than two tokens.
        UnsupportedModelError: The model is no causal language model.

    Examples:
        ```python
        >>> perplexity(model, tokenizer, "wiki.valid.txt", window=1024, max_tokens=4096)  # 4 windows
        15.79
        ```
    """
    return estimate_perplexity(model, tokenizer, texts, window=window, stride=stride, max_tokens=max_tokens).value


@dataclass(frozen=True)
class PerplexityEstimate:
    """What [`estimate_perplexity`] returns.

    Args:
        value (`float`): The perplexity.
        n (`int`): Tokens that were predicted.
        windows (`int`): Windows that they were in.
        interval (`tuple[float, float]`, *optional*): 95 % confidence interval. `None` of a single window, or where the
            perplexity is not finite.
    """

    value: float
    n: int
    windows: int
    interval: tuple[float, float] | None


def estimate_perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: str | os.PathLike[str] | Iterable[str],
    *,
    window: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> PerplexityEstimate:
    """[`perplexity`] with its number of tokens and a 95 % confidence interval, for a report and its model card.

    The tokens of a window depend on each other, so a window counts as one observation: of the mean negative
    log-likelihoods of k windows, weighted by their tokens, the interval is mean ± t · standard error, exponentiated. t
    is the quantile of Student's distribution with k - 1 degrees of freedom: 1.98 for a hundred windows, 12.7 for two.

    Args:
        model, tokenizer, texts, window, stride, max_tokens: As for [`perplexity`], which raises the same errors.

    Returns:
        [`PerplexityEstimate`]: `value`, `n`, `windows` and `interval`.

    Examples:
        ```python
        >>> before = estimate_perplexity(dense, tokenizer, "wiki.valid.txt")
        >>> after = estimate_perplexity(model, tokenizer, "wiki.valid.txt")
        >>> row = {"metric": "perplexity", "before": before.value, "after": after.value, "n": after.n}
        >>> row |= {"windows": after.windows, "interval_before": before.interval, "interval_after": after.interval}
        >>> result.report.evaluation = [row]
        ```
    """
    stride = window if stride is None else stride
    for name, value, low, high in (
        ("window", window, 2, getattr(model.config, "max_position_embeddings", None)),
        ("stride", stride, 1, window),
        ("max_tokens", max_tokens, 2, None),
    ):
        if value is not None and (type(value) is not int or value < low or (high is not None and value > high)):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ConfigError(f"{name} must be a whole number {limits}, got {value!r}.")
    if model.config.is_encoder_decoder or getattr(model, "loss_type", None) not in (None, "ForCausalLM"):
        raise UnsupportedModelError(
            f"Perplexity is about causal language models, {type(model).__name__} is none: measure its loss, or the "
            "accuracy of its task."
        )
    ids = torch.tensor(tokenizer(_joined(texts), verbose=False)["input_ids"][:max_tokens])
    if len(ids) < 2:
        raise CalibrationError(f"The perplexity of {len(ids)} tokens is undefined: give a text of at least 2 tokens.")
    sums, counts = [], []
    with evaluating(model):
        for part, new in _windows(ids.to(execution_device(model)), window, stride):
            logits = model(input_ids=part[None], use_cache=False).logits[0, -new - 1 : -1]
            loss = F.cross_entropy(logits.float(), part[-new:].to(logits.device), reduction="sum")
            sums.append(loss.item())
            counts.append(new)
    mean, half = _mean_and_half_width(np.array(sums), np.array(counts))
    with np.errstate(over="ignore"):  # infinite is an answer, and math.exp would raise
        value, low, high = np.exp([mean, mean - half, mean + half]).tolist()
    interval = (low, high) if np.isfinite([low, high]).all() else None
    return PerplexityEstimate(value, sum(counts), len(counts), interval)


def _mean_and_half_width(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The mean of all tokens, and half of its 95 % confidence interval: NaN for one window."""
    k, mean = len(counts), sums.sum() / counts.sum()
    if k == 1:
        return mean, np.nan
    variance = k / (k - 1) * ((sums - mean * counts) ** 2).sum() / counts.sum() ** 2
    return mean, student.ppf(0.975, k - 1) * np.sqrt(variance)


def _windows(ids: torch.Tensor, window: int, stride: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Windows over tokens, and how many at the end of each are predicted there for the first time."""
    end = 0
    for begin in range(0, len(ids), stride):
        part = ids[begin : begin + window]
        new = min(begin + len(part) - end, len(part) - 1)
        if new:
            yield part, new
        end = begin + len(part)
        if end == len(ids):
            return


def _joined(texts: str | os.PathLike[str] | Iterable[str]) -> str:
    if not isinstance(texts, str | os.PathLike):
        return "\n\n".join(texts)
    try:
        return Path(texts).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"{str(texts):.200} is no text file ({error}): give a path, or a list of texts."
        ) from error


def lm_eval(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: list[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Results on tasks of EleutherAI's lm-evaluation-harness. Needs `pip install "hf_prune[eval]"`.

    Args:
        model (`PreTrainedModel`): A causal language model, pruned or not. It is used as it is.
        tokenizer: Its tokenizer.
        tasks (`list[str]`): Names of tasks: `["arc_easy", "hellaswag"]`. Most of them download their data.
        include_path (`str` or path, *optional*): A folder with task files (YAML) of one's own. Only these are known
            then, and with local data files they need no network.
        batch_size (`int`, *optional*, defaults to 1): Requests in a forward pass.
        options: Passed on to `lm_eval.simple_evaluate`: `limit`, `num_fewshot`.

    Returns:
        `dict[str, dict[str, float]]`: For each task its metrics by name.

    Raises:
        ConfigError: lm-eval is not installed, or there is no such task.

    Examples:
        ```python
        >>> lm_eval(model, tokenizer, ["arc_easy"], limit=200)["arc_easy"]["acc"]
        ```
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f'lm-eval is not installed ({error}): pip install "hf_prune[eval]".') from error
    path = str(include_path) if include_path is not None else None
    manager = TaskManager(include_path=path, include_defaults=path is None)
    for task in tasks:
        if task not in manager.all_tasks:
            raise ConfigError(unknown("task", task, manager.all_tasks)[:300])
    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(wrapped, tasks=tasks, task_manager=manager, log_samples=False, **options)
    return {
        task: {name.removesuffix(",none"): value for name, value in row.items() if isinstance(value, float)}
        for task, row in found["results"].items()
    }


def compute_metrics_for(*metrics: evaluate.EvaluationModule) -> Callable[[EvalPrediction], dict[str, float]]:
    """Make the `compute_metrics` of a `Trainer` from metrics.

    Several classes: the class of the highest logit is the prediction. One logit: it is the prediction (regression).
    Positions with the label -100 don't count, so it serves the classification of tokens too.

    Args:
        metrics (`evaluate.EvaluationModule`): The metrics. Their results are merged into one dict.

    Returns:
        `Callable`: Given an `EvalPrediction`, whose first predictions are the logits, returns a `dict[str, float]`.

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
