"""Whether a model divides its loss by the items of a step, as `Trainer` takes for granted."""

from typing import Any

import torch
from accelerate.utils import gather
from transformers import PreTrainedModel

from ..timing import evaluating


def divides_by_items(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether the loss of a model is divided by the number of items that it is given, as one forward pass tells.

    `Trainer` takes every forward with `**kwargs` for one that does, and multiplies the loss by the number of processes
    and accumulated batches; many models return a mean whatever they are given.

    Args:
        model (`PreTrainedModel`): The model.
        inputs (`dict`): A batch with labels, on the model's device.

    Returns:
        `bool`: The same in all processes, which must all ask.
    """
    nan = torch.tensor(float("nan"), device=model.device)
    with evaluating(model):
        outputs = model(**{**inputs, "num_items_in_batch": nan})
    loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    # A batch without labels has no mean in any case: all processes go by those that have labels.
    return bool(gather(loss.isnan().any().int().view(1)).all())
