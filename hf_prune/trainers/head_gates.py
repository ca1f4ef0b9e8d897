"""Hard-concrete gates of heads, and the mathematics of PASS: pure functions of the gates' locations φ.

A gate z multiplies what its head writes. In training z = clip(σ((ln u − ln(1−u) + φ) / β)·(ζ−γ) + γ, 0, 1) with u
uniform, so that z is exactly 0 or 1 with a probability that φ decides; in evaluation a head is kept or not.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError, UnsupportedModelError
from ..gates import GATE, MaskGate, attach_gate, current_mask
from ..units import UnitGroup, prunable_units, site

BETA, GAMMA, ZETA, EPSILON = 0.33, -0.1, 1.1, 1e-6
_SHIFT = BETA * math.log(-GAMMA / ZETA)
DECIDED = 5.0  # beyond ±5 a gate counts as open or closed
WEIGHT_CAP = 3000.0
LAMBDA_CAP = 1e6


def closed_probability(phi: torch.Tensor) -> torch.Tensor:
    """q0 = P(z = 0)."""
    return torch.sigmoid(_SHIFT - phi)


def open_probability(phi: torch.Tensor) -> torch.Tensor:
    """q1 = P(z = 1)."""
    return torch.sigmoid(_SHIFT + phi)


def soft_gates(phi: torch.Tensor) -> torch.Tensor:
    """The deterministic gates clip(σ(φ)·(ζ−γ) + γ, 0, 1)."""
    return (torch.sigmoid(phi) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def sample_gates(phi: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The random gates, differentiable by φ.

    Args:
        phi (`torch.Tensor`): φ, (n,).
        noise (`torch.Tensor`): Logistic noise ln u − ln(1−u), (n,), see [`gate_noise`].

    Returns:
        `torch.Tensor`: z from 0 to 1, (n,).
    """
    return (torch.sigmoid((noise + phi) / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def gate_noise(size: int, *seed: int) -> torch.Tensor:
    """Logistic noise of shape (size,), float64, that the numbers in `seed` determine: the same in every process."""
    u = torch.from_numpy(np.random.default_rng(seed).random(size)) * (1 - 2 * EPSILON) + EPSILON
    return u.log() - (-u).log1p()


def almost_sure_penalty(phi: torch.Tensor, num_heads: int) -> torch.Tensor:
    """R_pass = |(n−K) − Σ P(z=0)| + |K − Σ P(z=1)| + Σ P(0<z<1): zero where K of n gates are surely 1, the others 0.

    Args:
        phi (`torch.Tensor`): φ of all gates of the network, (n,).
        num_heads (`int`): K.
    """
    closed, opened = closed_probability(phi).sum(), open_probability(phi).sum()
    return (len(phi) - num_heads - closed).abs() + (num_heads - opened).abs() + len(phi) - closed - opened


def _log_closed(phi: torch.Tensor, module: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ln q0 of each gate, and its sum over the gates of each attention module."""
    log = nn.functional.logsigmoid(_SHIFT - phi)
    total = torch.zeros(int(module.max()) + 1, dtype=phi.dtype, device=phi.device)
    return log, total.index_add(0, module, log)


def concentration_penalty(phi: torch.Tensor, module: torch.Tensor) -> torch.Tensor:
    """R_conc, the expected number of attention modules that are not entirely closed.

    Args:
        phi (`torch.Tensor`): φ of all gates, (n,).
        module (`torch.Tensor`): For each gate the index of its attention module, (n,).
    """
    return -torch.expm1(_log_closed(phi, module)[1]).sum()


def concentration_weight(phi: torch.Tensor, module: torch.Tensor) -> float:
    """λc, the smallest weight with which R_conc wins against R_pass for one head that is not closed; at most 3000.

    Args:
        phi (`torch.Tensor`): φ of all gates, (n,).
        module (`torch.Tensor`): For each gate the index of its attention module, (n,).
    """
    log, total = _log_closed(phi, module)
    closed, opened = (q(phi).clamp(EPSILON, 1 - EPSILON) for q in (closed_probability, open_probability))
    ratio = (opened * (1 - opened) / (closed * (1 - closed))).clamp_min(1)
    weights = 2 * ratio / (total[module] - log).exp().clamp_min(1e-8)
    least: float = weights[phi > -DECIDED].clamp_max(WEIGHT_CAP).min().item() if (phi > -DECIDED).any() else WEIGHT_CAP
    return least


def penalty_weight(count: int, base: float, growth: float, steps: int) -> float:
    """λ = base · growth^(count / steps), at most 1e6.

    Args:
        count (`int`): c, the optimizer steps so far after which the constraint was not met.
        base (`float`): λ at the beginning.
        growth (`float`): By what λ grows in `steps` of them.
        steps (`int`): See there.
    """
    reached = math.log(base) + count / steps * math.log(growth) >= math.log(LAMBDA_CAP)  # the power may overflow
    return LAMBDA_CAP if reached else base * growth ** (count / steps)


def top_heads(phi: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Keep exactly `num_heads` heads, those with the largest φ; of equal ones the first.

    Args:
        phi (`torch.Tensor`): φ of all gates, (n,).
        num_heads (`int`): How many.

    Returns:
        `torch.Tensor`: bool of shape (n,), `True` = keep.
    """
    order = phi.sort(descending=True, stable=True).indices
    keep = torch.zeros(len(phi), dtype=torch.bool)
    keep[order[:num_heads]] = True
    return keep


class HeadGate(MaskGate):
    """The gates of one attention module: random in training, the mask in evaluation.

    Args:
        log_alpha (`torch.Tensor`): φ, float32 of shape (units,).
        width (`int`): Columns of the site's input that one unit takes.
    """

    noise: torch.Tensor

    def __init__(self, log_alpha: torch.Tensor, width: int) -> None:
        keep = torch.ones(len(log_alpha), dtype=torch.bool, device=log_alpha.device)
        super().__init__(keep, keep.repeat_interleave(width))
        self.log_alpha = nn.Parameter(log_alpha)
        self.width = width
        # Set from outside, once for each forward pass: recomputation under gradient checkpointing sees the same.
        self.register_buffer("noise", torch.zeros_like(log_alpha), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        z = sample_gates(self.log_alpha, self.noise).to(x.dtype)
        return (x.reshape(*x.shape[:-1], len(z), self.width) * z[:, None]).reshape(x.shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Trainer loads what a checkpoint has, whatever is missing, and fails at the optimizer in words of its own.
        if f"{prefix}log_alpha" not in state_dict:
            raise ConfigError(
                "The weights to load were saved without head gates, and are loaded in part by now: load the model "
                "afresh. To train from such weights start a new run, without resume_from_checkpoint."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def set_mask(self, keep: torch.Tensor) -> None:
        """Choose the heads that evaluation keeps."""
        self.keep.copy_(keep)
        self.pruned_columns.copy_(~keep.repeat_interleave(self.width))


class HeadGates:
    """All head gates of a model, as flat CPU vectors in the order of the forward pass.

    Args:
        model (`PreTrainedModel`): A model with gates, see [`add_head_gates`].

    Attributes:
        groups (`list[UnitGroup]`): The gated groups of heads.
        module (`torch.Tensor`): For each gate the index of its group.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        units = prunable_units(model)
        found = [(g, getattr(site(model, g), GATE, None)) for g in units.of_kind("heads")]
        self.groups = [group for group, gate in found if isinstance(gate, HeadGate)]
        self.gates = [gate for _, gate in found if isinstance(gate, HeadGate)]
        self.sizes = [group.size for group in self.groups]
        self.module = torch.arange(len(self.groups)).repeat_interleave(torch.tensor(self.sizes, dtype=torch.long))

    def __len__(self) -> int:
        return sum(self.sizes)

    def check(self, num_heads: int) -> None:
        """Raise unless exactly this many heads can be kept."""
        if not 1 <= num_heads <= len(self):
            raise ConfigError(f"num_heads must be from 1 to {len(self)}, all heads, got {num_heads}.")

    @property
    def phi(self) -> torch.Tensor:
        """φ, float64 of shape (n,)."""
        return self._flat([gate.log_alpha.detach() for gate in self.gates])

    @phi.setter
    def phi(self, values: torch.Tensor) -> None:
        self._write([gate.log_alpha.detach() for gate in self.gates], values)

    def take_gradients(self) -> torch.Tensor:
        """The gradients by φ, float64 of shape (n,). The parameters are left without."""
        gradients = [g.log_alpha.grad if g.log_alpha.grad is not None else 0 * g.noise for g in self.gates]
        for gate in self.gates:
            gate.log_alpha.grad = None
        return self._flat(gradients)

    def set_noise(self, noise: torch.Tensor) -> None:
        """Let the next forward passes use this noise, (n,)."""
        self._write([gate.noise for gate in self.gates], noise)

    def set_mask(self, keep: torch.Tensor) -> None:
        """Choose the heads that evaluation keeps, bool of shape (n,)."""
        for gate, part in zip(self.gates, torch.split(keep, self.sizes), strict=True):
            gate.set_mask(part.to(gate.keep.device))

    def _flat(self, parts: list[torch.Tensor]) -> torch.Tensor:
        device = parts[0].device
        return torch.cat([part.to(device) for part in parts]).cpu().double()

    def _write(self, targets: list[torch.Tensor], values: torch.Tensor) -> None:
        moved = values.to(targets[0].device, torch.float32)
        for target, part in zip(targets, torch.split(moved, self.sizes), strict=True):
            target.copy_(part)


def add_head_gates(model: PreTrainedModel, seed: int = 0) -> HeadGates:
    """Gate all heads that can be pruned. φ is drawn uniformly from ±sqrt(6 / (heads of the module + 1)).

    Args:
        model (`PreTrainedModel`): The model. It gets one parameter `log_alpha` for each attention module.
        seed (`int`, *optional*, defaults to 0): Of φ: the same in every process.

    Returns:
        [`HeadGates`]: The gates.

    Raises:
        UnsupportedModelError: The family is unknown, or has no heads that can be pruned.
        ConfigError: The model carries gates or a mask already.
    """
    units = prunable_units(model)
    if any(isinstance(getattr(module, GATE, None), HeadGate) for module in model.modules()):
        raise ConfigError(
            "The model has head gates already. One PassTrainer or PassCallback trains them: load the model afresh, or "
            "take these gates off with remove_mask(model)."
        )
    if current_mask(model) is not None:
        raise ConfigError("The model carries a mask: shrink it first, or take the mask off with remove_mask(model).")
    groups: list[UnitGroup] = [g for g in units.of_kind("heads") if g.prunable and g.size]
    if not groups:
        note = units.architecture.note
        raise UnsupportedModelError(
            f"This {type(model).__name__} has no heads that can be pruned{f': {note}' if note else ''}."
        )
    for index, group in enumerate(groups):
        bound = math.sqrt(6 / (group.size + 1))
        uniform = torch.from_numpy(np.random.default_rng([seed, index]).uniform(-bound, bound, group.size))
        module = site(model, group)
        attach_gate(module, HeadGate(uniform.to(module.weight.device, torch.float32), group.width))
    return HeadGates(model)
