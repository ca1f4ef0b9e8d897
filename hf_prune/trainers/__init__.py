"""Pruning while training: trainers, callbacks, distillation."""

from .arguments import (
    PassOptions,
    PassTrainingArguments,
    PruningTrainingArguments,
    Seq2SeqPassTrainingArguments,
    Seq2SeqPruningTrainingArguments,
)
from .callbacks import GradualSparsityCallback, KeepMaskCallback
from .distillation import distillation_loss
from .pass_ import PassCallback, PassTrainer, Seq2SeqPassTrainer
from .pruning import PruningTrainer, Seq2SeqPruningTrainer

__all__ = [
    "GradualSparsityCallback",
    "KeepMaskCallback",
    "PassCallback",
    "PassOptions",
    "PassTrainer",
    "PassTrainingArguments",
    "PruningTrainer",
    "PruningTrainingArguments",
    "Seq2SeqPassTrainer",
    "Seq2SeqPassTrainingArguments",
    "Seq2SeqPruningTrainer",
    "Seq2SeqPruningTrainingArguments",
    "distillation_loss",
]
