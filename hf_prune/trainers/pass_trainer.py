"""PASS as a `Trainer`: see [`pass_callback`]."""

import os
from dataclasses import fields
from typing import Any

import torch
from transformers import Seq2SeqTrainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..methods import Paper
from .arguments import PassOptions, PassTrainingArguments, Seq2SeqPassTrainingArguments
from .pass_callback import PassCallback, saved_state
from .pruning import PruningTrainer


class PassTrainer(PruningTrainer):
    """A `Trainer` that ends with exactly `num_heads` attention heads: PASS, or PASSCONC with `concentrate=True`.

    It is a [`PruningTrainer`] with a [`PassCallback`], and takes the arguments of both.

    Args:
        args ([`PassTrainingArguments`]): Its arguments.
        others: See [`PruningTrainer`].

    Raises:
        ConfigError, UnsupportedModelError: See [`PassCallback`].

    Examples:
        ```python
        >>> args = PassTrainingArguments("out", num_heads=48, num_train_epochs=3, learning_rate=2e-5)
        >>> trainer = PassTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
        >>> trainer.train()
        >>> trainer.save_model()  # shrunk, reloaded and compared
        ```
    """

    paper = Paper(
        "PASS: Pruning Attention Heads with Almost-sure Sparsity Targets",
        "TMLR 2024",
        "",
        "Dujian Ding and Ganesh Jawahar and Laks V. S. Lakshmanan",
        "https://openreview.net/forum?id=S4duStTKGL",
    )
    arguments = PassTrainingArguments
    _ready = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In front of the others, which then log what it adds to the logs.
        self.callback_handler.callbacks.insert(0, PassCallback(**self._pass_options()))
        self.callback.on_init_end(self.args, self.state, self.control, model=self.model)
        self._ready = True

    def _pass_options(self) -> dict[str, Any]:
        return {field.name: getattr(self.args, field.name) for field in fields(PassOptions)}

    @property
    def callback(self) -> PassCallback:
        """The [`PassCallback`] that trains the gates."""
        found: PassCallback = next(c for c in self.callback_handler.callbacks if isinstance(c, PassCallback))
        return found

    @property
    def method(self) -> str:
        return "passconc" if self.callback.options.concentrate else "pass"

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        if self._ready:
            self.callback.on_init_end(self.args, self.state, self.control, model=model)
        return model

    def _match_checkpoint(self, folder: str) -> None:
        saved_state(self.callback, TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME)))

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        # A restored callback comes last.
        self.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, PassCallback))

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self.callback.options = PassOptions(**self._pass_options())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # before the gradients of the weights are clipped
            self.callback.take_gradients()
        return loss

    def options(self) -> dict[str, Any]:
        found = self.callback
        chosen = {"gate_learning_rate": found.rate, "lambda_steps": found.steps, "reopen": found.reopen}
        return {**super().options(), **(chosen if found.rate else {})}  # known once training has begun

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "lambda": self.callback.penalty_weight, "saturated": self.callback.saturated}


class Seq2SeqPassTrainer(PassTrainer, Seq2SeqTrainer):  # type: ignore[misc]
    """[`PassTrainer`] with `predict_with_generate`. Its args are [`Seq2SeqPassTrainingArguments`]."""

    arguments = Seq2SeqPassTrainingArguments
