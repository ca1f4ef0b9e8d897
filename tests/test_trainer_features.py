"""What works with `Trainer` works while pruning: resuming, options, optimizers, searches, trackers; bad arguments."""

import pytest
import torch
import transformers as T
from pruned import logits
from tiny import tiny_batch, tiny_model
from tokenizers import Tokenizer, models
from torch.testing import assert_close
from trained import arguments, examples, gate_values, make_trainer

import hf_prune
from hf_prune.errors import ConfigError, UnsupportedModelError
from hf_prune.trainers.head_gates import HeadGates


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_keeps_its_metrics_and_what_was_frozen(restore, tmp_path):
    options = dict(
        train_weights=False, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, max_steps=4
    )
    whole = make_trainer("bert", tmp_path, **options)
    whole.train()
    again = make_trainer("bert", tmp_path / "b", restore_callback_states_from_checkpoint=restore, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.metrics == whole.metrics and again.metrics.keys() == {"before", "after"}
    assert all(parameter.requires_grad for parameter in again.model.parameters())
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    shown = [entry for entry in again.state.log_history if "loss" in entry]
    assert all("pass_lambda" in entry for entry in shown)


def test_runs_that_can_not_go_on(tmp_path):
    make_trainer("bert", tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    for options, folder, message in (
        ({"num_heads": 7}, checkpoint, "made with num_heads=3, now it is 7"),
        ({"train_weights": False}, checkpoint, "made with train_weights=True, now it is False"),
        ({}, str(tmp_path / "nowhere"), "nowhere' is no checkpoint of a run"),
    ):
        trainer = make_trainer("bert", tmp_path / "b", tiny_model("bert", seed=2), **options)
        with pytest.raises(ConfigError, match=message):
            trainer.train(resume_from_checkpoint=folder)
        weight = trainer.model.classifier.weight
        assert torch.equal(weight, tiny_model("bert", seed=2).classifier.weight)


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_resuming_is_exact(name, tmp_path):
    options = dict(save_strategy="steps", save_steps=3, concentrate=True, reopen=True, gradient_accumulation_steps=2)
    whole = make_trainer(name, tmp_path / "a", hf_prune.prunable(tiny_model(name)), **options)
    one = gate_values(whole)
    whole.train()
    again = make_trainer(name, tmp_path / "b", hf_prune.prunable(tiny_model(name)), **options)
    two = gate_values(again)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert len(one) == 8 and len(two) == 5
    for mine, theirs in zip(one[3:], two, strict=True):
        assert torch.equal(mine, theirs)
    assert whole.pruning_mask() == again.pruning_mask()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    assert "pass_lambda" in again.state.log_history[-2]


def test_the_best_checkpoint_is_kept_and_saved(tmp_path):
    best = make_trainer(
        "bert",
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="constant",  # the first checkpoint stays the best
        num_heads=6,
        lambda_steps=100,
        gate_learning_rate=2.0,
    )
    best.compute_metrics = lambda prediction: {"constant": 1.0}
    values = gate_values(best)
    best.train()
    losses = [entry["eval_loss"] for entry in best.state.log_history if "eval_loss" in entry]
    assert best.state.best_global_step == 2 and losses[-1] == pytest.approx(losses[0])
    kept = torch.cat([best.pruning_mask()[g.name] for g in hf_prune.prunable_units(best.model).of_kind("heads")])
    assert kept.nonzero().flatten().tolist() == sorted(values[1].topk(6).indices.tolist())
    assert values[-1].topk(6).indices.tolist() != values[1].topk(6).indices.tolist()


def one_layer():
    return tiny_model("bert", num_hidden_layers=1)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": True},
            "train_weights": False,
        },
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"max_grad_norm": 0.0, "weight_decay": 0.1, "warmup_steps": 2},
        {"label_smoothing_factor": 0.1, "optim": "adafactor"},
    ],
    ids=["bf16", "checkpointing", "reentrant", "reentrant-gates", "compile", "no-clip", "smoothing"],
)
def test_options_of_the_trainer(options, tmp_path):
    plain = make_trainer("bert", tmp_path, one_layer(), train_weights=options.get("train_weights", True), max_steps=3)
    expected = gate_values(plain)
    plain.train()
    trainer = make_trainer("bert", tmp_path, one_layer(), max_steps=3, **options)
    values = gate_values(trainer)
    trainer.train()
    assert trainer.pruning_mask().kept("heads") == 3
    exact = options.keys() <= {"activation_checkpointing", "activation_checkpointing_kwargs", "train_weights"}
    if exact or "torch_compile" in options:
        for one, two in zip(expected, values, strict=True):
            assert_close(one, two, atol=1e-4, rtol=1e-4)
    trainer.save_model()
    reloaded = type(trainer.model).from_pretrained(tmp_path)
    assert {p.dtype for p in reloaded.parameters()} == {torch.float32}


def test_the_gates_neither_decay_nor_count_in_the_clipping(tmp_path):
    norms = []
    for scale in (1.0, 1e6):
        trainer = make_trainer("bert", tmp_path, max_steps=1, weight_decay=10.0)
        phi = trainer.model.get_parameter("bert.encoder.layer.0.attention.output.dense.hf_prune_gate.log_alpha")
        phi.register_hook(lambda gradient, scale=scale: gradient * scale)
        before = phi.detach().clone()
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
        # Adam's first step is the learning rate, whatever the gradient: no decay on top.
        assert_close((phi.detach() - before).abs(), torch.full((4,), 0.5), atol=1e-2, rtol=0)
    assert norms[0] == pytest.approx(norms[1])


def test_bf16_models_have_gates_in_float32(tmp_path):
    trainer = make_trainer("llama", tmp_path, tiny_model("llama").to(torch.bfloat16))
    assert {gate.log_alpha.dtype for gate in HeadGates(trainer.model).gates} == {torch.float32}
    trainer.train()
    trainer.save_model()
    assert {p.dtype for p in trainer.pruned_model().parameters()} == {torch.bfloat16}


def test_gates_are_trained_in_float32_after_an_evaluation_in_bf16(tmp_path):
    trainer = make_trainer("bert", tmp_path, bf16_full_eval=True, max_steps=2)
    trainer.evaluate()
    values = gate_values(trainer)
    trainer.train()
    assert not torch.equal(values[-1], values[-1].bfloat16().double())


def given_optimizer(folder, rate, schedule):
    model = tiny_model("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)  # it does not know the gates
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) if schedule else None
    args = arguments("bert", folder, num_heads=3, gate_learning_rate=0.5)
    return hf_prune.PassTrainer(model, args, train_dataset=examples("bert"), optimizers=(optimizer, scheduler))


@pytest.mark.parametrize("schedule", [None, lambda step: 1.0 if step < 4 else 0.0])
def test_any_optimizer_and_scheduler_of_the_user_will_do(schedule, tmp_path):
    trainer = given_optimizer(tmp_path, 0.3, schedule)  # another rate than that of the arguments
    first = HeadGates(trainer.model).phi
    values = gate_values(trainer)
    trainer.train()
    assert_close((values[0] - first).abs(), torch.full((12,), 0.5).double(), atol=1e-2, rtol=0)
    moved = (values[-1] - values[3]).abs()
    assert moved.min() > 0.05 if schedule is None else moved.max() == 0


def test_gates_need_a_learning_rate_to_follow(tmp_path):
    with pytest.raises(ConfigError, match="whose learning rate is 0.0: it must be positive"):
        given_optimizer(tmp_path, 0.0, None).train()


def test_hyperparameter_search(tmp_path):
    pytest.importorskip("optuna")
    args = arguments("bert", tmp_path, max_steps=2, eval_strategy="steps")
    trainer = hf_prune.PassTrainer(
        None,
        args,
        train_dataset=examples("bert"),
        eval_dataset=examples("bert", 8),
        model_init=lambda: tiny_model("bert"),
    )
    kept = []

    class Spy(T.TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            kept.append(hf_prune.current_mask(model).kept("heads"))

    trainer.add_callback(Spy())
    best = trainer.hyperparameter_search(
        lambda trial: {"num_heads": trial.suggest_int("num_heads", 2, 2 + 2 * trial.number)},
        n_trials=2,
        backend="optuna",
    )
    assert len(kept) == 2 and kept[0] == 2 and best.hyperparameters["num_heads"] in kept


@pytest.mark.parametrize("cls", ["Pruning", "Pass"])
def test_a_search_that_raises_the_weight_of_distillation_finds_a_teacher(cls, tmp_path):
    pytest.importorskip("optuna")
    options = {"num_heads": 3} if cls == "Pass" else {}
    args_class = getattr(hf_prune, f"{cls}TrainingArguments")
    args = arguments("bert", tmp_path, args_class, max_steps=2, eval_strategy="steps", **options)
    data = {"train_dataset": examples("bert"), "eval_dataset": examples("bert", 8)}
    weights, teachers, batch = [0.0, 0.5, 2.0], [], tiny_batch("bert")

    class Spy(T.TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            teachers.append(trainer.teacher_model)

    trainer = getattr(hf_prune, f"{cls}Trainer")(
        None, args, model_init=lambda: tiny_model("bert"), callbacks=[Spy()], **data
    )
    with pytest.raises(ConfigError, match="distillation_weight must be from 0 to 1, got 2.0"):
        trainer.hyperparameter_search(
            lambda trial: {"distillation_weight": weights[trial.number]}, n_trials=3, backend="optuna"
        )
    assert teachers[0] is None
    assert_close(logits(teachers[1], batch), logits(tiny_model("bert"), batch))


def test_collators_callbacks_and_trackers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w1"))
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0")
    data = [{"input_ids": list(range(3, 6 + i % 4)), "labels": i % 2} for i in range(24)]
    args = arguments(
        "bert",
        tmp_path,
        num_heads=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="constant",
        report_to="tensorboard",
        train_sampling_strategy="group_by_length",
    )
    trainer = hf_prune.PassTrainer(
        tiny_model("bert"),
        args,
        data_collator=T.DataCollatorWithPadding(tokenizer),
        train_dataset=data,
        eval_dataset=data[:8],
        compute_metrics=lambda prediction: {"constant": 1.0},
        callbacks=[T.EarlyStoppingCallback(2)],
    )
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.state.best_global_step == 1
    assert trainer.pruning_mask().kept("heads") == 3
    trainer.save_model()
    assert T.AutoTokenizer.from_pretrained(tmp_path).pad_token == "w0"  # the collator's
    (own,) = [path for path in (tmp_path / "runs").iterdir() if path.name != "head_gates"]
    events = accumulator.EventAccumulator(str(own))
    events.Reload()
    wanted = {"train/loss", "train/pass_lambda", "train/heads_expected", "train/dense_loss", "eval/loss"}
    assert wanted <= set(events.Tags()["scalars"])


def test_generation_during_evaluation(tmp_path):
    trainer = make_trainer("bart", tmp_path, predict_with_generate=True, generation_max_length=6, max_steps=2)
    trainer.compute_metrics = lambda prediction: {"longest": (prediction.predictions != 0).sum(1).max()}
    trainer.train()
    assert 1 < trainer.evaluate()["eval_longest"] <= 6


def test_arguments_from_the_command_line():
    parser = T.HfArgumentParser(hf_prune.PassTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", "x", "--num_heads", "7", "--train_weights", "false", "--distillation_weight", "0.5"]
    )
    assert (args.num_heads, args.train_weights, args.distillation_weight) == (7, False, 0.5)
    assert "How many heads to keep" in parser.format_help()
    (args,) = T.HfArgumentParser(hf_prune.Seq2SeqPassTrainingArguments).parse_dict(
        {"output_dir": "x", "num_heads": 2, "predict_with_generate": True}
    )
    assert args.predict_with_generate and args.num_heads == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": None}, "num_heads is missing"),
        ({"num_heads": 0}, "num_heads must be a whole number"),
        ({"num_heads": 2.5}, "num_heads must be a whole number"),
        ({"num_heads": 13}, "num_heads must be from 1 to 12, all heads, got 13"),
        ({"gate_learning_rate": 0}, "gate_learning_rate must be a positive number"),
        ({"lambda_growth": 1.0}, "lambda_growth must be more than 1"),
        ({"lambda_steps": -1}, "lambda_steps must be a whole number"),
        ({"learning_rate": 0.0}, "train_weights=False"),
        ({"distillation_weight": 1.5}, "distillation_weight must be from 0 to 1"),
        ({"distillation_weight": 0.5, "distillation_temperature": 0}, "distillation_temperature must be"),
    ],
)
def test_wrong_options(options, message, tmp_path):
    model = tiny_model("bert")
    with pytest.raises(ConfigError, match=message):
        make_trainer("bert", tmp_path, model, **options)
    assert not any("gate" in name for name, _ in model.named_modules())


def test_what_can_not_work_is_refused_before_training(tmp_path, monkeypatch):
    with pytest.raises(UnsupportedModelError, match="no heads that can be pruned"):
        make_trainer("t5", tmp_path)
    with pytest.raises(ConfigError, match="args must be PassTrainingArguments"):
        hf_prune.PassTrainer(tiny_model("bert"), arguments("bert", tmp_path, hf_prune.PruningTrainingArguments))
    with pytest.raises(ConfigError, match="args must be PruningTrainingArguments"):
        hf_prune.PruningTrainer(tiny_model("bert"), arguments("bert", tmp_path, T.TrainingArguments))
    with pytest.raises(ConfigError, match="args must be Seq2SeqPassTrainingArguments, those of Seq2SeqPassTrainer"):
        hf_prune.Seq2SeqPassTrainer(
            tiny_model("bart"), arguments("bart", tmp_path, hf_prune.PassTrainingArguments, num_heads=3)
        )
    with pytest.raises(ConfigError, match="distillation_weight above 0"):
        hf_prune.PruningTrainer(
            tiny_model("bert"),
            arguments("bert", tmp_path, hf_prune.PruningTrainingArguments),
            teacher_model=tiny_model("bert"),
        )

    model = tiny_model("bert")
    make_trainer("bert", tmp_path, model)
    with pytest.raises(ConfigError, match="has head gates already"):
        make_trainer("bert", tmp_path, model)
    hf_prune.remove_mask(model)
    hf_prune.prune(model, hf_prune.MagnitudeConfig(budget={"macs": 0.8}))
    with pytest.raises(ConfigError, match="carries a mask: shrink it first"):
        make_trainer("bert", tmp_path, model)
    with pytest.raises(ConfigError, match="carries a mask already"):
        gated = tiny_model("bert")
        make_trainer("bert", tmp_path, gated)
        hf_prune.prune(gated, hf_prune.MagnitudeConfig(budget={"macs": 0.8}))

    trainer = make_trainer("bert", tmp_path)
    trainer.train()
    with pytest.raises(ConfigError, match="folded when training ends"):
        trainer.train()
    args = arguments("bert", tmp_path / "plain", T.TrainingArguments, max_steps=2, save_strategy="steps", save_steps=1)
    T.Trainer(tiny_model("bert"), args, train_dataset=examples("bert")).train()
    with pytest.raises(ConfigError, match="was made without PASS"):
        make_trainer("bert", tmp_path).train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))

    args = arguments("bert", tmp_path)
    for flag in ("fsdp", "deepspeed"):
        monkeypatch.setenv(f"ACCELERATE_USE_{flag.upper()}", "true")
        with pytest.raises(ConfigError, match=f"{flag} splits the model"):
            hf_prune.trainers.arguments.check_whole_model(args)
        monkeypatch.delenv(f"ACCELERATE_USE_{flag.upper()}")
        args.deepspeed = "ds.json"
