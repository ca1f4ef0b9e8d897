"""What [`test_distributed`] launches in one and in two processes: `launched.py FOLDER`. Results go to files there."""

import copy
import json
import sys
from itertools import product
from pathlib import Path

import searches
import test_supernet
import torch
import trained
import transformers
from test_slicing import no_dropout
from tiny import parameters_as_time, tiny_batch, tiny_model

import hf_prune.latency
import hf_prune.layer_timing
import hf_prune.methods.base
import hf_prune.processes

STATE = hf_prune.processes.process_state()
WHO = f"{STATE.num_processes}-{STATE.process_index}"
# A batch of four examples over all processes, in the order of the data.
TRAINING = {
    "per_device_train_batch_size": 4 // STATE.num_processes,
    "train_sampling_strategy": "sequential",
    "optim": "sgd",
}


def one_shot(out: Path) -> None:
    configs = {
        "kcm": hf_prune.KCMConfig(budget={"macs": 0.85}),
        "magnitude": hf_prune.MagnitudeConfig(budget={"macs": 0.8}),
        "flap": hf_prune.FLAPConfig(budget={"macs": 0.8}),
        "layer_drop": hf_prune.LayerDropConfig(budget={"macs": 0.75}),
        "shallow": hf_prune.MagnitudeConfig(budget={"macs": 0.6}, drop_layers=1, recover="lstsq"),
        "random": hf_prune.RandomConfig(budget={"macs": 0.8}, seed=1),
        "fisher": hf_prune.FisherConfig(budget={"macs": 0.8}),
        "fisher-paper": hf_prune.FisherConfig(budget={"macs": 0.8}, per_sample=True, recover="scale"),
        "kprune": hf_prune.KPruneConfig(budget={"macs": 0.8}, mu=8.0),
        "wanda": hf_prune.WandaConfig(sparsity=0.5, ratios="owl", checkpoint_dir=str(out / "blocks")),
        "sparsegpt": hf_prune.SparseGPTConfig(sparsity=0.5),
        "latency": hf_prune.MagnitudeConfig(budget={"latency": 0.9}),
    }
    hf_prune.layer_timing._clocked = parameters_as_time
    if not STATE.is_main_process:
        hf_prune.methods.base.latency_table = None  # the main process alone measures
    runs = [(*run, None) for run in product(("bert", "llama", "bart"), configs)]
    runs += [("bert", label, transformers.AutoModelForQuestionAnswering) for label in ("fisher", "kprune")]
    for name, label, auto in runs:
        config = copy.deepcopy(configs[label])
        if label == "wanda":
            config.checkpoint_dir += f"-{name}-{STATE.num_processes}"
        labels = "fisher" in label
        # An odd number of batches.
        data = [tiny_batch(name, size=8, padded=True, seed=seed, labels=labels) for seed in range(5)]
        if auto:
            for batch in data:
                batch.pop("labels", None)
                batch |= {"start_positions": torch.arange(8) % 3, "end_positions": torch.arange(8) % 3 + 1}
        model = hf_prune.prunable(tiny_model(name, auto))
        result = model.prune(config, data)
        assert result.report.processes == STATE.num_processes
        if hf_prune.current_mask(model) is not None:
            model.shrink()
        found = (dict(result.mask), model.state_dict(), result.report.calibration)
        torch.save(found, out / f"prune-{name}-{label}-{bool(auto)}-{WHO}")


def gates(out: Path) -> None:
    for name, accumulate in (("bert", 1), ("bert", 2), ("llama", 2), ("bart", 2)):
        options = {"eval_strategy": "steps", "eval_steps": 4} if accumulate == 1 else {}
        trainer = trained.make_trainer(
            name,
            out / "run",
            tiny_model(name, **trained.NO_DROPOUT),
            gradient_accumulation_steps=accumulate,
            concentrate=accumulate > 1,
            reopen=accumulate > 1,
            **options,
            **TRAINING,
        )
        values = trained.gate_values(trainer)
        if name == "bert":
            trainer.evaluate()
        trainer.train()
        assert trainer.args.world_size == STATE.num_processes
        mask = trainer.pruning_mask().to_dict()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append(trainer.evaluate()["eval_loss"])
        torch.save((values, mask, trainer.model.state_dict(), losses), out / f"gates-{name}-{accumulate}-{WHO}")
        trainer.save_model()


def callback(out: Path) -> None:
    """Gates in a plain `Trainer`, which adds up the means of the batches."""
    options = {**TRAINING, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "learning_rate": 1e-6}
    args = trained.arguments("bert", out / "run", transformers.TrainingArguments, **options)
    trainer = transformers.Trainer(
        tiny_model("bert", **trained.NO_DROPOUT),
        args,
        train_dataset=trained.examples("bert"),
        callbacks=[hf_prune.PassCallback(num_heads=3, lambda_base=0.1)],
    )
    values = trained.gate_values(trainer)
    trainer.train()
    mask = hf_prune.current_mask(trainer.model)
    torch.save((values, mask.to_dict(), trainer.model.state_dict(), []), out / f"gates-callback-2-{WHO}")


def supernet(out: Path) -> None:
    runs = (("bert", "full", 1), ("bert", "linear_random", 2), ("llama", "kd", 2), ("bart", "full", 2))
    for name, strategy, accumulate in runs:
        trainer = test_supernet.make_trainer(
            name,
            out / "run",
            no_dropout(tiny_model(name)),
            strategy=strategy,
            learning_rate=1e-3,
            gradient_accumulation_steps=accumulate,
            max_steps=4,
            **TRAINING,
        )
        trainer.evaluate()
        trainer.train()
        assert trainer.args.world_size == STATE.num_processes
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        torch.save((trainer.model.state_dict(), norms), out / f"supernet-{name}-{strategy}-{WHO}")
        trainer.save_model()


def search(out: Path) -> None:
    fronts = [
        searches.search(searches.DATA, metric=metric, num_samples=6, method="nsga2") for metric in ("accuracy", "loss")
    ]
    text = json.dumps([[(point.member, point.error) for point in front.evaluated] for front in fronts])
    (out / f"search-{WHO}").write_text(text)
    # Every process finds the folders written once it goes on.
    folders = fronts[0].save_models(out / f"front-{STATE.num_processes}", searches.MODEL)
    assert all((folder / "model.safetensors").exists() for folder in folders)
    fronts[1].save(out / f"front-{STATE.num_processes}")
    assert list(hf_prune.ParetoFront.load(out / f"front-{STATE.num_processes}")) == list(fronts[1])


if __name__ == "__main__":
    for part in (one_shot, gates, callback, supernet, search):
        part(Path(sys.argv[1]))
