"""[`PruningTrainer`]: what all methods that prune during training share."""

import copy
import os
from dataclasses import asdict, fields
from typing import Any, ClassVar

from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..batches import data_source
from ..costs import CostTable
from ..errors import ConfigError, SaveError
from ..gates import apply_mask, current_mask, remove_mask, without_mask
from ..hub import push_to_hub, save_pretrained, write_card
from ..hub.push import Repository
from ..masks import MASK_FILE, PruningMask
from ..methods import Paper
from ..report import PruningReport, unit_rows
from ..surgery import shrunk_copy
from ..units import prunable_units
from .arguments import PruningTrainingArguments, Seq2SeqPruningTrainingArguments, check_whole_model
from .distillation import DistillingTrainer

logger = logging.get_logger(__name__)

_HYPERPARAMETERS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "optim",
    "bf16",
    "seed",
)


# Arguments of Trainer.create_model_card, and what the metadata of a card call them.
_METADATA = {
    "language": "language",
    "license": "license",
    "tags": "tags",
    "finetuned_from": "base_model",
    "tasks": "pipeline_tag",
    "dataset_tags": "datasets",
}


class PruningTrainer(DistillingTrainer):
    """A `Trainer` whose model carries a mask, and whose [`~PruningTrainer.save_model`] saves the shrunk model.

    By itself it recovers a pruned model: train what [`prune`] masked, with or without distillation, then save. Masked
    units stay dead, for their gates stay closed. [`PassTrainer`] finds the mask in training.

    Checkpoints of the run (`checkpoint-500`) are for `resume_from_checkpoint`: they hold the whole model, its mask,
    which a dense model gets when the run goes on, and, with [`PassTrainer`], its gates under keys that
    `from_pretrained` reports as unexpected. What `save_model()` and
    `push_to_hub()` write is shrunk, reloaded and compared before it takes the folder's place, with tokenizer, mask
    and a report with hyperparameters, costs, and metrics of the dense and the pruned model (where `eval_strategy` asks
    for an evaluation), and a model card. With `push_to_hub=True` every commit on the Hub is such a folder: with
    `hub_strategy="end"` there is one, with `"every_save"` another one at each checkpoint. The model in memory keeps
    its shapes; [`~PruningTrainer.pruned_model`] is a shrunk copy.

    Args:
        model (`PreTrainedModel`, *optional*): The model, unless `model_init` makes it.
        args ([`PruningTrainingArguments`]): Its arguments.
        teacher_model (`PreTrainedModel`, *optional*): Where `args.distillation_weight` is above 0, whose logits the
            model learns. Defaults to a copy of the dense model as it is now, or at the first trial of a
            hyper-parameter search with such a weight.
        others: See `Trainer`.

    Raises:
        ConfigError: `args` are of another class; the model is sharded (FSDP, DeepSpeed); `teacher_model` shares
            weights with the model; `hub_strategy` would upload checkpoints for resuming, which hold the whole model
            and pickled arguments with the token. In `train`: there is no checkpoint to resume from, or it has another
            mask than the model.
        UnsupportedModelError: The model can't be pruned.

    Examples:
        ```python
        >>> hf_prune.prune(model, hf_prune.KCMConfig(budget={"macs": 0.5}), texts, processing_class=tokenizer)
        >>> args = PruningTrainingArguments("out", distillation_weight=0.5)
        >>> trainer = PruningTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
        >>> trainer.train()
        >>> trainer.save_model()
        ```
    """

    paper: ClassVar[Paper | None] = None
    arguments: ClassVar[type[PruningTrainingArguments]] = PruningTrainingArguments

    _checkpointing = False

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: PruningTrainingArguments | None = None,
        *others: Any,
        teacher_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, self.arguments):
            raise ConfigError(
                f"args must be {self.arguments.__name__}, those of {type(self).__name__}, got {type(args).__name__}."
            )
        super().__init__(model, args, *others, **kwargs)
        check_whole_model(self.args)
        prunable_units(self.model)
        self.model.add_model_tags(["hf_prune", "pruning"])
        self.metrics: dict[str, dict[str, float]] = {}
        self.card_metadata: dict[str, Any] = {}
        if self.args.eval_strategy != "no":
            # Trackers log these evaluations too: they are ready by then, and not yet closed.
            self.callback_handler.callbacks.append(_Before(self))
            self.callback_handler.callbacks.insert(0, _After(self))
        if teacher_model is None:
            self._find_teacher()
        elif self.args.distillation_weight:
            self.learn_from(teacher_model)
        else:
            raise ConfigError("A teacher_model needs a distillation_weight above 0 in the arguments.")

    def _find_teacher(self) -> None:
        """Let the dense model teach, where one is needed and there is none."""
        if self.args.distillation_weight and self.teacher_model is None:
            teacher = copy.deepcopy(self.model)
            remove_mask(teacher)
            self.learn_from(teacher)

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self.args.check_distillation()  # a trial sets it past the constructor
        self._find_teacher()

    @property
    def method(self) -> str:
        """Name of the method in the report."""
        return "training"

    def pruning_mask(self) -> PruningMask:
        """What would be left if training ended now."""
        mask = current_mask(self.model)
        return mask if mask is not None else PruningMask({}, prunable_units(self.model))

    def pruned_model(self) -> PreTrainedModel:
        """A shrunk copy of the model."""
        return self._pruned()[0]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # An evaluation before training marks the model as prepared: Accelerate would not wrap it in DDP any more, and
        # each process would train a model of its own.
        if self.model is not None:  # as between the trials of a search
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

    # Saving

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._checkpointing = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._checkpointing = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not os.path.isfile(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME)):
            raise ConfigError(
                f"{resume_from_checkpoint!r} is no checkpoint of a run, it has no {TRAINER_STATE_NAME}: give a folder "
                "such as output_dir/checkpoint-500, or True for the last one in output_dir."
            )
        self._match_checkpoint(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _match_checkpoint(self, folder: str) -> None:
        """Put the mask of a checkpoint on the model, before its weights are loaded."""
        if not os.path.isfile(os.path.join(folder, MASK_FILE)):
            return
        saved, mine = PruningMask.load(folder), current_mask(self.model)
        if mine is None:
            apply_mask(self.model, saved)
        elif mine != saved:
            raise ConfigError(
                f"The model carries another mask than the one of {folder!r}: resume with the mask of that run, with "
                "a dense model (it gets that mask), or train this one in a new run, without resume_from_checkpoint."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._checkpointing:
            # Given the weights, a prunable model saves as any other does.
            super()._save(output_dir, state_dict if state_dict is not None else self.model.state_dict())
            mask = current_mask(self.model)  # the weights of what it hides are there, and would come to life again
            if mask is not None:
                mask.save(output_dir if output_dir is not None else self.args.output_dir)
        elif self.args.should_save:
            model, mask, report = self._pruned()
            processing = self.processing_class
            if processing is None:  # as the Trainer does
                processing = getattr(self.data_collator, "tokenizer", None)
            target = output_dir if output_dir is not None else self.args.output_dir
            save_pretrained(model, target, processing_class=processing, mask=mask, report=report)

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As [`~Trainer.init_hf_repo`]: create the repository.

        Raises:
            ConfigError: There is no token, the name can't be that of a repository, or `hub_strategy` is not for this.
            SaveError: The Hub can't be reached, or refuses.
        """
        if self.args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ConfigError(
                f"hub_strategy must be 'end' or 'every_save', got {str(self.args.hub_strategy.value)!r}: checkpoints "
                "for resuming hold the whole model, and the token in their training_args.bin."
            )
        if self.is_world_process_zero():
            name = self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))
            private = private if private is not None else self.args.hub_private_repo
            self.hub_model_id = Repository(name, token or self.args.hub_token).create(private)
            self.push_in_progress = None

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Save the model, with a card that holds these metadata beside what is known of the run.

        Args:
            model_name (`str`, *optional*): What the card calls the model. Defaults to the name of the folder.
            kwargs: As of [`~Trainer.create_model_card`]: `language`, `license`, `tags`, `finetuned_from`, `tasks`,
                `dataset_tags`. The others say nothing that is not known.
        """
        self._describe(kwargs)
        self.save_model(_internal_call=True)
        if self.args.should_save:
            write_card(self.args.output_dir, name=model_name)

    def _describe(self, given: dict[str, Any]) -> None:
        self.card_metadata |= {key: given[name] for name, key in _METADATA.items() if given.get(name) is not None}

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the shrunk model, and upload it with its card in one commit.

        Args:
            commit_message, token, revision, private (*optional*): See [`~Trainer.push_to_hub`].
            blocking (`bool`, *optional*, defaults to `True`): Kept for `Trainer`: the upload is waited for, as the
                next save replaces the folder.
            kwargs: Metadata of the card, see [`~PruningTrainer.create_model_card`].

        Returns:
            `CommitInfo`: On the main process, `None` on others.

        Raises:
            ConfigError, SaveError: See [`hub.push_to_hub`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self._describe(kwargs)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return push_to_hub(
            self.args.output_dir,
            str(self.hub_model_id),
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self._checkpointing = False
        try:
            self.push_to_hub(f"Training in progress, step {self.state.global_step}")
        except SaveError as error:  # the training is worth more, and the next save pushes again
            logger.warning(f"The training goes on: {error}")
        finally:
            self._checkpointing = True

    def _pruned(self) -> tuple[PreTrainedModel, PruningMask, PruningReport]:
        mask = self.pruning_mask()
        table = CostTable(self.model)
        report = PruningReport(
            method=self.method,
            config={"method": self.method, **self.options()},
            model_class=type(self.model).__name__,
            model_type=table.units.model_type,
            before=table.of().to_dict(),
            after=table.of(mask).to_dict(),
            sequence_lengths=table.lengths,
            units=unit_rows(table.units, mask),
            seconds=next((x["train_runtime"] for x in reversed(self.state.log_history) if "train_runtime" in x), 0.0),
            calibration=self._training_data(),
            processes=self.args.world_size,
            facts=self.facts(),
            papers=[asdict(self.paper)] if self.paper is not None else [],
            evaluation=self._evaluation(),
            metadata=dict(self.card_metadata),
        )
        return shrunk_copy(self.model, mask), mask, report

    def _training_data(self) -> dict[str, Any] | None:
        """How many examples there are, and, of a `datasets.Dataset`, which."""
        data = self.train_dataset
        found: dict[str, Any] = data_source(data)
        if hasattr(data, "__len__"):
            found["samples"] = len(data)
        if isinstance(getattr(data, "_fingerprint", None), str):
            found["fingerprint"] = data._fingerprint
        return found or None

    def _evaluation(self) -> list[dict[str, Any]]:
        """The metrics of the dense and the pruned model, side by side."""
        before, after = (self.metrics.get(when, {}) for when in ("before", "after"))
        data = self.eval_dataset
        about: dict[str, Any] = data_source(data)
        if hasattr(data, "__len__") and not isinstance(data, dict):
            about["n"] = len(data)
        return [
            {"metric": name, "before": value, "after": after[name], **about}
            for name, value in before.items()
            if name in after
        ]

    def options(self) -> dict[str, Any]:
        """What the report says of the arguments: the method's own, and the hyperparameters."""
        given = self.args.to_dict()
        stock = {field.name for field in fields(Seq2SeqTrainingArguments)}
        own = [field.name for field in fields(self.args) if field.name not in stock]
        return {name: given[name] for name in (*own, *_HYPERPARAMETERS)}

    def facts(self) -> dict[str, Any]:
        """What the report says about the run beyond hyperparameters and costs."""
        return {"steps": self.state.global_step, "metrics": self.metrics}


class _Before(TrainerCallback):  # type: ignore[misc]
    """Evaluates the dense model when training begins. A run that goes on finds the metrics in its logs."""

    def __init__(self, trainer: PruningTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            with without_mask(self.trainer.model):
                metrics = self.trainer.evaluate(metric_key_prefix="dense")
        else:
            metrics = {name: value for entry in state.log_history for name, value in entry.items()}
        self.trainer.metrics["before"] = _quality(metrics, "dense_")


class _After(TrainerCallback):  # type: ignore[misc]
    """Evaluates what is left of the model when training ends."""

    def __init__(self, trainer: PruningTrainer) -> None:
        self.trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.metrics["after"] = _quality(self.trainer.evaluate(), "eval_")


_SPEED = ("runtime", "per_second", "preparation_time")


def _quality(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """What an evaluation says of the model, not of the machine."""
    return {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix) and not k.endswith(_SPEED)}


class Seq2SeqPruningTrainer(PruningTrainer, Seq2SeqTrainer):  # type: ignore[misc]
    """[`PruningTrainer`] with `predict_with_generate`. Its args are [`Seq2SeqPruningTrainingArguments`]."""

    arguments = Seq2SeqPruningTrainingArguments
