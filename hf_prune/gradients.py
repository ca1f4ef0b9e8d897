"""Gradients of losses by the inputs of sites, over calibration data."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from .batches import Batch, is_causal_lm
from .calibration import Calibrator, not_finite
from .errors import CalibrationError
from .gates import grad_inputs
from .statistics import Statistic
from .units import UnitGroup, base_model


def collect_gradients(
    calibrator: Calibrator,
    groups: Sequence[UnitGroup],
    statistics: Mapping[str, Statistic],
    *,
    per_sample: bool,
    description: str = "gradients",
) -> None:
    """Feed statistics with the gradients of the loss by unit masks of ones, in one forward and backward pass.

    The passes are over parts of the batches: activations are held for a few examples at a time.

    Args:
        calibrator ([`Calibrator`]): The data, with labels, and the model.
        groups (sequence of [`UnitGroup`]): Heads and neurons.
        statistics (`dict[str, Statistic]`): By name of a group. They get rows of shape (n, units): one a batch, of
            the mean loss of the batch; or, with `per_sample`, one an example, of its own loss.
        per_sample (`bool`): See above.
        description (`str`, *optional*): Of the progress bar.

    Raises:
        CalibrationError: The model returns no loss, or a gradient is NaN or infinite; the message names the site.
    """
    model, parts = calibrator.model, calibrator.in_parts()
    last = {numbers[-1] for numbers in calibrator.examples}

    def loss(index: int, batch: Batch) -> list[torch.Tensor]:
        value = calibrator.forward(batch).loss
        if value is None:
            raise CalibrationError(f"{type(model).__name__} returns no loss for these labels.")
        return [value if _loss_terms(model, batch).any() else value.nan_to_num()]  # the mean of nothing

    with calibrator.evaluating():
        sums, terms = dict.fromkeys(statistics, torch.zeros(())), torch.zeros(())
        passes = differentiate(parts, [g.name for g in groups], loss, description)
        for index, (batch, inputs, (gradients,)) in enumerate(passes):
            own = _loss_terms(model, batch)
            ends, terms = parts.examples[index][-1] in last, terms + own.sum()
            for group in groups:
                columns = mask_gradients(inputs[group.name], gradients[group.name], batch)
                rows = columns.reshape(-1, group.size, group.width).sum(2)
                # Of the sum of the loss, not of its mean: that of nothing has no gradient.
                rows = rows * own.sum() if own.any() else torch.zeros_like(rows)
                if per_sample:
                    statistics[group.name].update(rows / own.clamp_min(1))
                else:
                    sums[group.name] = sums[group.name] + rows.sum(0, keepdim=True)
                    if ends:
                        statistics[group.name].update(sums[group.name] / terms)
            if ends:
                sums, terms = dict.fromkeys(statistics, torch.zeros(())), torch.zeros(())
    calibrator.reduce(statistics)


def differentiate(
    calibrator: Calibrator,
    sites: Sequence[str],
    losses: Callable[[int, Batch], Sequence[torch.Tensor]],
    description: str,
) -> Iterator[tuple[Batch, dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]]:
    """For each batch the inputs of sites and the gradients of some losses by them. Parameters get none.

    Args:
        calibrator ([`Calibrator`]): The data and the model.
        sites (sequence of `str`): Names of unit groups.
        losses (`Callable`): Given the index of a batch and the batch, runs the model and returns scalars.
        description (`str`): Of the progress bar.

    Yields:
        The batch, for each site its input, and for each loss a gradient for each site.

    Raises:
        CalibrationError: A loss is NaN or infinite; the message names the first site whose input is.
    """
    model = calibrator.model
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for index, batch in calibrator.batches(description):
            with grad_inputs(base_model(model), sites) as inputs, torch.enable_grad():
                values = losses(index, batch)
                if not all(value.isfinite() for value in values):  # then so is every gradient, at sites below too
                    raise not_finite(next((n for n, x in inputs.items() if not x.isfinite().all()), None))
                gradients = [
                    dict(
                        zip(
                            inputs,
                            torch.autograd.grad(v, list(inputs.values()), retain_graph=v is not values[-1]),
                            strict=True,
                        )
                    )
                    for v in values
                ]
            yield batch, {name: x.detach() for name, x in inputs.items()}, gradients
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _loss_terms(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """How many terms of the mean loss of a batch are those of each example: float64, (examples, 1)."""
    labels = batch.get("labels")
    if labels is None or labels.dim() < 2:
        return torch.ones(len(next(iter(batch.values()))), 1, dtype=torch.float64, device=model.device)
    if is_causal_lm(model):
        labels = labels[:, 1:]  # each token is predicted from those before it
    return labels.ne(-100).flatten(1).sum(1, keepdim=True).double()


def mask_gradients(inputs: torch.Tensor, gradients: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Gradients of a loss by a mask of ones on the columns of a site's input, for each example.

    By the chain rule Σ x·∂loss/∂x over the tokens of the example, with x the input that the mask multiplies.

    Args:
        inputs (`torch.Tensor`): The input of the site, (batch, tokens, columns) or (batch * tokens, columns).
        gradients (`torch.Tensor`): Of the loss by it, of the same shape.
        batch (`dict[str, torch.Tensor]`): The batch, which says how many examples there are.

    Returns:
        `torch.Tensor`: float64 of shape (examples, columns).
    """
    samples = len(next(iter(batch.values())))
    products = (inputs.float() * gradients.float()).reshape(samples, -1, inputs.shape[-1])
    return products.sum(1).double()
