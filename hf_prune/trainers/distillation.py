"""Distillation: a student learns the logits of a teacher."""

from typing import Any

import torch
from torch.nn import functional as F

from ..errors import ConfigError


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float = 2.0,
    keep: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over positions; for a single logit the squared distance.

    Args:
        student, teacher (`torch.Tensor`): Logits of shape (..., classes).
        temperature (`float`, *optional*, defaults to 2.0): T.
        keep (`torch.Tensor`, *optional*): bool of shape (...): positions that count.
        num_items (`torch.Tensor` or `int`, *optional*): Divide the sum by this instead of the number of positions.

    Raises:
        ConfigError: The shapes differ.
    """
    if student.shape != teacher.shape:
        raise ConfigError(
            f"The teacher's logits have shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}: the "
            "teacher must predict the same classes (or words of the same vocabulary)."
        )
    student, teacher = student.float(), teacher.float()
    if student.shape[-1] == 1:
        loss = (student - teacher).square().squeeze(-1)
    else:
        p, q = (F.log_softmax(logits / temperature, -1) for logits in (teacher, student))
        loss = F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * temperature**2
    if keep is not None:
        loss = loss.masked_fill(~keep, 0)
    if num_items is None:
        num_items = keep.sum().clamp_min(1) if keep is not None else loss.numel()
    return loss.sum() / num_items


def logits_of(outputs: Any) -> list[str]:
    """Names of the logits among the outputs of a model.

    Raises:
        ConfigError: There are none.
    """
    names = [name for name in outputs if name.endswith("logits")]
    if not names:
        raise ConfigError(f"Distillation needs logits, this model returns {', '.join(outputs)}.")
    return names


def counted_positions(inputs: dict[str, torch.Tensor], logits: torch.Tensor, shifted: bool) -> torch.Tensor | None:
    """Which positions of logits have a label, bool of shape (...). `None` where the inputs don't say.

    Args:
        inputs (`dict`): What the model was called with.
        logits (`torch.Tensor`): (..., classes).
        shifted (`bool`): Position i predicts label i + 1 (causal language models).
    """
    labels = inputs.get("labels")
    if labels is None or labels.shape != logits.shape[:-1]:
        return None
    if shifted:
        labels = F.pad(labels[..., 1:], (0, 1), value=-100)
    return labels != -100
