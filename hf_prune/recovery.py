"""Recover quality after pruning with LoRA, such that zeros stay zeros."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from .errors import ConfigError, MaskError
from .gates import current_mask
from .masks import PruningMask
from .matrices import weight_matrices
from .offload import refuse_offloaded
from .report import PruningReport, package_versions
from .surgery import shrink
from .trainers import PruningTrainingArguments
from .trainers.arguments import check_whole_model
from .trainers.distillation import DistillingTrainer
from .units import base_model, prunable_units, refuse_unprunable
from .weight_masks import WeightMask

_TASKS = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


class SparseLoraLinear(lora.Linear):  # type: ignore[misc]  # PEFT is not type-checked here
    """A LoRA layer that changes no pruned weight: W + keep ⊙ (B·A)·scaling, in training as in the merge.

    B·A is dense, so the change is made as a matrix and masked: one matrix product a step as without LoRA, at the cost
    of a second copy of the weight until the backward pass (gradient checkpointing frees it). The sum is rounded to the
    dtype of W as in the merge, so the merged model equals the trained one to the bit, in bfloat16 too; A and B are
    float32.
    """

    pruned: torch.Tensor  # bool, in the shape of W

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        with torch.autocast(self.pruned.device.type, enabled=False):
            delta: torch.Tensor = super().get_delta_weight(adapter)
        return delta.masked_fill(self.pruned, 0)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor
        if self.disable_adapters or self.merged:
            result = super().forward(x, *args, **kwargs)
        else:
            base, (adapter,) = self.base_layer, self.active_adapters
            weight = (base.weight + self.get_delta_weight(adapter)).to(base.weight.dtype)
            result = functional_call(base, {"weight": weight}, (x,))
        return result


def recover_with_lora(
    model: PreTrainedModel,
    mask: WeightMask | PruningMask | None,
    train_dataset: Any,
    lora_config: LoraConfig | None = None,
    args: TrainingArguments | None = None,
    *,
    teacher_model: PreTrainedModel | None = None,
    resume_from_checkpoint: str | bool | None = None,
    report: PruningReport | None = None,
    **trainer_options: Any,
) -> PreTrainedModel:
    """Fine-tune a pruned model with LoRA in a `Trainer`, and merge. What is pruned stays pruned.

    With a [`WeightMask`] the adapters change kept weights only, in training and in the merge: the merged model has
    every zero and computes what the trained one did. All weights that are kept can also be trained, in any `Trainer`:
    `Trainer(model, args, train_dataset=dataset, callbacks=[KeepMaskCallback(mask)])`.

    Args:
        model (`PreTrainedModel`): The pruned model. Its weights may be bfloat16; adapters are float32.
        mask ([`WeightMask`], [`PruningMask`] or `None`): What pruning left: `result.mask`. Of a model with masked
            heads, neurons or layers (`None`: those of its own mask, or it is shrunk already) LoRA would revive what
            the mask hides, so it is shrunk first.
        train_dataset (`Dataset`): As `Trainer` takes it, with labels or a `data_collator` that makes them.
        lora_config (`LoraConfig`, *optional*): Defaults to `r=8`. Where it leaves them open, `target_modules` are all
            pruned projections (without a mask of weights: all in the blocks), since all of them lost something to
            recover; `task_type` follows the class; `modules_to_save` is the head of a classifier.
        args (`TrainingArguments`, *optional*): Defaults to one epoch with a learning rate of 1e-4 and no checkpoints.
        teacher_model (`PreTrainedModel`, *optional*): Whose logits the model learns, such as the dense model. Then
            `args` are [`PruningTrainingArguments`] with a `distillation_weight`.
        resume_from_checkpoint (`str` or `bool`, *optional*): See `Trainer.train`. Checkpoints hold the adapters; only
            this function applies them with the mask.
        report ([`PruningReport`], *optional*): Where to note the recovery and the version of PEFT.
        trainer_options: Whatever else `Trainer` takes: `processing_class`, `data_collator`, `eval_dataset`,
            `callbacks`.

    Returns:
        `PreTrainedModel`: The same object, with the adapters merged.

    Raises:
        MaskError: The mask is for another model, or pruned weights are not zero.
        UnsupportedModelError: The model is quantised, offloaded, or carries adapters.
        ConfigError: `lora_config` targets what the mask does not prune, or asks for more than plain LoRA together with
            a mask of weights; there is a teacher without a weight or the other way round; the model would be sharded;
            the training diverged.

    After an error the weights are as before (unless `init_lora_weights` changes them from the start, as PiSSA does); a
    model that had to be shrunk stays shrunk.

    Examples:
        ```python
        >>> mask = hf_prune.prune(model, hf_prune.WandaConfig(pattern="2:4"), texts, processing_class=tokenizer).mask
        >>> collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        >>> hf_prune.recover_with_lora(model, mask, dataset, data_collator=collator)
        >>> hf_prune.save_pretrained(model, "recovered", mask=mask)
        ```
    """
    refuse_unprunable(model)
    refuse_offloaded(model)
    args = args if args is not None else TrainingArguments(learning_rate=1e-4, num_train_epochs=1, save_strategy="no")
    check_whole_model(args)
    distils = isinstance(args, PruningTrainingArguments) and args.distillation_weight > 0
    if distils != (teacher_model is not None):
        raise ConfigError(
            "Distillation needs a teacher_model, such as the dense one loaded afresh, and args="
            "PruningTrainingArguments(output_dir, distillation_weight=0.5)."
        )
    config = copy.deepcopy(lora_config) if lora_config is not None else LoraConfig(r=8)
    if isinstance(mask, WeightMask):
        mask.check(model)
        _check_plain(config)
        targets = [name.removesuffix(".weight") for name in mask if name.endswith(".weight")]
        targets = [name for name in targets if isinstance(model.get_submodule(name), nn.Linear | Conv1D)]
    else:
        if mask is not None and not isinstance(mask, PruningMask):
            raise MaskError(f"mask must be a WeightMask, a PruningMask or None, got {type(mask).__name__}.")
        _shrink_masked(model, mask)
        matrices = weight_matrices(model, prunable_units(model))
        targets = [matrix.module for matrix in matrices if matrix.inputs and matrix.outputs]
    _complete(config, model, targets)

    set_seed(args.seed)  # before the adapters are drawn: Trainer sets it later
    with _restored(model):
        if isinstance(mask, WeightMask):
            config._register_custom_module(dict.fromkeys((nn.Linear, Conv1D), SparseLoraLinear))
        adapted = get_peft_model(model, config)
        if isinstance(mask, WeightMask):
            _mask_adapters(model, mask)
        trainer = DistillingTrainer(adapted, args, train_dataset=train_dataset, **trainer_options)
        if teacher_model is not None:
            trainer.learn_from(teacher_model)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        if not all(parameter.isfinite().all() for parameter in adapted.parameters() if parameter.requires_grad):
            raise ConfigError("The training diverged, adapters are not finite: lower the learning rate.")
        adapted.merge_and_unload()
    if isinstance(mask, WeightMask):
        mask.check(model)
    if report is not None:
        report.recovery = {"method": "LoRA", "rank": config.r, "steps": trainer.state.global_step}
        report.packages |= package_versions("peft")
    return model


def _shrink_masked(model: PreTrainedModel, mask: PruningMask | None) -> None:
    """Shrink a model to a mask, or to the one that it carries."""
    if mask is None:
        mask = current_mask(model)
    if mask is not None:
        try:
            shrink(model, mask)
        except MaskError as error:
            raise MaskError(f"{error} For a model that is shrunk already, pass mask=None.") from error


def _check_plain(config: LoraConfig) -> None:
    """Raise unless all that the adapters do is a change of the weight, which a mask of weights can mask."""
    variants = [field.name for field in fields(config) if field.metadata.get("is_lora_variant")]
    names = [*variants, "use_dora", "lora_dropout", "lora_bias", "layer_replication", "target_parameters"]
    given = sorted({name for name in names if getattr(config, name, None)})
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        given.append("init_lora_weights")  # the others change the weights from the start
    if given:
        listed = ", ".join(f"{name}={getattr(config, name)!r}" for name in given)
        raise ConfigError(
            f"With a mask of weights LoRA has to be plain, a change of the kept weights and nothing else: leave "
            f"{listed} away."
        )


def _complete(config: LoraConfig, model: PreTrainedModel, targets: list[str]) -> None:
    """Fill in what a config leaves open."""
    if not targets:
        raise MaskError("The mask prunes no projection (nn.Linear or Conv1D), so LoRA has nothing to recover.")
    if config.target_modules is None and not getattr(config, "target_parameters", None):
        config.target_modules = set(targets)
    config.fan_in_fan_out = isinstance(model.get_submodule(targets[0]), Conv1D)
    if config.task_type is None and model.main_input_name == "input_ids":  # PEFT's wrappers pass input_ids on
        names = (t for t, names in _TASKS.items() if names.get(model.config.model_type) == type(model).__name__)
        config.task_type = next(names, None)
    base = base_model(model)
    if config.modules_to_save is None and model.get_output_embeddings() is None and base is not model:
        heads = [(name, head) for name, head in model.named_children() if head is not base]
        config.modules_to_save = [name for name, head in heads if any(True for _ in head.parameters())] or None


def _mask_adapters(model: PreTrainedModel, mask: WeightMask) -> None:
    """Give each adapter its mask. No other parameter of the mask may be trained."""
    for name in mask:
        path, _, own = name.rpartition(".")
        layer = model.get_submodule(path)
        if isinstance(layer, SparseLoraLinear) and own == "weight":
            layer.register_buffer("pruned", ~mask[name].to(layer.base_layer.weight.device), persistent=False)
        elif getattr(layer, own).requires_grad:
            raise ConfigError(f"modules_to_save holds {path}, whose pruned weights would be trained: leave it away.")
    adapters = {name: layer for name, layer in model.named_modules() if isinstance(layer, lora.LoraLayer)}
    outside = [name for name, layer in adapters.items() if not hasattr(layer, "pruned")]
    if outside:
        raise ConfigError(
            f"target_modules match {', '.join(outside[:3])}{', …' if len(outside) > 3 else ''}, which the mask does "
            "not prune: name pruned projections, or leave these out with exclude_modules."
        )


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Around PEFT: afterwards parameters train as before, and after an error all modules are the old ones."""
    modules = [(module, dict(module._modules)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    biases = [
        (p, p.detach().clone()) for name, p in model.named_parameters() if "bias" in name
    ]  # PEFT can train these
    training = model.training
    try:
        yield
    except BaseException:
        for module, children in modules:
            module._modules.update(children)
        for parameter, value in biases:
            parameter.data.copy_(value)
        vars(model).pop("peft_config", None)
        raise
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(training)
