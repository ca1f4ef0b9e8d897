"""Prove an entry of the table of families on a model."""

import copy
import tempfile

import torch
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .gates import apply_mask, remove_mask
from .hub.saving import first_output, save_pretrained
from .masks import PruningMask
from .surgery import shrink
from .timing import example_inputs
from .units import PrunableUnits, UnitGroup, prunable_units


def verify_architecture(model: PreTrainedModel, inputs: dict[str, torch.Tensor] | None = None) -> None:
    """Prove that the entry of a family is right, on copies of a model: run it once for each family that you register.

    Checked are: every gate is live (closing all but one unit of a group changes the output); masked == shrunk for
    heads, neurons and layers; the shrunk model saves, loads again and computes the same.

    Args:
        model (`PreTrainedModel`): A small model of the family in float32, random weights will do. It is not changed.
        inputs (`dict[str, torch.Tensor]`, *optional*): What to call it with. Random inputs by default.

    Raises:
        UnsupportedModelError: The entry is wrong; the message names the group of units.
        ConfigError: Inputs of the kind that the model takes can't be made at random: pass `inputs`.
        SaveError: A shrunk model can't be saved, or does not reload to the same function.
    """
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "norm" not in name.lower():
                parameter.normal_(std=0.2)  # fresh models are so close to zero that wrong cuts would pass
    inputs = inputs if inputs is not None else example_inputs(model, batch_size=2, sequence_length=8)
    units = prunable_units(model)
    dense = first_output(model, inputs)
    for group in units.of_kind("heads", "neurons"):
        if group.prunable and group.size > 1:
            apply_mask(model, PruningMask({group.name: torch.arange(group.size) == 0}, units))
            if torch.allclose(first_output(model, inputs), dense, atol=1e-7):
                raise UnsupportedModelError(
                    f"Closing the gates at {group.name} changes nothing: it is not on the path of the output."
                )
            remove_mask(model)
    for mask, what in _masks(units):
        small = copy.deepcopy(model)
        apply_mask(small, mask)
        masked = first_output(small, inputs)
        try:
            shrunk = first_output(shrink(small), inputs)
        except (RuntimeError, ValueError, AttributeError) as error:
            raise UnsupportedModelError(f"{what} can't be cut as the entry says: {error}") from error
        gap = (masked - shrunk).abs().max()
        if not gap <= 1e-4 * masked.abs().max().clamp_min(1):
            raise UnsupportedModelError(
                f"Cutting {what} changes the output by {gap:.1e}: the rows or columns are not those of the units."
            )
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(small, folder)  # compares what it reloads


def _masks(units: PrunableUnits) -> list[tuple[PruningMask, str]]:
    """One mask per kind that keeps about half, not the first, and differs from layer to layer; one that keeps none."""

    def half(group: UnitGroup) -> torch.Tensor:
        keep = torch.arange(group.size) % 2 == (group.layer + 1) % 2
        keep[-1] = True
        return keep

    found = []
    for kind in ("heads", "neurons"):
        groups = [g for g in units.of_kind(kind) if g.prunable and g.size > 1]
        if groups:
            found.append((PruningMask({g.name: half(g) for g in groups}, units), kind))
            nothing = {g.name: torch.zeros(g.size, dtype=torch.bool) for g in groups if g.layer == groups[-1].layer}
            found.append((PruningMask(nothing, units), f"all {kind} of a layer"))
    for name, stack in units.stacks.items():
        free = [i for i in range(units[name].size) if i not in stack.fixed_layers]
        if len(free) > 1 or (free and stack.fixed_layers):
            keep = torch.ones(units[name].size, dtype=torch.bool)
            keep[free[0]] = False
            found.append((PruningMask({name: keep}, units), f"layer {free[0]} of {name}"))
    return found
