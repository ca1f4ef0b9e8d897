"""PASS in its Trainer: exactly K heads, masked == shrunk == reloaded, schedules, confidence, accumulated steps."""

import copy

import pytest
import torch
import transformers as T
from pruned import logits
from safetensors.torch import load_file
from tiny import FAMILIES as ALL, tiny_batch, tiny_model
from torch.testing import assert_close
from trained import FAMILIES, NO_DROPOUT, arguments, examples, gate_values, make_trainer

import hf_prune
from hf_prune.trainers.confidence import head_confidence
from hf_prune.trainers.head_gates import add_head_gates, concentration_weight, top_heads


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
