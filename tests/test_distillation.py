"""Fixed masks and teachers in a `PruningTrainer`."""

import copy

import pytest
import torch
import transformers as T
from pruned import logits
from tiny import SEQ2SEQ, tiny_batch, tiny_model
from torch.testing import assert_close
from trained import NO_DROPOUT, arguments, examples

import hf_prune
from hf_prune.errors import ConfigError


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "vit"])
@pytest.mark.parametrize("dropped", [False, True], ids=["units", "layers"])
def test_recovery_keeps_the_mask(name, dropped, tmp_path, random_mask):
    seq2seq = name in SEQ2SEQ
    cls = hf_prune.Seq2SeqPruningTrainingArguments if seq2seq else hf_prune.PruningTrainingArguments
    model = hf_prune.prunable(tiny_model(name))
    mask = random_mask(hf_prune.prunable_units(model), drop=dropped)
    hf_prune.apply_mask(model, mask)
    args = arguments(
        name, tmp_path, cls, eval_strategy="steps", eval_steps=4, distillation_weight=0.5, save_strategy="steps"
    )
    trainer = (hf_prune.Seq2SeqPruningTrainer if seq2seq else hf_prune.PruningTrainer)(
        model, args, train_dataset=examples(name), eval_dataset=examples(name, 8)
    )
    dense = logits(tiny_model(name), tiny_batch(name))
    assert_close(logits(trainer.teacher_model, tiny_batch(name)), dense)
    trainer.train()
    assert trainer.pruning_mask() == mask
    trainer.save_model()
    loaded = type(model).from_pretrained(tmp_path)
    batch = tiny_batch(name, padded=True)
    assert_close(logits(loaded, batch), logits(model, batch), atol=2e-5, rtol=1e-5)
    quality = hf_prune.PruningReport.load(tmp_path).facts["metrics"]
    plain = T.Trainer(
        tiny_model(name), T.TrainingArguments(str(tmp_path), use_cpu=True), eval_dataset=examples(name, 8)
    )
    assert quality["before"]["loss"] == pytest.approx(plain.evaluate()["eval_loss"])
    assert quality["after"]["loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


def test_a_run_that_goes_on_has_the_mask_of_its_checkpoint(tmp_path, random_mask):
    def run(folder, mask, resume=None):
        model = tiny_model("bert")
        if mask is not None:
            hf_prune.apply_mask(model, mask)
        args = arguments("bert", folder, hf_prune.PruningTrainingArguments, save_strategy="steps", save_steps=4)
        trainer = hf_prune.PruningTrainer(model, args, train_dataset=examples("bert"))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    masks = [random_mask(hf_prune.prunable_units(tiny_model("bert")), seed=seed) for seed in (0, 1)]
    whole, checkpoint = run(tmp_path / "a", masks[0]), str(tmp_path / "a" / "checkpoint-4")
    for mask in (None, masks[0]):
        again = run(tmp_path / "b", mask, checkpoint)
        assert again.pruning_mask() == masks[0]
        assert_close(logits(again.model, tiny_batch("bert")), logits(whole.model, tiny_batch("bert")), atol=0, rtol=0)
    with pytest.raises(ConfigError, match="carries another mask than the one of"):
        run(tmp_path / "b", masks[1], checkpoint)


def test_a_teacher_has_weights_of_its_own(tmp_path):
    model = tiny_model("bert")
    part, head = copy.deepcopy(model), model.classifier
    part.classifier = head
    args = arguments("bert", tmp_path, hf_prune.PruningTrainingArguments, distillation_weight=0.5)
    for teacher in (model, part):
        with pytest.raises(ConfigError, match="teacher_model shares weights with the model"):
            hf_prune.PruningTrainer(model, args, train_dataset=examples("bert"), teacher_model=teacher)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_distillation_brings_the_student_to_its_teacher(tmp_path):
    def distance(model):
        return (logits(model, batch).softmax(-1) - logits(teacher, batch).softmax(-1)).abs().mean().item()

    teacher, batch = tiny_model("bert", seed=5), tiny_batch("bert", size=24, padded=True)
    student = tiny_model("bert")
    before = distance(student)
    args = arguments(
        "bert", tmp_path, hf_prune.PruningTrainingArguments, distillation_weight=1.0, max_steps=60, learning_rate=1e-3
    )
    trainer = hf_prune.PruningTrainer(student, args, train_dataset=examples("bert"), teacher_model=teacher)
    trainer.train()
    assert distance(student) < 0.7 * before
    assert all(
        torch.equal(a, b) for a, b in zip(teacher.parameters(), tiny_model("bert", seed=5).parameters(), strict=True)
    )


@pytest.mark.parametrize("method", ["pass", "gradual", "keep"])
def test_every_method_can_distil(method, tmp_path):
    cls = hf_prune.PassTrainer if method == "pass" else hf_prune.PruningTrainer
    model, options = tiny_model("bert"), {"num_heads": 3} if method == "pass" else {}
    callbacks = [hf_prune.GradualSparsityCallback(0.5, end=0.5)] if method == "gradual" else []
    if method == "keep":
        mask = hf_prune.prune(model, hf_prune.WeightMagnitudeConfig(sparsity=0.5)).mask
        callbacks = [hf_prune.KeepMaskCallback(mask)]
    args_class = hf_prune.PassTrainingArguments if method == "pass" else hf_prune.PruningTrainingArguments
    args = arguments("bert", tmp_path, args_class, distillation_weight=1.0, **options)
    teacher = tiny_model("bert", seed=5)
    trainer = cls(model, args, train_dataset=examples("bert"), teacher_model=teacher, callbacks=callbacks)
    student, batch = copy.deepcopy(model).eval(), {k: v[None] for k, v in examples("bert")[0].items()}
    trainer.train()
    distance = hf_prune.trainers.distillation_loss
    assert distance(logits(model, batch), logits(teacher, batch)) != distance(
        logits(student, batch), logits(teacher, batch)
    )
    trainer.save_model()
    loaded = type(model).from_pretrained(tmp_path)
    if method != "pass":  # what is zero stays zero on the disk
        weight = loaded.get_parameter("bert.encoder.layer.0.output.dense.weight")
        assert (weight == 0).float().mean() == pytest.approx(0.5, abs=1e-3)
    assert hf_prune.PruningReport.load(tmp_path).config["distillation_weight"] == 1.0


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_distillation_accumulates_as_large_batches_do(name, tmp_path):
    states = []
    for size, accumulate in ((4, 1), (1, 4)):
        args = arguments(
            name,
            tmp_path,
            hf_prune.PruningTrainingArguments,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            distillation_weight=1.0,
            max_steps=2,
            optim="sgd",
            max_grad_norm=0.0,
        )
        model = tiny_model(name, **NO_DROPOUT)
        trainer = hf_prune.PruningTrainer(
            model, args, train_dataset=examples(name), teacher_model=tiny_model(name, seed=3)
        )
        trainer.train()
        states.append({key: value.clone() for key, value in model.state_dict().items()})
    for key, value in states[0].items():
        assert_close(value, states[1][key], atol=1e-5, rtol=1e-4)


def test_distillation_loss():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = (logits / 2 for logits in (teacher, student))
    expected = 4 * (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    loss = hf_prune.trainers.distillation_loss
    assert_close(loss(student, teacher, 2.0), expected.mean())
    keep = torch.tensor([[True, False, True], [False, False, True]])
    assert_close(loss(student, teacher, 2.0, keep), expected[keep].mean())
    assert_close(loss(student, teacher, 2.0, keep, 6), expected[keep].sum() / 6)
    assert loss(teacher, teacher).abs() < 1e-6
    assert_close(loss(torch.tensor([[1.0]]), torch.tensor([[3.0]])), torch.tensor(4.0))
    with pytest.raises(ConfigError, match="must predict the same classes"):
        loss(student, teacher[..., :4])
