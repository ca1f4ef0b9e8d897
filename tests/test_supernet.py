"""Super-network training: the steps of the strategies, exact in all modes of the Trainer."""

import copy

import pytest
import torch
import transformers as T
from test_slicing import no_dropout
from tiny import SEQ2SEQ, tiny_model
from torch.nn import functional as F
from torch.testing import assert_close
from trained import NO_DROPOUT, arguments, examples

import hf_prune
from hf_prune import ConfigError
from hf_prune.trainers.arguments import STRATEGIES
from hf_prune.trainers.supernet import plan_step


def make_trainer(name, folder, model=None, space=None, data=None, **options):
    seq2seq = name in SEQ2SEQ
    cls = hf_prune.Seq2SeqSuperNetTrainingArguments if seq2seq else hf_prune.SuperNetTrainingArguments
    args = arguments(name, folder, cls, **{"max_steps": 4, **options})
    trainer = hf_prune.Seq2SeqSuperNetTrainer if seq2seq else hf_prune.SuperNetTrainer
    model = model if model is not None else tiny_model(name, **NO_DROPOUT)
    return trainer(
        model, args, space=space, train_dataset=data or examples(name), eval_dataset=(data or examples(name))[:8]
    )


def plans(strategy, steps=40, seed=0, count=2):
    space = hf_prune.SmallSpace(tiny_model("bert"))
    return [plan_step(space, strategy, count, seed, step, steps) for step in range(steps)]


def test_what_the_strategies_train():
    smallest = {"num_layers": 1, "num_heads": 1, "num_units": 1}
    for plan in plans("standard"):
        assert plan.whole and not plan.members and not plan.distilled
    for plan in plans("random"):
        assert not plan.whole and len(plan.members) == 2 and not plan.distilled
    for strategy in ("sandwich", "full"):
        for plan in plans(strategy, count=3):
            assert plan.whole and len(plan.members) == 4 and plan.members[0] == smallest
            assert plan.distilled == (strategy == "full")
    for strategy in ("linear_random", "kd"):
        runs = [plans(strategy, seed=seed) for seed in range(20)]
        for run in runs:
            assert run[0].whole and not run[0].members  # p = 0
            assert not run[-1].whole and len(run[-1].members) == 2  # p = 1
            assert all(plan.whole != bool(plan.members) for plan in run)
            assert all(plan.distilled == (strategy == "kd" and bool(plan.members)) for plan in run)
        late = torch.tensor([[float(bool(plan.members)) for plan in run] for run in runs]).mean(0)
        assert_close(late.view(4, 10).mean(1), torch.tensor([0.12, 0.37, 0.63, 0.88]), atol=0.13, rtol=0)
    members = [tuple(member.values()) for plan in plans("random") for member in plan.members]
    assert len(set(members)) > 60 and plans("random") == plans("random") != plans("random", seed=1)
    assert plans("linear_random", steps=1)[0].whole


def test_the_distillation_of_the_paper():
    student, teacher, label = torch.zeros(1, 3), torch.tensor([[2.0, 0.0, -2.0]]), torch.tensor([0])
    for temperature, kl, published in ((1.0, 1.75616717, 2.19722462), (10.0, 2.41873670, 110.95983887)):
        ours = hf_prune.trainers.distillation_loss(student, teacher, temperature) + F.cross_entropy(student, label)
        soft = (teacher / temperature).softmax(-1)
        entropy = -(soft * soft.log()).sum()
        assert ours == pytest.approx(kl, abs=1e-5)
        assert ours + temperature**2 * entropy == pytest.approx(published, abs=2e-4)
    student, teacher = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    ours = torch.autograd.grad(hf_prune.trainers.distillation_loss(student, teacher, 10.0), student)[0]
    published = torch.autograd.grad(100 * F.cross_entropy(student / 10, (teacher / 10).softmax(-1)), student)[0]
    assert_close(ours, published, atol=1e-6, rtol=1e-5)


def masked_step(model, space, plan, batch, temperature, labels_count):
    """The gradients of one step, by its definition, on masks."""
    model.zero_grad()
    taught = model(**batch).logits.detach()
    if plan.whole:
        model(**batch).loss.backward()
    for member in plan.members:
        hf_prune.apply_mask(model, space.mask(member))
        outputs = model(**batch)
        loss = outputs.loss
        if plan.distilled and taught.shape[-1] == 1:
            loss = F.mse_loss(outputs.logits, taught)
        elif plan.distilled:
            student, teacher = (
                (logits if taught.dim() == 2 else labels_count(logits, batch)) / temperature
                for logits in (outputs.logits, taught)
            )
            loss = loss + temperature**2 * F.cross_entropy(student, teacher.softmax(-1))
        loss.backward()
        hf_prune.remove_mask(model)
    return {name: p.grad for name, p in model.named_parameters()}


def counted(logits, batch):
    """The logits that have a label: of causal language models at the position before."""
    labels = batch["labels"]
    if "decoder_input_ids" not in batch:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != -100]


@pytest.mark.parametrize(
    "strategy, name",
    [(strategy, "bert") for strategy in STRATEGIES]
    + [("full", name) for name in ("regression", "llama", "bart", "vit")],
)
def test_a_step_is_what_the_strategy_says(strategy, name, tmp_path):
    data = examples("bert" if name == "regression" else name, 4)
    model = tiny_model("bert", num_labels=1, **NO_DROPOUT) if name == "regression" else tiny_model(name, **NO_DROPOUT)
    if name == "regression":
        for index, example in enumerate(data):
            example["labels"] = torch.tensor(0.7 * index)
    model = no_dropout(model)
    reference = copy.deepcopy(model)
    trainer = make_trainer(name, tmp_path, model, data=data, strategy=strategy, optim="sgd", max_grad_norm=0.0)
    seen = []

    class Spy(T.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append({key: None if p.grad is None else p.grad.clone() for key, p in model.named_parameters()})
            control.should_training_stop = True

    trainer.add_callback(Spy())
    trainer.state.max_steps = 4
    # The linear strategies: a step that trains sub-networks.
    plan = plan_step(trainer.space, strategy, 2, 42, 0, 4)
    if strategy in ("linear_random", "kd"):
        plan = plan_step(trainer.space, strategy, 2, 42, 3, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_prune.trainers.supernet.plan_step", lambda *_: plan)
        trainer.train()
    batch = {key: torch.stack([example[key] for example in data]) for key in data[0]}
    expected = masked_step(reference, trainer.space, plan, batch, 10.0, counted)
    scale = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for key, gradient in expected.items():
        if gradient is None:
            assert seen[0][key] is None or not seen[0][key].any()
        else:
            mine = seen[0][key] if seen[0][key] is not None else torch.zeros_like(gradient)
            assert_close(mine, gradient, atol=2e-5 * scale, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_accumulated_steps_are_those_of_large_batches(name, tmp_path):
    states = []
    for size, accumulate in ((4, 1), (1, 4)):
        trainer = make_trainer(
            name,
            tmp_path,
            no_dropout(tiny_model(name, **NO_DROPOUT)),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=2,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1e-4,
        )
        if name != "llama":
            # Trainer takes their loss, a mean already, for one that knows num_items_in_batch.
            trainer.loss_is_scaled_for_ga = False
            trainer.model_accepts_loss_kwargs = False
        trainer.train()
        states.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
    for key, value in states[0].items():
        assert_close(value, states[1][key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1},
        {"label_smoothing_factor": 0.1, "optim": "adafactor"},
        {"search_space": "large", "num_subnetworks": 1},
        {"distillation_weight": 0.5},
    ],
    ids=["bf16", "checkpointing", "reentrant", "compile", "smoothing", "large", "fixed-teacher"],
)
def test_options_of_the_trainer(options, tmp_path):
    def run(**options):
        model = tiny_model("bert", num_hidden_layers=1, **NO_DROPOUT)
        trainer = make_trainer("bert", tmp_path, model, **{"max_steps": 2, "optim": "sgd", **options})
        trainer.train()
        assert all(p.isfinite().all() for p in model.parameters())
        return model.state_dict(), trainer.state.log_history

    start = tiny_model("bert", num_hidden_layers=1).state_dict()
    states, logs = run(**options)
    assert all(not torch.equal(states[key], start[key]) for key in start if "query.weight" in key)
    assert all(entry["subnetwork_loss"] > 0 for entry in logs if "loss" in entry) and logs[0]["loss"] < 6
    if "bf16" in options or "activation_checkpointing" in options or "torch_compile" in options:
        plain, _ = run(max_steps=options.get("max_steps", 2))
        atol = 1e-2 if "bf16" in options else 1e-5
        assert all(torch.allclose(states[key], plain[key], atol=atol) for key in states)


@pytest.mark.parametrize("strategy", ["full", "linear_random"])
def test_resuming_is_exact(strategy, tmp_path):
    options = dict(strategy=strategy, save_strategy="steps", save_steps=2, max_steps=5)
    model = dict(hidden_dropout_prob=0.3)
    whole = make_trainer("bert", tmp_path / "a", tiny_model("bert", **model), **options)
    whole.train()
    again = make_trainer("bert", tmp_path / "b", tiny_model("bert", **model), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_the_whole_network_is_saved_and_evaluated(name, tmp_path):
    trainer = make_trainer(name, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    before = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    again = type(trainer.model).from_pretrained(tmp_path)
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert before == trainer.evaluate()["eval_loss"]
    report = hf_prune.PruningReport.load(tmp_path)
    assert report.method == "supernet" and report.before == report.after
    assert report.config["strategy"] == "full" and report.config["num_subnetworks"] == 2
    assert report.facts["space"] == trainer.space.describe()
    part = trainer.subnetwork(trainer.space.middle)
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in again.parameters())


def test_training_makes_small_networks_better(tmp_path):
    losses = {}
    for strategy in ("standard", "sandwich"):
        trainer = make_trainer("bert", tmp_path, strategy=strategy, max_steps=25, learning_rate=5e-3)
        trainer.train()
        batch = trainer.data_collator(trainer.train_dataset)
        with torch.no_grad():
            losses[strategy] = float(trainer.subnetwork(trainer.space.smallest).eval()(**batch).loss)
    assert losses["sandwich"] < 0.7 < losses["standard"]


BAD = {
    "strategy": ({"strategy": "sandwhich"}, "Did you mean 'sandwich'"),
    "space": ({"search_space": "huge"}, "Unknown search space 'huge'"),
    "none": ({"num_subnetworks": 0}, "num_subnetworks must be a whole number of at least 1"),
    "half": ({"num_subnetworks": 1.5}, "num_subnetworks must be a whole number of at least 1"),
    "cold": ({"temperature": 0}, "temperature must be a positive number"),
    "colder": ({"temperature": -1.0}, "temperature must be a positive number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case, tmp_path):
    options, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        make_trainer("bert", tmp_path, **options)


def test_what_can_not_work_is_refused_before_training(tmp_path):
    model = tiny_model("bert")
    other = hf_prune.SmallSpace(tiny_model("bert", intermediate_size=32))
    with pytest.raises(ConfigError, match="of another shape"):
        make_trainer("bert", tmp_path, model, space=other)
    with pytest.raises(ConfigError, match="must be SuperNetTrainingArguments"):
        hf_prune.SuperNetTrainer(model, hf_prune.PruningTrainingArguments(str(tmp_path), use_cpu=True))
    space = hf_prune.SmallSpace(model)
    hf_prune.apply_mask(model, space.mask(space.middle))
    with pytest.raises(ConfigError, match="carries a mask"):
        make_trainer("bert", tmp_path, model)
    several = tiny_model("bert", num_labels=3)
    data = [{**example, "labels": torch.tensor([1.0, 0.0, 1.0])} for example in examples("bert")]
    trainer = make_trainer("bert", tmp_path, several, data=data)
    before = copy.deepcopy(several.state_dict())
    with pytest.raises(ConfigError, match="multi_label_classification with several"):
        trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in several.state_dict().items())


def test_arguments_from_the_command_line():
    parser = T.HfArgumentParser(hf_prune.SuperNetTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", "x", "--strategy", "kd", "--temperature", "4"])
    assert (args.strategy, args.temperature, args.num_subnetworks, args.search_space) == ("kd", 4.0, 2, "small")
