"""How far the predictions of a model are from those of another one, for every kind of head.

Distributions (classification, language models, spans of question answering) are compared by γ²·KL at temperature γ, as
in knowledge distillation; numbers (regression, the hidden states of a model without a head) by their squared error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .errors import UnsupportedModelError


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for a batch.

    Args:
        logits (`torch.Tensor`): (rows, classes), one row a prediction: an example, or a token.
        counts (`list[int]`): Rows of each example, in the order of the rows.
        numbers (`bool`): They are numbers rather than the logits of a distribution.
    """

    logits: torch.Tensor
    counts: list[int]
    numbers: bool = False


def predictions(
    model: PreTrainedModel, outputs: Mapping[str, torch.Tensor], real: torch.Tensor | None
) -> list[Predictions]:
    """The predictions in the outputs of a model: one entry, two for the start and the end of a span.

    Args:
        model (`PreTrainedModel`): The model.
        outputs (`ModelOutput`): What its forward pass returned.
        real (`torch.Tensor`, *optional*): Which tokens are real, bool of shape (batch, tokens); all by default.

    Returns:
        `list[Predictions]`: In float32. A row is an example; for models of tokens a real token; where several labels
        hold at once a label, against its absence.

    Raises:
        UnsupportedModelError: The head is of another kind, or predicts for other positions than the input has.
    """
    rows = [len(value) for value in outputs.values() if isinstance(value, torch.Tensor) and value.dim()]  # no loss
    config, single = model.config, [1] * (len(real) if real is not None else rows[0])
    if "start_logits" in outputs:
        spans = [outputs["start_logits"].float(), outputs["end_logits"].float()]
        if real is not None:
            spans = [span.masked_fill(~real, torch.finfo(span.dtype).min) for span in spans]
        return [Predictions(span, single) for span in spans]
    if "logits" in outputs:
        logits = outputs["logits"].float()
        if logits.dim() == 3:
            return [_of_tokens(logits, real, model)]
        if logits.dim() == 2 and (config.num_labels == 1 or config.problem_type == "regression"):
            return [Predictions(logits, single, numbers=True)]
        if logits.dim() == 2 and config.problem_type == "multi_label_classification":
            pairs = torch.stack([torch.zeros_like(logits), logits], -1).flatten(0, 1)
            return [Predictions(pairs, [logits.shape[1]] * len(logits))]
        if logits.dim() == 2:
            return [Predictions(logits, single)]
    elif "last_hidden_state" in outputs:
        return [_of_tokens(outputs["last_hidden_state"].float(), real, model, numbers=True)]
    raise UnsupportedModelError(
        f"{type(model).__name__} returns {', '.join(outputs)}: only the predictions of classifiers, regressors, "
        "language models and question answering, and the hidden states of a model without a head, can be compared."
    )


def _of_tokens(
    values: torch.Tensor, real: torch.Tensor | None, model: PreTrainedModel, numbers: bool = False
) -> Predictions:
    if real is None:
        real = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    if real.shape != values.shape[:2]:
        raise UnsupportedModelError(
            f"{type(model).__name__} predicts for {tuple(values.shape[:2])} positions where the input has "
            f"{tuple(real.shape)}: its padding can't be told apart."
        )
    return Predictions(values[real], real.sum(1).tolist(), numbers)


def divergence(student: Predictions, teacher: Predictions, temperature: float = 1.0) -> torch.Tensor:
    """γ²·KL(softmax(teacher/γ) ‖ softmax(student/γ)), or the squared error, of each prediction.

    Args:
        student, teacher ([`Predictions`]): Of the same batch.
        temperature (`float`, *optional*, defaults to 1.0): γ. The squared error of numbers has none.

    Returns:
        `torch.Tensor`: One for each row, of shape (rows,); of numbers the mean over their columns.
    """
    if student.numbers:
        return (student.logits - teacher.logits).square().mean(1)
    log_student, log_teacher = (F.log_softmax(p.logits / temperature, 1) for p in (student, teacher))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)


def curvature(student: Predictions, temperature: float, seeds: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Directions v(z) whose squared gradients add up to the curvature of [`divergence`] where both models agree.

    With H = J₁ᵀ·J₁ + J₂ᵀ·J₂ + … the Gauss-Newton matrix of one prediction, the k-th entry has a row of J_k for its
    gradient. Exact for up to three classes and for one number; otherwise one random direction with that expectation:
    a class drawn from the prediction, or random signs. Where an example has several predictions, the square of the
    sum of their gradients has the sum of their squares for its expectation.

    Args:
        student ([`Predictions`]): The predictions, part of an autograd graph.
        temperature (`float`): γ.
        seeds (sequence of sequences of `int`): For the random directions of each example, as `numpy` takes them.

    Returns:
        `list[torch.Tensor]`: Each of shape (rows,).
    """
    logits = student.logits
    rows, classes = logits.shape
    width = classes if student.numbers else 2
    noise = [np.random.default_rng(seed).random((n, width)) for n, seed in zip(student.counts, seeds, strict=True)]
    uniform = torch.from_numpy(np.concatenate(noise)).to(logits.device, torch.float32)
    signs = torch.where(uniform < 0.5, -1.0, 1.0).to(logits)
    if student.numbers:
        return [(2 / classes) ** 0.5 * (logits * signs).sum(1)]
    # KL has the Hessian (diag p − p·pᵀ) / γ² by the logits, which γ² undoes: p at temperature γ is what remains.
    p = (logits.detach() / temperature).softmax(1)
    if classes == 2:
        return [signs[:, 0] * p.prod(1).sqrt() * (logits[:, 1] - logits[:, 0])]
    log_p = logits - (p * logits).sum(1, keepdim=True)  # gradient e_y − p
    if classes == 3:
        return [signs[:, 0] * p[:, y].sqrt() * log_p[:, y] for y in range(3)]
    drawn = torch.searchsorted(p.cumsum(1), uniform[:, 1:].to(p).contiguous()).clamp_max(classes - 1)
    return [log_p.gather(1, drawn)[:, 0]]
