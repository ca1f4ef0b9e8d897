"""Callbacks in any Trainer: PASS, masks that are kept, gradual sparsity."""

import pytest
import torch
import transformers as T
from tiny import SEQ2SEQ, tiny_batch, tiny_model
from torch.testing import assert_close
from trained import NO_DROPOUT, arguments, examples, gate_values

import hf_prune
from hf_prune.errors import ConfigError, MaskError


def train(name, folder, callback, model=None, cls=None, resume=None, **options):
    seq2seq = name in SEQ2SEQ
    batch = tiny_batch(name, size=16, padded=True, labels=True)
    data = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    options = {"max_steps": 8, "save_strategy": "no", "logging_steps": 1, **options}
    args = (T.Seq2SeqTrainingArguments if seq2seq else T.TrainingArguments)(
        str(folder), per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True, disable_tqdm=True, **options
    )
    model = model if model is not None else tiny_model(name)
    cls = cls or (T.Seq2SeqTrainer if seq2seq else T.Trainer)
    trainer = cls(model, args, train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**tiny_batch(name, padded=True)).logits


class OwnTrainer(T.Trainer):
    """As those of TRL: another loss, other logs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + 0.1 * outputs.logits.float().square().mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("cls", [None, OwnTrainer])
@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_pass_in_any_trainer(name, cls, tmp_path):
    callback = hf_prune.PassCallback(num_heads=2, reopen=True, concentrate=True)
    trainer = train(name, tmp_path, callback, cls=cls, weight_decay=0.1, gradient_accumulation_steps=2)
    model = trainer.model
    mask = hf_prune.current_mask(model)
    assert mask.kept("heads") == 2
    entry = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert entry["pass_lambda"] > 0 and entry["heads_open"] + entry["heads_closed"] + entry["heads_undecided"] > 0
    masked = logits(model, name)
    trainer.save_model()  # the stock one knows no mask: the weights of the closed heads are zero
    loaded = type(model).from_pretrained(tmp_path)
    assert_close(logits(loaded, name), masked, atol=2e-5, rtol=1e-5)
    small = hf_prune.shrink(model)
    assert_close(logits(small, name), masked, atol=2e-5, rtol=1e-5)
    hf_prune.save_pretrained(small, tmp_path / "small")


@pytest.mark.parametrize("name", ["vit", "bert", "bart", "llama"])
def test_steps_that_the_trainer_accumulates_are_those_of_large_batches(name, tmp_path):
    """Also where `Trainer` adds up the means of the batches, and so multiplies the loss of the task."""
    runs = []
    for size, accumulate in ((4, 1), (2, 2)):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, max_grad_norm=0.0)
        args = arguments(name, tmp_path, T.TrainingArguments, max_steps=4, optim="sgd", learning_rate=1e-6, **options)
        callback = hf_prune.PassCallback(num_heads=3, lambda_base=0.1)
        callback._draw = lambda args, state: None  # one noise for all of the step makes the gradients comparable
        model = tiny_model(name, **NO_DROPOUT)
        trainer = T.Trainer(model, args, train_dataset=examples(name, 16), callbacks=[callback])
        runs.append(gate_values(trainer))
        trainer.train()
        assert callback.adds_means == (name in ("bert", "bart"))
    for one, two in zip(*runs, strict=True):
        assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_the_callback_alone_and_the_trainer_do_the_same_without_clipping(tmp_path):
    def phi(cls, args_class, callbacks, **options):
        args = arguments("bert", tmp_path, args_class, max_steps=6, max_grad_norm=0.0, **options)
        trainer = cls(tiny_model("bert"), args, train_dataset=examples("bert", 16), callbacks=callbacks)
        values = gate_values(trainer)
        trainer.train()
        return values

    alone = phi(T.Trainer, T.TrainingArguments, [hf_prune.PassCallback(num_heads=4)])
    whole = phi(hf_prune.PassTrainer, hf_prune.PassTrainingArguments, [], num_heads=4)
    assert all(torch.equal(a, b) for a, b in zip(alone, whole, strict=True))


def test_the_callback_resumes(tmp_path):
    def run(folder, resume=None):
        callback = hf_prune.PassCallback(num_heads=4)
        trainer = train("bert", folder, callback, save_strategy="steps", save_steps=3, resume=resume)
        return trainer.model.state_dict(), hf_prune.current_mask(trainer.model)

    one = run(tmp_path / "a")
    two = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-3"))
    assert one[1] == two[1] and all(torch.equal(value, two[0][key]) for key, value in one[0].items())


def test_a_callback_that_can_not_work_says_so(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="num_heads is missing"):
        hf_prune.PassCallback()
    with pytest.raises(ConfigError, match="num_heads must be from 1 to 12"):
        train("bert", tmp_path, hf_prune.PassCallback(num_heads=99))
    with pytest.raises(ConfigError, match="has head gates already"):
        model = tiny_model("bert")
        hf_prune.trainers.head_gates.add_head_gates(model)
        train("bert", tmp_path, hf_prune.PassCallback(num_heads=3), model)
    args = T.TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1)
    trainer = T.Trainer(
        None,
        args,
        model_init=lambda: tiny_model("bert"),
        train_dataset=[{"input_ids": [1, 2], "labels": 0}] * 8,
        callbacks=[hf_prune.PassCallback(num_heads=3)],
    )
    with pytest.raises(ConfigError, match="with model_init use a PassTrainer"):
        trainer.train()
    callback, model = hf_prune.PassCallback(num_heads=3), tiny_model("bert")
    for name, value in (("fp16", True), ("mixed_precision", "fp16")):  # the second is how accelerate says it
        with monkeypatch.context() as patched, pytest.raises(ConfigError, match="use bf16=True instead"):
            patched.setattr(args, name, value)
            callback.on_init_end(args, None, None, model=model)
    train("bert", tmp_path, hf_prune.KeepMaskCallback({}), max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ConfigError, match="saved without head gates"):
        train("bert", tmp_path, hf_prune.PassCallback(num_heads=3), resume=str(tmp_path / "checkpoint-1"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for callback in (hf_prune.KeepMaskCallback({}), hf_prune.GradualSparsityCallback(0.5)):
        with pytest.raises(ConfigError, match="fsdp splits the model"):
            callback.on_train_begin(args, T.TrainerState(max_steps=1), None, model=model)


def test_the_heat_map_of_gates(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train("bert", tmp_path, hf_prune.PassCallback(num_heads=4), max_steps=2, report_to="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "runs" / "head_gates"))
    events.Reload()
    images = events.Images("head_gates")
    assert [image.step for image in images] == [1, 2]
    assert (images[0].height, images[0].width) == (16 * 3, 16 * 4)  # 3 modules of 4 heads
    assert [x.value for x in events.Scalars("head_gates/pass_lambda")] == pytest.approx([1e-2, 10])
    assert [x.value for x in events.Scalars("head_gates/heads_undecided")] == [12, 12]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_pass_in_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(97)} | {"<pad>": 97, "<eos>": 98}
    tokenizer = T.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="<pad>", eos_token="<eos>"
    )
    ids = tiny_batch("llama", size=16)["input_ids"].tolist()
    args = trl.SFTConfig(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    callback = hf_prune.PassCallback(num_heads=2, reopen=True, lambda_steps=1)
    trainer = trl.SFTTrainer(
        tiny_model("llama"),
        args,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.reopen and callback.events == {2, 3}
    assert hf_prune.current_mask(trainer.model).kept("heads") == 2
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["mean_token_accuracy"] >= 0 and entry["heads_undecided"] == 6
    masked = logits(trainer.model, "llama")
    small = hf_prune.shrink(trainer.model)
    assert_close(logits(small, "llama"), masked, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bart"])
def test_masks_of_units_are_kept(name, tmp_path, random_mask):
    model = tiny_model(name)
    mask = random_mask(hf_prune.prunable_units(model))
    trainer = train(name, tmp_path, hf_prune.KeepMaskCallback(mask), model, weight_decay=0.1)
    trained = logits(trainer.model, name)
    hf_prune.apply_mask(model, mask)
    assert_close(logits(model, name), trained, atol=1e-5, rtol=1e-5)
    assert_close(logits(hf_prune.shrink(model), name), trained, atol=2e-5, rtol=1e-5)


def test_masks_of_weights_are_kept(tmp_path):
    model = tiny_model("bert")
    name = "bert.encoder.layer.1.output.dense.weight"
    before = model.get_parameter(name).detach().clone()
    keep = torch.rand(before.shape) > 0.5
    train("bert", tmp_path, hf_prune.KeepMaskCallback({name: keep}), model)
    after = model.get_parameter(name)
    assert (after[~keep] == 0).all() and not torch.equal(after[keep], before[keep])


def test_masks_that_do_not_fit(tmp_path, random_mask):
    model = tiny_model("bert")
    for mask, message in (
        ({"bert.encoder.layer.9.weight": torch.ones(1, dtype=torch.bool)}, "Unknown parameter"),
        ({"classifier.weight": torch.ones(3, dtype=torch.bool)}, r"must be a bool tensor of shape \(2, 32\)"),
        ({"classifier.weight": torch.ones(2, 32)}, "must be a bool tensor"),
        (random_mask(hf_prune.prunable_units(tiny_model("llama"))), "This mask is for a llama"),
        (random_mask(hf_prune.prunable_units(model), drop=True), "drops whole layers"),
    ):
        with pytest.raises(MaskError, match=message):
            train("bert", tmp_path, hf_prune.KeepMaskCallback(mask), model)


def sparsities(model):
    layers = [m.weight for m in model.base_model.encoder.modules() if isinstance(m, torch.nn.Linear)]
    return [(weight == 0).float().mean().item() for weight in layers]


def test_sparsity_rises_along_a_cubic_and_stays(tmp_path):
    callback = hf_prune.GradualSparsityCallback(0.75, begin=0.25, end=0.75, every=2)
    assert [callback.sparsity_at(t) for t in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(
        [0, 0, 0.75 * 7 / 8, 0.75, 0.75]
    )
    seen = []

    class Spy(T.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(sparsities(model))

    model = tiny_model("bert")
    embeddings = model.bert.embeddings.word_embeddings.weight.detach().clone()
    batch = tiny_batch("bert", size=16, labels=True)
    data = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    args = T.TrainingArguments(str(tmp_path), max_steps=12, use_cpu=True, save_strategy="no", disable_tqdm=True)
    T.Trainer(model, args, train_dataset=data, callbacks=[callback, Spy()]).train()
    pruned_at = [0, 0, 0, 4, 4, 6, 6, 8, 9, 9, 9, 9]
    for step, found in zip(pruned_at, seen, strict=True):
        assert found == pytest.approx([callback.sparsity_at(step / 12)] * len(found), abs=2e-3)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight == 0, embeddings == 0)


def test_a_sparsity_that_is_not_reached_is_told(tmp_path, caplog):
    class Stop(T.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == args.max_steps - 5

    T.logging.set_verbosity_warning()
    T.logging.enable_propagation()
    for steps, options in ((8, {"every": 1}), (13, {"end": 0.5})):
        model, callback = tiny_model("bert"), hf_prune.GradualSparsityCallback(0.8, **options)
        args = T.TrainingArguments(str(tmp_path), max_steps=steps, use_cpu=True, save_strategy="no", disable_tqdm=True)
        batch = tiny_batch("bert", size=16, labels=True)
        data = [{key: value[i] for key, value in batch.items()} for i in range(16)]
        caplog.clear()
        T.Trainer(model, args, train_dataset=data, callbacks=[callback, Stop()]).train()
        share = sum(sparsities(model)) / len(sparsities(model))
        told = "zeros instead of 80.0%" in caplog.text
        assert told == (share < 0.79) == (steps == 8)
    T.logging.disable_propagation()


def test_gradual_sparsity_resumes(tmp_path):
    def run(folder, resume=None):
        callback = hf_prune.GradualSparsityCallback(0.5, end=1.0, every=1)
        return train("gpt2", folder, callback, save_strategy="steps", save_steps=3, resume=resume).model.state_dict()

    one = run(tmp_path / "a")
    two = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-3"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert (one["transformer.h.0.attn.c_attn.weight"] == 0).float().mean() == 0.5


@pytest.mark.parametrize(
    "options", [{"sparsity": 0}, {"sparsity": 1.0}, {"sparsity": 0.5, "begin": 0.8}, {"sparsity": 0.5, "every": 0}]
)
def test_wrong_schedules(options):
    with pytest.raises(ConfigError, match="must be"):
        hf_prune.GradualSparsityCallback(**options)
