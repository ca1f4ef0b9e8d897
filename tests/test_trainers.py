"""Pruning inside Trainer: exactly K heads, masked == shrunk == reloaded, exact resume, two processes."""

import copy

import pytest
import torch
import transformers as T
from safetensors.torch import load_file
from tiny import FAMILIES as ALL, SEQ2SEQ, tiny_batch, tiny_model
from tokenizers import Tokenizer, models
from torch.testing import assert_close

import hf_prune
from hf_prune.errors import ConfigError, UnsupportedModelError
from hf_prune.trainers.confidence import head_confidence
from hf_prune.trainers.head_gates import HeadGates, add_head_gates, concentration_weight, top_heads

NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, dropout=0.0)
FAMILIES = {"bert": 12, "llama": 6, "bart": 36, "vit": 12, "gpt2": 12}  # number of heads (KV groups)


def examples(name, size=24):
    batch = tiny_batch(name, size=size, padded=True, labels=True)
    return [{key: value[i] for key, value in batch.items()} for i in range(size)]


def arguments(name, folder, cls=None, **options):
    if cls is None:
        cls = hf_prune.Seq2SeqPassTrainingArguments if name in SEQ2SEQ else hf_prune.PassTrainingArguments
        options = {"num_heads": 3, **options}
    defaults = dict(
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    return cls(str(folder), **{**defaults, **options})


def make_trainer(name, folder, model=None, callbacks=None, **options):
    cls = hf_prune.Seq2SeqPassTrainer if name in SEQ2SEQ else hf_prune.PassTrainer
    args = arguments(name, folder, **options)
    model = model if model is not None else tiny_model(name)
    return cls(model, args, train_dataset=examples(name), eval_dataset=examples(name, 8), callbacks=callbacks)


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def gate_values(trainer):
    values = []

    class Spy(T.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            values.append(HeadGates(model).phi)

    trainer.add_callback(Spy())
    return values


@pytest.mark.parametrize(
    "options", [{}, {"concentrate": True, "train_weights": False}], ids=["pass", "passconc-gates"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_masked_is_shrunk_is_reloaded_with_exactly_so_many_heads(name, options, tmp_path):
    trainer = make_trainer(name, tmp_path, eval_strategy="steps", eval_steps=4, **options)
    model, batch = trainer.model, tiny_batch(name, padded=True)
    dense = {key: value.clone() for key, value in model.state_dict().items() if "hf_prune_gate" not in key}
    early = trainer.pruning_mask()
    values = gate_values(trainer)
    trainer.train()

    mask = trainer.pruning_mask()
    assert early.kept("heads") == mask.kept("heads") == 3 and mask.total("heads") == FAMILIES[name]
    kept = torch.cat([mask[group.name] for group in hf_prune.prunable_units(model).of_kind("heads")])
    assert_close(kept, torch.zeros_like(kept).index_fill(0, values[-1].topk(3).indices, True))
    assert all(not torch.equal(a, b) for a, b in zip(values, values[1:], strict=False))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, dense[key])}
    if options:  # only the columns of closed heads were zeroed
        sites = {g.name for g in hf_prune.prunable_units(model).of_kind("heads")}
        assert all(any(key.endswith(f"{site}.weight") for site in sites) for key in changed)
    else:
        assert len(changed) > len(dense) / 2
    assert all(parameter.requires_grad for key, parameter in model.named_parameters() if "position" not in key)

    trainer.save_model()
    masked = logits(model, batch)
    shrunk = trainer.pruned_model()
    reloaded = type(model).from_pretrained(tmp_path)
    assert_close(logits(shrunk, batch), masked, atol=2e-5, rtol=1e-5)
    assert_close(logits(reloaded, batch), logits(shrunk, batch), atol=0, rtol=0)
    assert not any("hf_prune" in key for key in load_file(tmp_path / "model.safetensors"))
    assert hf_prune.PruningMask.load(tmp_path) == mask

    report = hf_prune.PruningReport.load(tmp_path)
    assert report.method == ("passconc" if options else "pass") and report.config["num_heads"] == 3
    chosen = {"lambda_steps": 1, "gate_learning_rate": 0.5, "reopen": False}  # where the arguments leave it open
    assert chosen.items() <= report.config.items()
    assert report.after["params"] == sum(p.numel() for p in reloaded.parameters()) < report.before["params"]
    assert report.calibration == {"samples": len(trainer.train_dataset)}
    assert report.facts["steps"] == 8 and report.facts["metrics"].keys() == {"before", "after"}
    assert report.facts["metrics"]["after"]["loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    assert report.facts["metrics"]["before"]["loss"] != report.facts["metrics"]["after"]["loss"]


def test_the_report_says_which_dataset_it_was(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in examples("bert")])
    trainer = hf_prune.PruningTrainer(
        tiny_model("bert"), arguments("bert", tmp_path, hf_prune.PruningTrainingArguments), train_dataset=data
    )
    trainer.save_model()
    report = hf_prune.PruningReport.load(tmp_path)
    assert report.calibration == {"samples": len(data), "fingerprint": data._fingerprint}
    assert f"the training data, {len(data)} examples." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["bert", "bart", "gpt2"])
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_any_number_of_heads(name, share, tmp_path):
    heads = max(1, round(share * FAMILIES[name]))
    trainer = make_trainer(name, tmp_path, num_heads=heads, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert trainer.pruning_mask().kept("heads") == heads
    loaded = type(trainer.model).from_pretrained(tmp_path)
    assert sum(group.size for group in hf_prune.prunable_units(loaded).of_kind("heads")) == heads
    batch = tiny_batch(name)
    assert_close(logits(loaded, batch), logits(trainer.model, batch), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("t5")])
def test_exactly_so_many_heads_in_every_family(name):
    model = tiny_model(name)
    gates = add_head_gates(model)
    for heads in range(1, len(gates) + 1):
        gates.set_mask(top_heads(torch.randn(len(gates)), heads))
        mask = hf_prune.current_mask(model)
        assert mask.kept("heads") == heads
        if heads in (1, len(gates) // 2 + 1):
            masked, small = logits(model, tiny_batch(name)), copy.deepcopy(model)
            hf_prune.remove_mask(small)
            hf_prune.shrink(small, mask)
            assert sum(g.size for g in hf_prune.prunable_units(small).of_kind("heads")) == heads
            assert_close(logits(small, tiny_batch(name)), masked, atol=2e-5, rtol=1e-5)


def test_a_long_enough_run_is_saturated(tmp_path):
    model = tiny_model("bert")
    trainer = make_trainer("bert", tmp_path, model, max_steps=120, logging_steps=10, lambda_steps=10)
    values = gate_values(trainer)
    trainer.train()
    assert trainer.callback.saturated
    phi = values[-1]
    assert (phi >= 5).sum() == 3 and (phi <= -5).sum() == 9
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["heads_open"] == 3 and logs[-1]["heads_closed"] == 9 and logs[-1]["heads_undecided"] == 0
    assert logs[-1]["heads_expected"] == pytest.approx(3, abs=0.3)
    ramp = [entry["pass_lambda"] for entry in logs]
    assert ramp == sorted(ramp) and ramp[-1] == ramp[-2] > ramp[0]  # frozen once the constraint is met
    assert all(entry["loss"] < 3 for entry in logs)  # of the task, without the penalty


def test_a_short_run_warns(tmp_path, caplog):
    T.logging.set_verbosity_warning()
    T.logging.enable_propagation()
    trainer = make_trainer("bert", tmp_path)
    trainer.train()
    T.logging.disable_propagation()
    assert "0 gates open, 0 closed and 12 undecided" in caplog.text and not trainer.callback.saturated


def begin(trainer, steps):
    trainer.state.max_steps = steps
    trainer.create_optimizer_and_scheduler(steps)
    trainer.callback.on_train_begin(
        trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=trainer.optimizer
    )
    return trainer.callback


@pytest.mark.parametrize(
    "steps, lambda_steps, expected, rate",
    [
        (600, None, 120, 8 / 120),
        (9999, None, 1000, 8 / 1000),
        (20000, None, 1000, 0.5),
        (200, 30, 30, 8 / 30),
        (50, None, 10, 0.5),
    ],
)
def test_schedule(steps, lambda_steps, expected, rate, tmp_path):
    callback = begin(make_trainer("bert", tmp_path, lambda_steps=lambda_steps), steps)
    assert callback.steps == expected and callback.rate == rate
    assert callback.reopen is (steps >= 10_000)
    first = 2 if callback.reopen else 1
    assert callback.events == {expected * i for i in range(first, 5) if expected * i <= steps / 2}
    given = begin(make_trainer("bert", tmp_path, lambda_steps=lambda_steps, gate_learning_rate=0.3), steps)
    assert given.rate == 0.3


def test_without_reopening_the_concentrator_is_weighed_at_each_step(tmp_path):
    trainer = make_trainer("bert", tmp_path, concentrate=True, lambda_steps=10)
    callback, weights = begin(trainer, 60), {}
    phi = torch.zeros(12).double()
    for step in range(1, 60):
        callback.gates.phi = phi + step / 100
        trainer.state.global_step = step
        callback.on_step_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        weights[step] = callback.conc_weight
    for step, weight in weights.items():
        if 10 <= step <= 30:  # until the middle of the run
            values = (phi + step / 100).float().double()
            assert weight == pytest.approx(concentration_weight(values, callback.gates.module))
        else:
            assert weight == (0 if step < 10 or step >= 50 else weights[30])


def test_reopening_and_concentration_follow_their_rules(tmp_path):
    trainer = make_trainer("bert", tmp_path, concentrate=True, reopen=True, lambda_steps=10)
    callback, state = begin(trainer, 100), trainer.state
    gates = callback.gates
    closed = torch.arange(12) >= 8

    def step_end(step, phi):
        state.global_step = step - 1
        gates.phi = phi
        callback.moments[:] = 1
        callback.on_step_begin(trainer.args, state, trainer.control, model=trainer.model)
        if callback.inputs is not None:
            trainer.model(**tiny_batch("bert"))
        state.global_step = step
        callback.on_step_end(trainer.args, state, trainer.control, model=trainer.model)
        return gates.phi

    phi = torch.where(closed, -7.0, 6.0).double()
    assert_close(step_end(19, phi), phi)  # between events φ runs free
    after = step_end(20, phi)
    assert after.abs().max() == 5
    opened = closed & (after == 5)
    assert opened.any() and (callback.moments[:, opened] == 0).all() and (callback.moments[:, ~opened] == 1).all()
    assert callback.conc_weight > 0
    step_end(21, torch.where(torch.arange(12) >= 3, -7.0, 6.0).double())  # enough are closed
    assert callback.conc_weight == 0
    callback.conc_weight = 1.0
    step_end(49, phi)
    assert callback.conc_weight == 1.0
    step_end(50, phi)
    assert callback.conc_weight == 0  # the window is over


def test_confidence_is_that_of_the_real_queries():
    for name in ("bert", "llama", "bart", "vit"):
        model = tiny_model(name)
        gates = add_head_gates(model)
        batch = tiny_batch(name, padded=True, labels=True)
        confidence = head_confidence(model, gates, [batch])
        assert confidence.max() == 1 and confidence.min() > 0 and len(confidence) == FAMILIES[name]
        assert model.config._attn_implementation == "sdpa"
    model, batch = tiny_model("bert"), tiny_batch("bert", size=1)
    gates = add_head_gates(model)
    longer = {key: torch.nn.functional.pad(value, (0, 5)) for key, value in batch.items()}
    assert_close(head_confidence(model, gates, [longer]), head_confidence(model, gates, [batch]))
    assert_close(
        head_confidence(model, gates, [{**batch, "of_the_trainer": 1}]), head_confidence(model, gates, [batch])
    )
    model.set_attn_implementation("eager")
    first = model(**batch, output_attentions=True).attentions[0]
    expected = first.amax(-1).mean((0, 2)).double()
    found = head_confidence(model, gates, [batch])[:4]
    assert_close(found / found[0], expected / expected[0])


def test_confidence_leaves_out_what_the_decoder_does_not_predict():
    model, batch = tiny_model("bart"), tiny_batch("bart", labels=True)
    gates = add_head_gates(model)
    del batch["decoder_input_ids"]
    longer = {**batch, "labels": torch.nn.functional.pad(batch["labels"], (0, 6), value=-100)}
    assert_close(head_confidence(model, gates, [longer]), head_confidence(model, gates, [batch]))


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


@pytest.mark.parametrize("name", ["vit", "bert", "bart", "llama"])
def test_accumulated_steps_are_those_of_large_batches(name, tmp_path):
    values, losses = [], []
    for size, accumulate in ((4, 1), (2, 2)):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, optim="sgd")
        trainer = make_trainer(name, tmp_path, tiny_model(name, **NO_DROPOUT), max_steps=4, **options)
        # One noise for all of the step makes the gradients comparable.
        trainer.callback._draw = lambda args, state, callback=trainer.callback: None
        values.append(gate_values(trainer))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for one, two in zip(*values, strict=True):
        assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_each_forward_pass_has_noise_of_its_own(tmp_path):
    trainer = make_trainer("bert", tmp_path, max_steps=3, gradient_accumulation_steps=2)
    seen = []
    forward = trainer.training_step

    def spy(*args, **kwargs):
        seen.append(torch.cat([gate.noise for gate in trainer.callback.gates.gates]))
        return forward(*args, **kwargs)

    trainer.training_step = spy
    trainer.train()
    assert len(seen) == 6 == len({tuple(noise.tolist()) for noise in seen})


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


# PruningTrainer by itself


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
