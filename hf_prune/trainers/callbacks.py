"""Callbacks for any `Trainer`: keep masks during training, raise a sparsity along a cubic."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..errors import ConfigError, MaskError, check_whole, unknown
from ..gates import masked_columns
from ..masks import PruningMask
from ..units import base_model, prunable_units, site
from .arguments import check_whole_model

logger = logging.get_logger(__name__)


def zero_units(model: PreTrainedModel, mask: PruningMask) -> None:
    """Zero the output weights of pruned heads and neurons: without gates the model computes the masked function.

    Args:
        model (`PreTrainedModel`): The model, changed in place.
        mask ([`PruningMask`]): What stays. Layers that it drops are left as they are.
    """
    for group, columns in masked_columns(model, prunable_units(model), mask):
        module = site(model, group)
        with torch.no_grad():
            module.weight.index_fill_(0 if isinstance(module, Conv1D) else 1, columns.to(module.weight.device), 0)


class KeepMaskCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not type-checked here
    """Keeps pruned weights at zero in any `Trainer`: they are zeroed when training begins and after each step.

    Args:
        mask ([`PruningMask`], [`WeightMask`] or `dict[str, torch.Tensor]`): What stays. The output weights of pruned
            heads and neurons are zeroed; or, for names of parameters bool tensors of their shapes, what is `False`.

    Raises:
        MaskError: When training begins: the mask is for another model, drops whole layers, or a tensor is not bool or
            has the wrong shape.
        ConfigError: When training begins: the model is sharded (FSDP, DeepSpeed).

    Examples:
        ```python
        >>> result = hf_prune.prune(model, hf_prune.WandaConfig(sparsity=0.5), texts, processing_class=tokenizer)
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[KeepMaskCallback(result.mask)])
        ```
    """

    def __init__(self, mask: PruningMask | Mapping[str, torch.Tensor]) -> None:
        self.mask = mask

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_whole_model(args)
        if isinstance(self.mask, PruningMask):
            units = prunable_units(model)
            self.mask.check(units)
            if not all(self.mask[group.name].all() for group in units.of_kind("layers")):
                raise MaskError("The mask drops whole layers: shrink(model, mask) before training.")
        else:
            parameters = dict(model.named_parameters())
            for name, keep in self.mask.items():
                if name not in parameters:
                    raise MaskError(unknown("parameter", name, parameters))
                if keep.dtype != torch.bool or keep.shape != parameters[name].shape:
                    raise MaskError(
                        f"The mask of {name} must be a bool tensor of shape {tuple(parameters[name].shape)}, got "
                        f"{keep.dtype} of shape {tuple(keep.shape)}."
                    )
            self.mask = {name: keep.to(parameters[name].device) for name, keep in self.mask.items()}
        self.on_optimizer_step(args, state, control, model=model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if isinstance(self.mask, PruningMask):
            zero_units(model, self.mask)
        else:
            for name, keep in self.mask.items():
                model.get_parameter(name).detach().masked_fill_(~keep, 0)


class GradualSparsityCallback(KeepMaskCallback):
    """Prunes the smallest weights in any `Trainer`, more and more along a cubic, and keeps them at zero.

    Of each weight matrix in the layers (not of embeddings, norms and the head) the share s(t) = s·(1 − (1−p)³) is
    zero, with p from 0 to 1 between `begin` and `end`: Zhu & Gupta, "To prune, or not to prune", 2017,
    [1710.01878](https://arxiv.org/abs/1710.01878).

    A run that stops before, or goes back to such a checkpoint, ends with fewer zeros, and says so in a warning.

    Args:
        sparsity (`float`): s, the share of zeros in the end, in (0, 1).
        begin, end (`float`, *optional*, defaults to 0.0 and 0.7): When pruning begins and ends, as shares of the run.
            The rest of it lets the weights recover.
        every (`int`, *optional*): Steps between two prunings. Defaults to a hundredth of the run.

    Raises:
        ConfigError: An option is out of range; when training begins: the model is sharded (FSDP, DeepSpeed).
    """

    def __init__(self, sparsity: float, *, begin: float = 0.0, end: float = 0.7, every: int | None = None) -> None:
        super().__init__({})
        if not 0 < sparsity < 1:
            raise ConfigError(f"sparsity must be between 0 and 1, got {sparsity!r}.")
        if not 0 <= begin < end <= 1:
            raise ConfigError(f"begin and end must be shares of the run, 0 <= begin < end <= 1, got {begin}, {end}.")
        if every is not None:
            check_whole(1, every=every)
        self.sparsity, self.begin, self.end, self.every = sparsity, begin, end, every

    def sparsity_at(self, progress: float) -> float:
        """s(t) after a share of the run."""
        p = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.sparsity * (1 - (1 - p) ** 3)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_whole_model(args)
        base = base_model(model)
        stacks = [base.get_submodule(stack) for stack in prunable_units(model).stacks]
        weights = {id(m.weight) for s in stacks for m in s.modules() if isinstance(m, nn.Linear | Conv1D)}
        self.names = [name for name, p in model.named_parameters() if id(p) in weights]
        # A resumed run goes on from the zeros of its checkpoint.
        begun = self.sparsity_at(state.global_step / state.max_steps) > 0
        self.mask = {name: model.get_parameter(name) != 0 for name in self.names} if begun else {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step + 1
        last = -(-self.end * state.max_steps // 1)
        if (step % (self.every or max(state.max_steps // 100, 1)) == 0 and step < last) or step == last:
            sparsity = self.sparsity_at(step / state.max_steps)
            self.mask = {name: _largest(model.get_parameter(name), sparsity) for name in self.names if sparsity > 0}
        super().on_optimizer_step(args, state, control, model=model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weights = [model.get_parameter(name) for name in self.names]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        if zeros < sum(round(self.sparsity * weight.numel()) for weight in weights):
            logger.warning(
                f"The model ends with {zeros / sum(weight.numel() for weight in weights):.1%} zeros instead of "
                f"{self.sparsity:.1%}: training stopped early, or load_best_model_at_end brought back a step before "
                "end. Let end come earlier, or prune the rest with prune and a WeightMagnitudeConfig."
            )


def _largest(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """All but the `sparsity` share of smallest weights. Those that are zero already count as the smallest."""
    pruned = round(sparsity * weight.numel())
    order = weight.detach().abs().flatten().argsort(stable=True)
    keep = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    keep[order[:pruned]] = False
    return keep.view(weight.shape)
