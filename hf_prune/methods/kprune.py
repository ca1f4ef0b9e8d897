"""K-prune: Park et al., "Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models", ICLR 2024.

Unlabelled data. Layer by layer, from the bottom up: score the units of this and of all higher layers by the knowledge
that they hold, of the prediction (K_pred) and of the representation (K_rep). Then, sub-layer by sub-layer: prune by
the threshold that meets the budget over all that are undecided; refit what is kept to the dense model; go on with what
is left of the budget. The part of the model below the layer is not run again.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import AttentionSpec
from ..batches import Batch
from ..calibration import Calibrator, select_real
from ..divergence import Predictions, curvature, divergence, predictions
from ..errors import ConfigError
from ..gates import LayerCalls, current_mask, detach_gate, record_calls, resume_at, without_mask
from ..gradients import differentiate, mask_gradients
from ..layer_walk import walks
from ..masks import PruningMask
from ..refits import Refit
from ..surgery import check_shrinkable, cut_layer
from ..units import PrunableUnits, UnitGroup, base_model, head_counts, output_matrix, projection, site
from .base import Paper, Pruner, register_pruner
from .config import Recover, RecoverableConfig


@dataclass(kw_only=True)
class KPruneConfig(RecoverableConfig):
    """Options of K-prune. See [`PruningConfig`] for the others.

    Args:
        gamma (`float`, *optional*, defaults to 2.0): γ, temperature of the divergence of the predictions.
        lam (`float`, *optional*): λ, weight of the representational knowledge. Defaults to 0.025, with
            `kpred="paper"` to the authors' 2.5e-4: their K_pred is smaller by the square of the batch size.
        mu (`float`, *optional*, defaults to 64.0): μ, weight of heads against neurons.
        kpred (`"fisher"` or `"paper"`, *optional*, defaults to `"fisher"`): K_pred. `"fisher"` is the second-order
            term of the divergence from the present predictions, example by example. It is found once a layer, which
            saves a third of the time. `"paper"` is the squared gradient of the divergence from the dense model,
            batch by batch, found anew for each sub-layer: it depends on the batch size, and is zero while nothing is
            pruned, so that K_rep alone decides on the first sub-layer.
        seed (`int`, *optional*, defaults to 0): Of the random directions which stand for the second-order term where
            there are more than three classes (a language model's vocabulary), or several predictions an example.
        recover (`"lstsq"`, `"lstsq_outputs"`, `"scale"`, `"bias"` or `"none"`, *optional*, defaults to `"lstsq"`): How
            what is kept is refitted to the dense model after each sub-layer, see [`RecoverableConfig`];
            `"lstsq_outputs"` is the paper's weight tuning.

    Raises:
        ConfigError: An option is out of range, or `lam` is 0 with `kpred="paper"`.
    """

    gamma: float = 2.0
    lam: float | None = None
    mu: float = 64.0
    kpred: Literal["fisher", "paper"] = "fisher"
    seed: int = 0
    recover: Recover = "lstsq"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("kpred", ("fisher", "paper"))
        for name in ("gamma", "mu"):
            self.check_positive(name)
        if self.lam is None:
            self.lam = 0.025 if self.kpred == "fisher" else 2.5e-4
        elif self.lam != 0:
            self.check_positive("lam")
        elif self.kpred == "paper":
            raise ConfigError(
                "lam=0 with kpred='paper' leaves the first sub-layer to rounding: use kpred='fisher' or lam > 0."
            )
        if type(self.seed) is not int or not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed must be a whole number in [0, 2^31), got {self.seed!r}.")


@register_pruner("kprune", KPruneConfig)
class KPrunePruner(Pruner[KPruneConfig]):
    """Keeps the heads and neurons that hold the most knowledge per cost, and refits each sub-layer before the next."""

    paper = Paper(
        "Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models",
        "ICLR 2024",
        "2308.03449",
        "Seungcheol Park and Hojun Choi and U Kang",
    )

    def prune(self, model: PreTrainedModel, units: PrunableUnits, calibrator: Calibrator | None) -> PruningMask:
        assert calibrator is not None
        selector, recover = self.selector(model, units, calibrator), self.recovery(model, units)
        dtype = getattr(torch, self.config.precision)
        if self.config.kpred == "fisher":  # of single examples: the batches need not be as large as those of inference
            calibrator = calibrator.in_parts()
        names = [g.name for g in units.values() if g in selector.groups]
        dropped = current_mask(model)
        student = _Student(calibrator, self.config)
        if dropped is not None:
            with without_mask(model):  # all layers are the teacher's
                student.calls = calibrator.collect({}, "record layers", record=True)
        decided: dict[str, torch.Tensor] = {}
        refits: dict[str, Refit] = {}
        with calibrator.evaluating():
            scores = student.scores([units[name] for name in names])
            for walk in walks(calibrator, units, student.calls, recover, self.config.ridge, dtype):
                for index, layer in enumerate(walk.layers):
                    groups = [g for g in units.of_layer(walk.stack, index) if g.name in names]
                    small = copy.deepcopy(layer) if groups else layer
                    student.reaches(walk.stack, index, walk.student)
                    detach_gate(layer)  # of a dropped layer: the teacher has it, and the student is past it
                    walk.enter(groups)
                    try:
                        walk.layers[index] = small
                        for group in groups:
                            if not scores:
                                scores = student.scores([units[name] for name in names if name not in decided])
                            keep = selector.select(scores, decided)[group.name]
                            decided[group.name] = keep
                            if not keep.all():
                                if self.config.kpred == "paper":
                                    scores = {}
                                cut_layer(small, [group], PruningMask({group.name: keep}, units))
                                if recover != "none":
                                    refits |= walk.refit(small, group, keep)
                    finally:
                        walk.layers[index] = layer
                    cut = any(not decided[g.name].all() for g in groups)
                    if cut:
                        scores = {}  # of another student
                    if dropped is not None and not dropped[walk.stack][index]:
                        walk.leave(None)
                    else:
                        walk.leave(small if cut else layer)
                student.reaches(walk.stack, len(walk.layers), walk.student)
            mask = PruningMask(decided, units)
            check_shrinkable(units, mask)
            for name, refit in refits.items():
                refit.write(projection(student.base, name))
        return mask


class _Student:
    """The model as far as it is pruned: whatever lies below the next sub-layer is known, and not run again.

    Attributes:
        calls (`list[dict[str, LayerCalls]]`): How the layers of the dense model were called, and what they returned:
            recorded by the first pass, if not given.
    """

    def __init__(self, calibrator: Calibrator, config: KPruneConfig) -> None:
        self.calibrator, self.config = calibrator, config
        self.model, self.units = calibrator.model, calibrator.units
        self.base = base_model(self.model)
        self.calls: list[dict[str, LayerCalls]] = []
        self._starts: dict[int, dict[str, tuple[int, torch.Tensor]]] = {}

    def reaches(self, stack: str, index: int, hidden: Sequence[torch.Tensor]) -> None:
        """From now on passes start at this layer of a stack, with these hidden states."""
        for batch, states in enumerate(hidden):
            self._starts.setdefault(batch, {})[stack] = (index, states)

    def scores(self, groups: Sequence[UnitGroup]) -> dict[str, torch.Tensor]:
        """K_pred + λ·K_rep of the units of some groups, for heads times μ (Eq. 4, 5, 10 and 11)."""
        loss = self._curvature if self.config.kpred == "fisher" else self._divergence
        knowledge = {g.name: _Knowledge(g.size * g.width, site(self.model, g).weight.device) for g in groups}
        passes = differentiate(self.calibrator, list(knowledge), loss, f"score {groups[0].name}")
        for batch, inputs, gradients in passes:
            for group in groups:
                x = inputs[group.name]
                real = select_real(x, self.calibrator.real_tokens(batch, group.stack), group.name)
                by_example = torch.cat([mask_gradients(x, g[group.name], batch) for g in gradients])
                rows = by_example if self.config.kpred == "fisher" else by_example.sum(0, keepdim=True)
                knowledge[group.name].update(real, rows, len(by_example) // len(gradients))
        self.calibrator.reduce(knowledge)
        return {g.name: self._of_units(g, knowledge[g.name]) for g in groups}

    def _of_units(self, group: UnitGroup, knowledge: "_Knowledge") -> torch.Tensor:
        weights = output_matrix(site(self.model, group)).detach().double().square().mean(1)
        representation = weights * knowledge.energy / knowledge.tokens
        assert self.config.lam is not None
        columns = knowledge.prediction / knowledge.examples + self.config.lam * representation
        if not isinstance(group.block, AttentionSpec):
            return columns
        layers = self.base.get_submodule(group.stack)
        assert isinstance(layers, nn.ModuleList)
        _, _, size = head_counts(layers[group.layer], group.block)
        # The mean over the dimensions of a head; a KV group has the knowledge, as the cost, of all its query heads.
        return self.config.mu * columns.reshape(group.size, -1, size).mean(2).sum(1)

    def _predictions(self, batch: Batch) -> list[Predictions]:
        real = self.calibrator.real_tokens(batch, list(self.units.stacks)[-1])
        return predictions(self.model, self.calibrator.forward(batch), real)

    def _student(self, index: int, batch: Batch) -> list[Predictions]:
        if index == len(self.calls):
            with record_calls(self.base, self.units.stacks) as recorded:
                found = self._predictions(batch)
            self.calls.append(recorded)
            return found
        with resume_at(self.base, self.calls[index], self._starts.get(index, {})):
            return self._predictions(batch)

    def _teacher(self, index: int, batch: Batch) -> list[Predictions]:
        calls = self.calls[index]
        ends = {stack: (len(call.rest), call.end) for stack, call in calls.items()}
        with torch.no_grad(), resume_at(self.base, calls, ends):
            return self._predictions(batch)

    def _divergence(self, index: int, batch: Batch) -> list[torch.Tensor]:
        """The mean divergence from the dense model."""
        pairs = zip(self._student(index, batch), self._teacher(index, batch), strict=True)
        return [torch.cat([divergence(s, t, self.config.gamma) for s, t in pairs]).mean()]

    def _curvature(self, index: int, batch: Batch) -> list[torch.Tensor]:
        """Directions whose squared gradients add up to the curvature of the divergence.

        The start and the end of a span share one, for one backward pass instead of two: their gradients are random, of
        zero mean and independent, so that the square of their sum has the sum of their squares for its expectation.
        """
        directions: dict[int, torch.Tensor] = {}
        for which, predicted in enumerate(self._student(index, batch)):
            seeds = [(self.config.seed, which, example) for example in self.calibrator.examples[index]]
            for k, v in enumerate(curvature(predicted, self.config.gamma, seeds)):
                directions[k] = directions.get(k, torch.zeros(())) + v.sum()
        return list(directions.values())


class _Knowledge:
    """Sums over the data for the columns of one site.

    Attributes:
        prediction (`torch.Tensor`): ½·Σ of squared gradients, float64, (columns,).
        energy (`torch.Tensor`): Σ of squared inputs over real tokens, float64, (columns,).
        examples, tokens (`torch.Tensor`): Their numbers, ().
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.prediction, self.energy = torch.zeros(2, columns, dtype=torch.float64, device=device).unbind()
        self.examples, self.tokens = torch.zeros(2, dtype=torch.float64, device=device).unbind()

    def update(self, inputs: torch.Tensor, gradients: torch.Tensor, examples: int) -> None:
        """Take the inputs of some real tokens, (tokens, columns), and gradients by a mask of ones, (n, columns)."""
        self.prediction += gradients.square().sum(0) / 2
        self.energy += inputs.float().square().sum(0)
        self.examples += examples
        self.tokens += len(inputs)

    def sums(self) -> list[torch.Tensor]:
        return [self.prediction, self.energy, self.examples, self.tokens]
