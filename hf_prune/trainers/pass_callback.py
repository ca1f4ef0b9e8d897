"""PASS and PASSCONC: Ding et al., "PASS: Pruning Attention Heads with Almost-sure Sparsity Targets", TMLR.

Hard-concrete gates of heads are trained with the task. A penalty that grows in the course of the run lets exactly K of
them end open and the others closed, almost surely; the K heads with the largest φ stay. PASSCONC adds a penalty for
each attention module that is not empty.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..errors import ConfigError
from ..gates import apply_mask, current_mask, record_inputs, remove_mask
from ..timing import example_inputs
from .arguments import PassOptions, check_whole_model
from .callbacks import zero_units
from .confidence import head_confidence
from .gate_board import GateBoard
from .head_gates import (
    DECIDED,
    HeadGates,
    add_head_gates,
    almost_sure_penalty,
    closed_probability,
    concentration_penalty,
    concentration_weight,
    gate_noise,
    penalty_weight,
    soft_gates,
    top_heads,
)
from .loss_items import divides_by_items

logger = logging.get_logger(__name__)
_LONG_RUN = 10_000
_TRAVEL = 8.0  # that φ may go in lambda_steps of a shorter run
_REOPEN = 1 << 20  # tells the seeds of reopening from those of the gates' noise


class PassCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is not type-checked here
    """PASS in any `Trainer`. When training ends the model is masked, and exactly `num_heads` heads are left.

    The gates are added when the `Trainer` is made, and trained by an Adam of their own, without weight decay: whatever
    optimizer trains the weights, also one that you pass and that knows no gates, φ has its own learning rate and
    follows the schedule of the optimizer's first group. The penalty depends on the gates alone: its gradient
    is added to theirs once per step, so that the loss in the logs is that of the task. Logs also show `pass_lambda`,
    `pass_lambda_conc`, `heads_open`, `heads_closed`, `heads_undecided` and `heads_expected`, the expected number of
    gates that are not 0. With TensorBoard a heat map (modules x heads) shows the gates, beside these numbers.

    In evaluation the model is always the one that would be left: the `num_heads` heads with the largest φ. When
    training ends the other heads are masked, and their output weights are zero, so that every way to save the model
    saves what was trained. `hf_prune.shrink(model)` cuts them.

    [`PassTrainer`] also leaves the gates out of the clipping of the weights' gradients, and saves the shrunk model.

    Args:
        options: See [`PassOptions`]: `num_heads`, `gate_learning_rate`, ...

    Raises:
        ConfigError: An option is out of range; the model has gates already; it is sharded (FSDP, DeepSpeed), or
            trained in fp16. When training begins: the run resumes from a checkpoint without gates, or with another
            `num_heads` or `train_weights`; the optimizer's first learning rate is not positive.
        UnsupportedModelError: The model has no heads that can be pruned.

    Examples:
        ```python
        >>> trainer = SFTTrainer(model, args, train_dataset=dataset, callbacks=[PassCallback(num_heads=48)])
        >>> trainer.train()
        >>> hf_prune.save_pretrained(hf_prune.shrink(model), "small")
        ```
    """

    def __init__(self, **options: Any) -> None:
        self.options = PassOptions(**options)
        self.gates: HeadGates | None = None
        self.gradient: torch.Tensor | None = None
        self.inputs: list[dict[str, Any]] | None = None
        self.adds_means: bool | None = None  # whether the Trainer adds up means of batches, known after a step
        self.frozen: list[str] = []  # parameters that are trained again afterwards
        self.board: GateBoard | None = None
        self.steps, self.part, self.rate, self.full_rate = 1, 0, 0.0, 1.0
        self.reopen = self.saturated = False
        self._reset()

    def _reset(self) -> None:
        self.count = 0  # c, the steps in which the constraint was not met
        self.updates = 0
        self.conc_weight = 0.0
        self.moments = torch.zeros(2, len(self.gates or ()), dtype=torch.float64)

    def state(self) -> dict[str, Any]:
        """For checkpoints: what must be restored beside φ, which the weights of the checkpoint hold."""
        attributes = {
            "count": self.count,
            "updates": self.updates,
            "conc_weight": self.conc_weight,
            "moments": self.moments.tolist(),
            "frozen": self.frozen,
        }
        return {"args": asdict(self.options), "attributes": attributes}

    # The run

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_whole_model(args)
        if args.fp16 or args.mixed_precision == "fp16":
            raise ConfigError("fp16 scales the loss, and with it the gradients of the gates: use bf16=True instead.")
        if args.learning_rate <= 0:
            raise ConfigError(
                "The gates follow the schedule of learning_rate, which must be positive. To train the gates alone set "
                "train_weights=False."
            )
        gates = add_head_gates(model, args.seed)
        try:
            gates.check(self.options.num_heads or 0)
        except ConfigError:
            remove_mask(model)
            raise
        if not self.options.train_weights:
            own = {id(gate.log_alpha) for gate in gates.gates}
            self.frozen = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
            for name in self.frozen:
                model.get_parameter(name).requires_grad_(False)
            if args.activation_checkpointing:  # the reentrant kind only works behind inputs with a gradient
                model.enable_input_require_grads()
        self._show_mask(gates)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.gates = HeadGates(model)
        if not self.gates.groups:
            raise ConfigError(
                "The model has no head gates: they are added when the Trainer is made, and folded when training ends. "
                "Make a new Trainer; with model_init use a PassTrainer."
            )
        self.gates.check(self.options.num_heads or 0)
        for gate in self.gates.gates:
            gate.float()  # an evaluation before, with bf16_full_eval, has cast the whole model
        self.full_rate = _full_rate(optimizer)
        self.gradient = self.inputs = self.adds_means = None
        self._reset()
        if state.global_step:
            for name, value in saved_state(self, state)["attributes"].items():
                setattr(self, name, value)
            self.moments = torch.tensor(self.moments, dtype=torch.float64)
        run = state.max_steps
        self.steps = self.options.lambda_steps or min(max(run // 5, 1), 1000)
        self.rate = self.options.gate_learning_rate or (0.5 if run >= _LONG_RUN else min(0.5, _TRAVEL / self.steps))
        self.reopen = run >= _LONG_RUN if self.options.reopen is None else self.options.reopen
        # Without reopening the gates are decided at 2: from there on nothing would be left to concentrate.
        self.events = {self.steps * i for i in range(2 if self.reopen else 1, 5) if self.steps * i <= run // 2}
        # Where no head comes back, one module after the other may be emptied, but not several by one and the same λc.
        self.weighed = self.events if self.reopen else range(self.steps, min(5 * self.steps, run // 2 + 1))
        if self.reopen:
            head_confidence(model, self.gates, [example_inputs(model, batch_size=1, sequence_length=8)])
        self._show_mask(self.gates)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.part = 0
        self._draw(args, state)
        if self.adds_means is None:
            self.first: list[dict[str, Any]] = []
            self.first_handle = record_inputs(model, self.first)
        if self.reopen and state.global_step + 1 in self.events:
            self.inputs = []
            self.handle = record_inputs(model, self.inputs)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.part += 1
        self._draw(args, state)

    def _draw(self, args: Any, state: Any) -> None:
        assert self.gates is not None
        self.gates.set_noise(gate_noise(len(self.gates), args.seed, state.global_step, self.part))

    def take_gradients(self) -> None:
        """Take the gates' gradients by the task out of the parameters: the optimizer of the weights leaves them."""
        if self.gradient is None:
            assert self.gates is not None
            self.gradient = self.gates.take_gradients()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.take_gradients()
        assert self.gates is not None and self.gradient is not None
        if self.adds_means is None:
            self.first_handle.remove()
            inputs, self.first = (*self.first, {})[0], []
            counted = inputs.get("num_items_in_batch") is not None and "labels" in inputs  # smoothing takes them out
            self.adds_means = counted and not divides_by_items(model, inputs)
        if self.adds_means:  # the penalty has its weight beside the mean of these batches
            self.gradient /= (self.part + 1) * (args.world_size if args.average_tokens_across_devices else 1)
        phi = self.gates.phi.requires_grad_()
        gradient = self.gradient + torch.autograd.grad(self.penalty(phi), phi)[0]
        self.gradient = None

        # Adam, without weight decay.
        rate = self.rate * optimizer.param_groups[0]["lr"] / self.full_rate
        self.updates += 1
        mean, square = self.moments
        mean.lerp_(gradient, 1 - 0.9)
        square.lerp_(gradient.square(), 1 - 0.999)
        scale = (square / (1 - 0.999**self.updates)).sqrt() + 1e-8
        self.gates.phi = phi.detach() - rate * mean / (1 - 0.9**self.updates) / scale

    def penalty(self, phi: torch.Tensor) -> torch.Tensor:
        """What is added to the loss of the task: λ·(R_pass + λc·R_conc)."""
        assert self.gates is not None
        penalty = almost_sure_penalty(phi, self.options.num_heads or 0)
        if self.conc_weight:
            penalty = penalty + self.conc_weight * concentration_penalty(phi, self.gates.module)
        return self.penalty_weight * penalty

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self.gates is not None
        step, kept, phi = state.global_step, self.options.num_heads or 0, self.gates.phi
        if step in self.events:
            phi.clamp_(-DECIDED, DECIDED)
            if self.inputs is not None:
                self.handle.remove()
                confidence = head_confidence(model, self.gates, self.inputs)
                chance = torch.from_numpy(np.random.default_rng([args.seed, step, _REOPEN]).random(len(phi)))
                back = (phi <= -DECIDED) & (chance < confidence)
                phi[back] = DECIDED
                self.moments[:, back] = 0
                self.inputs = None
            self.gates.phi = phi
        if self.options.concentrate and step in self.weighed:
            self.conc_weight = concentration_weight(phi, self.gates.module)
        closed, opened = _count(phi)
        if closed >= len(phi) - kept or step >= 5 * self.steps:
            self.conc_weight = 0.0
        if not (closed == len(phi) - kept and opened == kept):
            self.count += 1
        self._show_mask(self.gates)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.gates is None or "loss" not in logs:
            return
        phi = self.gates.phi
        closed, opened = _count(phi)
        facts = {
            "pass_lambda": self.penalty_weight,
            "pass_lambda_conc": self.conc_weight,
            "heads_open": opened,
            "heads_closed": closed,
            "heads_undecided": len(phi) - closed - opened,
            "heads_expected": float((1 - closed_probability(phi)).sum()),
        }
        logs.update(facts)
        state.log_history[-1].update(facts)
        if "tensorboard" in args.report_to and state.is_world_process_zero:
            self.board = self.board or GateBoard(args)
            self.board.show(soft_gates(phi), self.gates.sizes, facts, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self.gates is not None
        phi, kept = self.gates.phi, self.options.num_heads or 0
        closed, opened = _count(phi)
        self.saturated = closed == len(phi) - kept and opened == kept
        if not self.saturated:
            logger.warning(
                f"PASS ends with {opened} gates open, {closed} closed and {len(phi) - closed - opened} undecided: the "
                f"{kept} heads with the largest φ are kept, but the weights were not trained for them alone. Train "
                "longer, or lower lambda_steps."
            )
        self._show_mask(self.gates)  # load_best_model_at_end may have brought other gates
        mask = current_mask(model)
        assert mask is not None
        apply_mask(model, mask)
        zero_units(model, mask)
        self.gates = None
        if self.frozen:
            for name in self.frozen:
                model.get_parameter(name).requires_grad_(True)
            if args.activation_checkpointing:
                model.disable_input_require_grads()
        if self.board is not None:
            self.board.close()
            self.board = None

    @property
    def penalty_weight(self) -> float:
        """λ."""
        return penalty_weight(self.count, self.options.lambda_base, self.options.lambda_growth, self.steps)

    def _show_mask(self, gates: HeadGates) -> None:
        gates.set_mask(top_heads(gates.phi, self.options.num_heads or 0))


def _count(phi: torch.Tensor) -> tuple[int, int]:
    """How many gates are closed, and how many open."""
    return int((phi <= -DECIDED).sum()), int((phi >= DECIDED).sum())


def _full_rate(optimizer: Any) -> float:
    """The learning rate of the weights before the schedule: the gates follow what the schedule makes of it."""
    group = optimizer.param_groups[0]
    rate = group.get("initial_lr", group["lr"])
    if not isinstance(rate, int | float | torch.Tensor) or not rate > 0:
        raise ConfigError(
            f"The gates follow the schedule of the optimizer's first group of parameters, whose learning rate is "
            f"{rate!r}: it must be positive."
        )
    return float(rate)


def saved_state(callback: PassCallback, state: TrainerState) -> dict[str, Any]:
    """What a checkpoint holds for a callback, which must be of the same run."""
    saved: dict[str, Any] | None = state.stateful_callbacks.get(type(callback).__name__)
    if saved is None:
        raise ConfigError(
            "The checkpoint to resume from was made without PASS: train from its weights in a new run, without "
            "resume_from_checkpoint."
        )
    for name in ("num_heads", "train_weights"):
        then, now = saved["args"][name], getattr(callback.options, name)
        if then != now:
            raise ConfigError(
                f"The checkpoint to resume from was made with {name}={then}, now it is {now}: go on with {then}, or "
                "train from its weights in a new run, without resume_from_checkpoint."
            )
    return saved
