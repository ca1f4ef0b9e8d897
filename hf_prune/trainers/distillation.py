"""Distillation: a student learns the logits of a teacher."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer

from ..errors import ConfigError
from .loss_items import divides_by_items


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


class DistillingTrainer(Trainer):  # type: ignore[misc]  # transformers is not type-checked here
    """A `Trainer` whose model also learns from a teacher, once it has one.

    Its args are [`PruningTrainingArguments`], without a teacher any.

    The loss is the same with several processes and accumulated steps as with one large batch: divided by all items of
    the step where the model's own loss does so, else a mean of means. Which of them a model does, one forward pass of
    the first batch tells.
    """

    teacher_model: Any = None
    model_accepts_loss_kwargs: bool
    _items_unsure = True

    def learn_from(self, teacher_model: PreTrainedModel) -> None:
        """Let the model learn the logits of `teacher_model`, with `args.distillation_weight`.

        Raises:
            ConfigError: The two share weights.
        """
        if _storages(teacher_model) & _storages(self.model):
            raise ConfigError(
                "teacher_model shares weights with the model, which would be frozen with it: pass another one, loaded "
                "afresh, or copy.deepcopy(model)."
            )
        self.teacher_model = teacher_model.to(self.args.device).eval().requires_grad_(False)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        own_loss = self.compute_loss_func is None and self.label_smoother is None
        if self._items_unsure and self.model_accepts_loss_kwargs and own_loss and "labels" in (*batch_samples, {})[0]:
            self._items_unsure = False
            self.model_accepts_loss_kwargs = divides_by_items(self.model, self._prepare_inputs(dict(batch_samples[0])))
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.teacher_model is None or not self.args.distillation_weight or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)  # label smoothing takes the labels out
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():
            taught = self.teacher_model(**given)
        distance = self.distance(given, outputs, taught, self.args.distillation_temperature, num_items_in_batch)
        loss = (1 - self.args.distillation_weight) * loss + self.args.distillation_weight * distance
        return (loss, outputs) if return_outputs else loss

    def distance(
        self, inputs: dict[str, Any], outputs: Any, taught: Any, temperature: float, num_items_in_batch: Any
    ) -> torch.Tensor:
        """[`distillation_loss`] of all logits, over the positions and items that the task's loss counts.

        Args:
            inputs (`dict`): What the model was called with, labels included.
            outputs, taught (`ModelOutput`): What the model and its teacher returned.
            temperature (`float`): See [`distillation_loss`].
            num_items_in_batch (*optional*): What the `Trainer` hands to `compute_loss`.
        """
        # As the task's loss: over all items of the step where the Trainer counts them, else a mean of this batch.
        items = num_items_in_batch if self.model_accepts_loss_kwargs or self.compute_loss_func is not None else None
        if items is not None and self.args.average_tokens_across_devices:
            items = items / self.accelerator.num_processes
        losses = []
        for name in logits_of(outputs):
            keep = counted_positions(inputs, outputs[name], self._loss_shifts_labels)
            losses.append(distillation_loss(outputs[name], taught[name], temperature, keep, items))
        return torch.stack(losses).mean()


def _storages(model: Any) -> set[int]:
    """Where the weights of a model lie."""
    return {p.untyped_storage().data_ptr() for p in model.parameters()} - {0}
