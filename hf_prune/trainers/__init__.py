"""Pruning while training: trainers, callbacks, distillation."""

from .arguments import (
    PassOptions,
    PassTrainingArguments,
    PruningTrainingArguments,
    Seq2SeqPassTrainingArguments,
    Seq2SeqPruningTrainingArguments,
    Seq2SeqSuperNetTrainingArguments,
    SuperNetTrainingArguments,
)
from .callbacks import GradualSparsityCallback, KeepMaskCallback
from .distillation import distillation_loss
from .pass_callback import PassCallback
from .pass_trainer import PassTrainer, Seq2SeqPassTrainer
from .pruning import PruningTrainer, Seq2SeqPruningTrainer
from .supernet import Seq2SeqSuperNetTrainer, SuperNetTrainer

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
    "Seq2SeqSuperNetTrainer",
    "Seq2SeqSuperNetTrainingArguments",
    "SuperNetTrainer",
    "SuperNetTrainingArguments",
    "distillation_loss",
]
