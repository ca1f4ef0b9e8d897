"""Training of super-networks: all sub-networks of a space share the weights of one model, and become good together.

Klein et al., "Structural Pruning of Pre-trained Language Models via Neural Architecture Search", TMLR 2024.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Seq2SeqTrainer

from ..errors import ConfigError
from ..gates import current_mask
from ..search.base import PAPER, Member, SearchSpace
from ..search.spaces import search_space
from ..slicing import subnetwork
from ..units import prunable_units
from .arguments import Seq2SeqSuperNetTrainingArguments, SuperNetTrainingArguments
from .distillation import logits_of
from .pruning import PruningTrainer

_LINEAR = ("linear_random", "kd")
_WITH_SMALLEST = ("sandwich", "full")
_DISTILLED = ("kd", "full")


@dataclass(frozen=True)
class StepPlan:
    """What one step of super-network training trains.

    Args:
        whole (`bool`): The whole network learns the labels.
        members (`list[dict[str, int]]`): The sub-networks.
        distilled (`bool`): They also learn the logits of the whole network.
    """

    whole: bool
    members: list[Member]
    distilled: bool


def plan_step(space: SearchSpace, strategy: str, count: int, seed: int, step: int, steps: int) -> StepPlan:
    """What a step trains: the same in each process and in each run with this seed.

    Args:
        space ([`SearchSpace`]): The sub-networks.
        strategy (`str`): See [`SuperNetTrainingArguments`].
        count (`int`): k, how many sub-networks are drawn.
        seed, step, steps (`int`): Seed, index of the step, and number of steps of the run.
    """
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
    # 0 in the first step and 1 in the last; a uniform number is below that never, and always.
    late = float(torch.rand((), generator=generator)) < step / max(steps - 1, 1)
    linear = strategy in _LINEAR
    members = []
    if strategy != "standard" and (late or not linear):
        members = [space.smallest] if strategy in _WITH_SMALLEST else []
        members += [space.sample(generator) for _ in range(count)]
    whole = strategy != "random" and not (linear and late)
    return StepPlan(whole, members, bool(members) and strategy in _DISTILLED)


class SuperNetTrainer(PruningTrainer):
    """A `Trainer` that makes all sub-networks of a search space good at once, for a search among them.

    In each step the gradients of the whole network and of some sub-networks are summed, see `strategy` of
    [`SuperNetTrainingArguments`]. Sub-networks run on slices of the weights ([`subnetwork`]): a small one is cheap.
    Where they learn from the whole network, their loss is T²·KL(whole ‖ sub-network) on its logits of the same step,
    plus the task's; for a regression the squared distance to its outputs alone. (The paper's value has T² times the
    entropy of the teacher on top, without influence on the gradient.)

    All micro-batches of a step, and all processes, train the same sub-networks: they follow from `seed` and the step,
    so that a resumed run draws what the whole one does. With several processes gradients are averaged once a step.
    With `torch_compile` the whole network is compiled (with one process), sub-networks run eagerly: each has other
    shapes.

    The `loss` in the logs is the whole network's, or that of the sub-networks where a step trains them alone.
    `subnetwork_loss` is the mean of the sub-networks in a step, distillation included, of the first process.
    Evaluation is that of the whole network; [`~SuperNetTrainer.subnetwork`] gives others. `save_model()` saves the
    whole network: nothing is pruned yet.

    Args:
        args ([`SuperNetTrainingArguments`]): Its arguments.
        space ([`SearchSpace`], *optional*): The sub-networks. Defaults to `args.search_space` of this model.
        others: See [`PruningTrainer`].

    Raises:
        ConfigError: `args` are of another class; the model carries a mask, is sharded (FSDP, DeepSpeed), or would
            be spread over several GPUs by one process; the space is empty, or of another model.
        UnsupportedModelError: The model can't be pruned.

    Examples:
        ```python
        >>> space = hf_prune.SmallSpace(model, bounds={"num_layers": (2, 6)})
        >>> args = SuperNetTrainingArguments("out", strategy="full", num_train_epochs=5, learning_rate=2e-5)
        >>> trainer = SuperNetTrainer(model, args, space=space, train_dataset=dataset, processing_class=tokenizer)
        >>> trainer.train()
        ```
    """

    paper = PAPER
    arguments = SuperNetTrainingArguments

    def __init__(self, *args: Any, space: SearchSpace | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"One process would spread each batch over {self.args.n_gpu} GPUs: launch one process per GPU with "
                "torchrun, or choose a GPU with CUDA_VISIBLE_DEVICES."
            )
        if current_mask(self.model) is not None:
            raise ConfigError("The model carries a mask: shrink it first, its sub-networks are parts of what is left.")
        self.space = space if space is not None else search_space(self.args.search_space, self.model)
        if dict(self.space.units) != dict(prunable_units(self.model)):
            raise ConfigError("The search space is of a model of another shape: make it for this model.")
        self._teaches = False
        self._taught: dict[str, torch.Tensor] | None = None
        self._log_total: Any = 0.0
        self._log_steps = 0

    @property
    def method(self) -> str:
        return "supernet"

    def subnetwork(self, member: Member) -> PreTrainedModel:
        """A member of the space on slices of the weights as they are now, see [`subnetwork`]."""
        return subnetwork(self.model, self.space.mask(member), self.space.units)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        plan = plan_step(
            self.space,
            self.args.strategy,
            self.args.num_subnetworks,
            self.args.seed,
            self.state.global_step,
            self.state.max_steps,
        )
        # DDP reduces the gradients of one pass: all passes run outside of it, and their sum is reduced here.
        parallel = self.args.world_size > 1
        whole = self.model if parallel else model
        self._teaches, self._taught = plan.distilled, None
        try:
            losses = []
            if plan.whole:
                losses.append(super().training_step(whole, dict(inputs), num_items_in_batch))
            elif plan.distilled:
                whole.train()
                with torch.no_grad():
                    self.compute_loss(whole, self._prepare_inputs(dict(inputs)), num_items_in_batch=num_items_in_batch)
            for member in plan.members:
                losses.append(super().training_step(self.subnetwork(member), dict(inputs), num_items_in_batch))
        finally:
            self._teaches, self._taught = False, None
        parts = torch.stack(losses[plan.whole :]) if plan.members else None
        if parts is not None:
            self._log_total = self._log_total + parts.mean()
            self._log_steps += self.accelerator.sync_gradients
        if parallel and self.accelerator.sync_gradients:
            self._average_gradients()
        return losses[0] if plan.whole or parts is None else parts.mean()

    def _average_gradients(self) -> None:
        # All processes train the same sub-networks, so the same parameters have gradients in each.
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.args.world_size

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = dict(inputs)  # label smoothing takes the labels out
        part = isinstance(model, PreTrainedModel) and model is not self.model
        # Accelerate wraps the forward of the model itself, not of its parts.
        with self.accelerator.autocast() if part else nullcontext():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if part and self._taught is not None:
            distance = self.distance(given, outputs, self._taught, self.args.temperature, num_items_in_batch)
            loss = distance if _is_regression(outputs) else loss + distance
        elif self._teaches:
            self._taught = {name: outputs[name].detach() for name in logits_of(outputs)}
            _check_task(self.model.config, self._taught)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._log_steps:
            logs["subnetwork_loss"] = float(self._log_total) / self._log_steps
            self._log_total, self._log_steps = 0.0, 0
        super().log(logs, *args, **kwargs)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "space": self.space.describe()}


def _is_regression(outputs: Any) -> bool:
    return all(outputs[name].shape[-1] == 1 for name in logits_of(outputs))


def _check_task(config: Any, logits: dict[str, torch.Tensor]) -> None:
    """Raise where neither softmax nor the distance of one output compares the logits of two networks."""
    task = getattr(config, "problem_type", None)
    several = max(part.shape[-1] for part in logits.values()) > 1
    if task == "multi_label_classification" or (task == "regression" and several):
        raise ConfigError(
            f"Sub-networks learn logits of one label, or one number, a position; this is {task} with several: take "
            f"another strategy than {' or '.join(map(repr, _DISTILLED))}, such as 'sandwich'."
        )


class Seq2SeqSuperNetTrainer(SuperNetTrainer, Seq2SeqTrainer):  # type: ignore[misc]
    """[`SuperNetTrainer`] with `predict_with_generate`. Its args are [`Seq2SeqSuperNetTrainingArguments`]."""

    arguments = Seq2SeqSuperNetTrainingArguments
