"""Recovery keeps what was pruned at zero: LoRA with its merge, and a full fine-tuning under a mask."""

import peft
import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from tiny import DECODERS, tiny_batch, tiny_model

import hf_prune
from hf_prune import ConfigError, MaskError, UnsupportedModelError, WeightMagnitudeConfig, WeightMask
from hf_prune.recovery import recover_with_lora


def dataset(name, size=8):
    batch = tiny_batch(name, size=size, padded=True, labels=True)
    return [{key: value[i] for key, value in batch.items()} for i in range(size)]


def arguments(folder, cls=T.TrainingArguments, **options):
    options = {"max_steps": 3, "save_strategy": "no", "learning_rate": 1e-2, "logging_steps": 1, **options}
    return cls(
        str(folder), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, report_to="none", **options
    )


def pruned(name, dtype=torch.float32, **options):
    model = tiny_model(name).to(dtype)
    return model, hf_prune.prune(model, WeightMagnitudeConfig(**{"sparsity": 0.5, **options})).mask


def logits(model, name):
    batch = tiny_batch(name, padded=True)
    with torch.no_grad():
        return model.eval()(**batch).logits


class Last(T.TrainerCallback):
    """What the trained model returns, and which parameters were trained, before the merge."""

    def __init__(self, name):
        self.name = name

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.logits = logits(model, self.name)
        self.trained = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
        self.wrapper = type(model).__name__


@pytest.mark.parametrize(
    "name, wrapper, head",
    [
        ("llama", "PeftModelForCausalLM", None),
        ("gpt2", "PeftModelForCausalLM", None),  # Conv1D
        ("phi3", "PeftModelForCausalLM", None),
        ("t5", "PeftModelForSeq2SeqLM", None),
        ("whisper", "PeftModel", None),
        ("distilbert", "PeftModelForSequenceClassification", "pre_classifier"),
        ("vit", "PeftModel", "classifier"),
    ],
)
def test_the_merged_model_is_the_trained_one_with_all_zeros(name, wrapper, head, tmp_path):
    model, mask = pruned(name)
    names, before, last = [n for n, _ in model.named_parameters()], logits(model, name), Last(name)
    values = {n: model.get_parameter(n).detach().clone() for n in mask}
    assert recover_with_lora(model, mask, dataset(name), args=arguments(tmp_path), callbacks=[last]) is model
    torch.testing.assert_close(logits(model, name), last.logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, last.logits, atol=1e-2)
    for key, keep in mask.items():
        after = model.get_parameter(key)
        assert (after[~keep] == 0).all() and not torch.equal(after, values[key]), key
    assert last.wrapper == wrapper and len([n for n in last.trained if "lora_A" in n]) == len(mask)
    assert {n.split(".")[2] for n in last.trained if "lora" not in n} >= ({head} if head else set())
    assert name not in DECODERS or all("lora" in n for n in last.trained)
    # An ordinary model again: no adapters, the same parameters, all of them trainable, ready to be saved.
    assert [n for n, _ in model.named_parameters()] == names and not hasattr(model, "peft_config")
    assert all(p.requires_grad for n, p in model.named_parameters() if "embed_positions" not in n)
    hf_prune.save_pretrained(model, tmp_path / "out", mask=mask)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bfloat16_weights_and_float32_adapters(name, tmp_path):
    model, mask = pruned(name, torch.bfloat16, sparsity=None, pattern="2:4")
    last = Last(name)
    recover_with_lora(model, mask, dataset(name), args=arguments(tmp_path), callbacks=[last])
    assert torch.equal(logits(model, name), last.logits) and model.dtype == torch.bfloat16
    assert set(last.trained.values()) == {torch.float32}
    mask.check(model)


def test_the_report_learns_of_it(tmp_path):
    model = tiny_model("llama")
    result = hf_prune.prune(model, WeightMagnitudeConfig(sparsity=0.5))
    assert result.report.recovery is None and "peft" not in result.report.packages
    recover_with_lora(model, result.mask, dataset("llama"), args=arguments(tmp_path), report=result.report)
    assert result.report.recovery == {"method": "LoRA", "rank": 8, "steps": 3}
    assert result.report.packages["peft"] == peft.__version__


def test_autocast_rounds_no_adapter(tmp_path):
    model, mask = pruned("llama")
    last = Last("llama")
    recover_with_lora(model, mask, dataset("llama"), args=arguments(tmp_path, bf16=True), callbacks=[last])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model, "llama"), last.logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, tmp_path):
    def run(**options):
        model, mask = pruned("llama")
        args = arguments(tmp_path, gradient_accumulation_steps=2, **options)
        return recover_with_lora(model, mask, dataset("llama"), args=args).state_dict()

    with pytest.warns(FutureWarning):
        kwargs = {"use_reentrant": reentrant}
        two = run(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert all(torch.equal(value, two[key]) for key, value in run().items())


def test_resuming_ends_with_the_same_weights(tmp_path):
    def run(folder, resume=None):
        model, mask = pruned("bert")
        torch.manual_seed(len(str(resume)))  # the seed of the arguments decides
        best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
        args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, **best)
        data = dataset("bert")
        recover_with_lora(model, mask, data, args=args, eval_dataset=data, resume_from_checkpoint=resume)
        mask.check(model)
        return model.state_dict()

    one = run(tmp_path / "a")
    two = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_config_of_the_user(tmp_path):
    model, mask = pruned("llama", exclude=("layers.0.*",))
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], exclude_modules=r".*layers\.0\..*")
    given, dense = repr(config), {n: p.detach().clone() for n, p in model.named_parameters()}
    recover_with_lora(model, mask, dataset("llama"), config, arguments(tmp_path))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, dense[n])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (1, 2)} and repr(config) == given


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("given", ["mask", "masked", "shrunk"])
def test_shrunk_models_get_plain_lora(name, given, tmp_path, random_mask):
    model = tiny_model(name)
    mask = random_mask(hf_prune.prunable_units(model), drop=True)
    if given != "mask":
        hf_prune.apply_mask(model, mask)
    if given == "shrunk":
        hf_prune.shrink(model)
    count = sum(p.numel() for p in hf_prune.shrink(tiny_model(name), mask).parameters())
    last, config = Last(name), LoraConfig(r=4, lora_dropout=0.1, use_dora=True)
    args = arguments(tmp_path)
    recover_with_lora(model, mask if given == "mask" else None, dataset(name), config, args, callbacks=[last])
    torch.testing.assert_close(logits(model, name), last.logits, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == count and hf_prune.current_mask(model) is None
    hf_prune.save_pretrained(model, tmp_path / "out")


class Broken(T.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("the power failed")


class Diverging(T.TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)


@pytest.mark.parametrize(
    "config, callback, error, message",
    [
        ({"bias": "all"}, Broken(), RuntimeError, "the power failed"),
        ({}, Diverging(), ConfigError, "training diverged"),
        ({"target_modules": ["query", "pooler.dense"]}, None, ConfigError, "match bert.pooler.dense, which the mask"),
        ({"target_modules": ["nothing"]}, None, ValueError, "target_modules"),
        ({"modules_to_save": ["output"]}, None, ConfigError, "modules_to_save holds bert.encoder.layer.0"),
        ({"lora_dropout": 0.1, "use_dora": True}, None, ConfigError, "leave lora_dropout=0.1, use_dora=True away"),
        ({"init_lora_weights": "pissa"}, None, ConfigError, "leave init_lora_weights='pissa' away"),
    ],
)
def test_a_failure_changes_nothing(config, callback, error, message, tmp_path):
    model, mask = pruned("bert")
    model.bert.embeddings.requires_grad_(False)
    before = {n: (p, p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        callbacks = [callback] if callback else []
        recover_with_lora(model, mask, dataset("bert"), LoraConfig(**config), arguments(tmp_path), callbacks=callbacks)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and not model.training and not hasattr(model, "peft_config")
    for name, (parameter, value, trains) in before.items():
        assert after[name] is parameter and torch.equal(parameter, value) and parameter.requires_grad == trains
    recover_with_lora(model, mask, dataset("bert"), args=arguments(tmp_path, max_steps=1))


def test_masks_and_models_that_do_not_fit(tmp_path, random_mask):
    data, args = dataset("bert"), arguments(tmp_path)
    model, mask = pruned("bert")
    for wrong, message in (
        (pruned("llama")[1], "another model"),
        (random_mask(hf_prune.prunable_units(tiny_model("llama"))), "for a llama"),
        (WeightMask({"classifier.bias": torch.ones(2, dtype=torch.bool)}), "prunes no projection"),
        ({"classifier.weight": torch.ones(2, 32, dtype=torch.bool)}, "must be a WeightMask, a PruningMask or None"),
    ):
        with pytest.raises(MaskError, match=message):
            recover_with_lora(model, wrong, data, args=args)
    units = random_mask(hf_prune.prunable_units(tiny_model("bert")))
    with pytest.raises(MaskError, match="a model that is shrunk already, pass mask=None"):
        recover_with_lora(hf_prune.shrink(tiny_model("bert"), units), units, data, args=args)
    with pytest.raises(MaskError, match="are not zero"):
        recover_with_lora(tiny_model("bert"), mask, data, args=args)
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        recover_with_lora(get_peft_model(model, LoraConfig(target_modules=["query"])), mask, data, args=args)


@pytest.mark.parametrize("dtype, options", [("float32", {}), ("float32", {"bf16": True}), ("bfloat16", {})])
def test_all_weights_train_under_a_mask(dtype, options, tmp_path):
    model, mask = pruned("gpt2", getattr(torch, dtype))
    zeros = []

    class Spy(T.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            mask.check(model)
            zeros.append(state.global_step)

    best = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = arguments(
        tmp_path,
        max_steps=6,
        weight_decay=0.1,
        gradient_accumulation_steps=2,
        load_best_model_at_end=True,
        **best,
        **options,
    )
    data, before = dataset("gpt2"), logits(model, "gpt2")
    callbacks = [hf_prune.KeepMaskCallback(mask), Spy()]
    trainer = T.Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    trainer.train()
    mask.check(trainer.model)
    assert zeros == list(range(1, 7)) and not torch.equal(logits(model, "gpt2"), before)


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_a_teacher_is_followed(name, tmp_path):
    model, mask = pruned(name)
    teacher = tiny_model(name)
    before = (logits(model, name) - logits(teacher, name)).square().mean()
    args = arguments(
        tmp_path, hf_prune.PruningTrainingArguments, distillation_weight=1.0, max_steps=15, learning_rate=5e-3
    )
    recover_with_lora(model, mask, dataset(name), LoraConfig(r=8), args, teacher_model=teacher)
    assert (logits(model, name) - logits(teacher, name)).square().mean() < 0.8 * before
    mask.check(model)


def test_a_teacher_needs_a_weight_and_the_other_way_round(tmp_path):
    model, mask = pruned("gpt2")
    args = hf_prune.PruningTrainingArguments(str(tmp_path), distillation_weight=0.5, use_cpu=True)
    for options in ({"args": args}, {"args": arguments(tmp_path), "teacher_model": tiny_model("gpt2")}):
        with pytest.raises(ConfigError, match="Distillation needs a teacher_model"):
            recover_with_lora(model, mask, dataset("gpt2"), **options)
