"""How far the predictions of a model are from those of another one, for every kind of head.

Distributions (classification, language models, spans of question answering) are compared by γ²·KL at temperature γ, as
in knowledge distillation; numbers (regression, the hidden states of a model without a head) by their squared error.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .errors import UnsupportedModelError


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for a batch.

    Args:
        logits (`torch.Tensor`): (rows, classes), one row a prediction: an example, or a token.
        numbers (`bool`): They are numbers rather than the logits of a distribution.
    """

    logits: torch.Tensor
    numbers: bool = False


def predictions(
    model: PreTrainedModel, outputs: Mapping[str, torch.Tensor], real: torch.Tensor | None
) -> list[Predictions]:
    """The predictions in the outputs of a model: one entry, two for the start and the end of a span.

    Args:
        model (`PreTrainedModel`): The model.
        outputs (`ModelOutput`): What its forward pass returned.
        real (`torch.Tensor`, *optional*): Which tokens are real, (batch, tokens); all by default.

    Raises:
        UnsupportedModelError: The head is of another kind.
    """
    if "start_logits" in outputs:
        spans = [outputs["start_logits"].float(), outputs["end_logits"].float()]
        if real is not None:
            spans = [span.masked_fill(~real, torch.finfo(span.dtype).min) for span in spans]
        return [Predictions(span) for span in spans]
    if "logits" in outputs:
        logits, config = outputs["logits"].float(), model.config
        if logits.dim() == 3:
            return [Predictions(_real_rows(logits, real, model))]
        if logits.dim() == 2 and (config.num_labels == 1 or config.problem_type == "regression"):
            return [Predictions(logits, numbers=True)]
        if logits.dim() == 2 and config.problem_type == "multi_label_classification":
            return [Predictions(torch.stack([torch.zeros_like(logits), logits], -1).flatten(0, 1))]
        if logits.dim() == 2:
            return [Predictions(logits)]
    elif "last_hidden_state" in outputs:
        return [Predictions(_real_rows(outputs["last_hidden_state"].float(), real, model), numbers=True)]
    raise UnsupportedModelError(
        f"{type(model).__name__} returns {', '.join(outputs)}: only the predictions of classifiers, regressors, "
        "language models and question answering, and the hidden states of a model without a head, can be compared."
    )


def _real_rows(values: torch.Tensor, real: torch.Tensor | None, model: PreTrainedModel) -> torch.Tensor:
    if real is None:
        return values.flatten(0, 1)
    if real.shape != values.shape[:2]:
        raise UnsupportedModelError(
            f"{type(model).__name__} predicts for {tuple(values.shape[:2])} positions where the input has "
            f"{tuple(real.shape)}: its padding can't be told apart."
        )
    return values[real]


def divergence(student: Predictions, teacher: Predictions, temperature: float = 1.0) -> torch.Tensor:
    """γ²·KL(softmax(teacher/γ) ‖ softmax(student/γ)), or the squared error, of each prediction: (rows,).

    Args:
        student, teacher ([`Predictions`]): Of the same batch.
        temperature (`float`, *optional*, defaults to 1.0): γ.
    """
    if student.numbers:
        return (student.logits - teacher.logits).square().mean(1)
    log_student, log_teacher = (F.log_softmax(p.logits / temperature, 1) for p in (student, teacher))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)


def curvature(student: Predictions, temperature: float, generator: torch.Generator) -> list[torch.Tensor]:
    """Directions v(z) whose squared gradients add up to the curvature of [`divergence`] where both models agree.

    With H = J₁ᵀ·J₁ + J₂ᵀ·J₂ + … the Gauss-Newton matrix of one prediction, the k-th entry has a row of J_k for its
    gradient. Exact for up to three classes and for one number; otherwise one random direction with that expectation:
    a class drawn from the prediction, or random signs.

    Args:
        student ([`Predictions`]): The predictions, part of an autograd graph.
        temperature (`float`): γ.
        generator (`torch.Generator`): For the random directions.

    Returns:
        `list[torch.Tensor]`: Each of shape (rows,).
    """
    logits = student.logits
    rows, classes = logits.shape
    if student.numbers:
        signs = torch.randint(0, 2, (rows, classes), generator=generator).to(logits) * 2 - 1
        return [(2 / classes) ** 0.5 * (logits if classes == 1 else logits * signs).sum(1)]
    # KL has the Hessian (diag p − p·pᵀ) / γ² by the logits, which γ² undoes: p at temperature γ is what remains.
    p = (logits.detach() / temperature).softmax(1)
    if classes == 2:
        return [p.prod(1).sqrt() * (logits[:, 1] - logits[:, 0])]
    log_p = logits - (p * logits).sum(1, keepdim=True)  # gradient e_y − p
    if classes == 3:
        return [p[:, y].sqrt() * log_p[:, y] for y in range(3)]
    drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
    return [log_p.gather(1, drawn)[:, 0]]
