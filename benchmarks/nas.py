"""Super-network NAS on SST-2: strategies, spaces, and other pruning at equal parameters.

    python benchmarks/nas.py supernet --model MODEL --train train.tsv.gz --dev dev.tsv --output OUT \\
        --strategy full --space small
    python benchmarks/nas.py baselines --model MODEL --train train.tsv.gz --dev dev.tsv --output OUT
    python benchmarks/nas.py table --output OUT > benchmarks/results/nas.md

`supernet` trains MODEL, which was fine-tuned on the task before, as a super-network on 70 % of the training file,
searches at random with sentences of the other 30 %, and tests what it finds within budgets on the dev file; one call
for each strategy and space. `baselines` prunes MODEL in one shot, and trains it with PASS for as many steps. Each call
writes one file of OUT, and does nothing where it is there. `table` renders what there is.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
import transformers

import hf_prune
from hf_prune.search.front import hypervolume

SPACES = ("small", "layer", "medium", "large")
SHARES = (0.75, 0.5, 0.25)  # of the encoder's parameters
NAMES = {
    "standard": "standard: CE(whole)",
    "random": "random",
    "linear_random": "linear random",
    "sandwich": "sandwich",
    "kd": "in-place distillation",
    "full": "full",
}


def splits(args: argparse.Namespace, tokenizer: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """What is used of 70 % of the training file and of the other 30 %, and the dev file, tokenised."""
    rows, dev = (pandas.read_csv(path, sep="\t", quoting=3).dropna() for path in (args.train, args.dev))
    order = np.random.default_rng(128).permutation(len(rows))  # the split has a seed of its own
    border = int(0.7 * len(rows))
    parts = (
        rows.iloc[order[:border][: args.batch_size * args.steps]],
        rows.iloc[order[border:][: args.validation]],
        dev,
    )
    examples = []
    for part in parts:
        ids = tokenizer(part.sentence.tolist(), truncation=True, max_length=args.max_length).input_ids
        pairs = zip(ids, part.label.tolist(), strict=True)
        examples.append([{"input_ids": tokens, "labels": label} for tokens, label in pairs])
    return examples[0], examples[1], examples[2]


def encoder_share(table: hf_prune.CostTable, parameters: float) -> float:
    """Of the encoder's parameters, what a model with so many in all has."""
    return (parameters - table.rest.params) / (table.of().params - table.rest.params)


def accuracy(model: Any, examples: list[Any], tokenizer: Any) -> float:
    hits = 0
    examples = sorted(examples, key=lambda e: len(e["input_ids"]))
    for start in range(0, len(examples), 64):
        batch = tokenizer.pad(examples[start : start + 64], return_tensors="pt")
        labels = batch.pop("labels")
        with torch.inference_mode():
            hits += int((model.eval()(**batch).logits.argmax(-1) == labels).sum())
    return hits / len(examples)


def training_options(args: argparse.Namespace) -> dict[str, Any]:
    """What all trainings have in common."""
    return {
        "output_dir": str(args.output),
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "warmup_steps": args.steps // 10,
        "per_device_train_batch_size": args.batch_size,
        "train_sampling_strategy": "group_by_length",
        "seed": args.seed,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def supernet(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    examples, validation, dev = splits(args, tokenizer)
    transformers.set_seed(args.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model)
    if args.order:
        data = examples[: args.calibration]
        hf_prune.order_units(model, hf_prune.FisherConfig(budget={"macs": 1.0}), data, processing_class=tokenizer)
    space = hf_prune.search_space(args.space, model)
    options = hf_prune.SuperNetTrainingArguments(**training_options(args), strategy=args.strategy)
    trainer = hf_prune.SuperNetTrainer(model, options, space=space, train_dataset=examples, processing_class=tokenizer)
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    started = time.process_time()
    front = hf_prune.search_subnetworks(
        model,
        space,
        validation,
        method="random",
        num_samples=args.samples,
        seed=args.seed,
        processing_class=tokenizer,
        batch_size=64,
    )
    search = time.process_time() - started
    front.save(args.output / f"front-{name_of(args)}")
    table = hf_prune.CostTable(model)
    points = [
        {"encoder": encoder_share(table, p.costs["params"]), "validation": p.error, "index": i}
        for i, p in enumerate(front)
    ]
    for share in SHARES:
        point = best(points, share)
        if point is not None and "dev" not in point:
            small = hf_prune.subnetwork(model, front[point["index"]].mask)
            point["dev"] = 1 - accuracy(small, dev, tokenizer)
    return {
        "train_cpu": seconds,
        "search_cpu": search,
        "whole_dev": 1 - accuracy(model, dev, tokenizer),
        "evaluated": [[p.costs["params"] / front.dense["params"], p.error] for p in front.evaluated],
        "hypervolume": front.hypervolume(),
        "front": points,
        **settings(args),
    }


def baselines(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    examples, _, dev = splits(args, tokenizer)
    data = [{"input_ids": e["input_ids"]} for e in examples[: args.calibration]]
    rows = []

    def add(method: str, model: Any, seconds: float) -> None:
        share = encoder_share(table, model.num_parameters())
        rows.append({"method": method, "encoder": share, "dev": 1 - accuracy(model, dev, tokenizer), "cpu": seconds})

    for share in SHARES:
        for name, config in (("K-prune", hf_prune.KPruneConfig), ("layer drop", hf_prune.LayerDropConfig)):
            model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model)
            table = hf_prune.CostTable(model)
            limit = table.rest.params + share * (table.of().params - table.rest.params)
            started = time.process_time()
            budget = config(budget={"params": int(limit)})
            hf_prune.prune(model, budget, data, processing_class=tokenizer, batch_size=64)
            add(name, hf_prune.shrink(model), time.process_time() - started)

    transformers.set_seed(args.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model)
    whole = accuracy(model, dev, tokenizer)
    groups = table.units.of_kind("heads")
    bare = hf_prune.PruningMask({g.name: torch.zeros(g.size, dtype=torch.bool) for g in groups}, table.units)
    least = encoder_share(table, table.of(bare).params)
    heads = int(sum(g.size for g in groups) * (SHARES[0] - least) / (1 - least))
    trainer = hf_prune.PassTrainer(
        model,
        hf_prune.PassTrainingArguments(**training_options(args), num_heads=heads),
        train_dataset=examples,
        processing_class=tokenizer,
    )
    started = time.process_time()
    trainer.train()
    add(f"PASS, {heads} heads left", trainer.pruned_model(), time.process_time() - started)
    return {"baselines": rows, "whole": whole, **settings(args)}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "batch_size", "seed", "samples", "validation", "learning_rate", "max_length")
    return {"model": Path(args.model).name} | {name: getattr(args, name) for name in names}


def name_of(args: argparse.Namespace) -> str:
    return f"{args.strategy}-{args.space}{'-ordered' if args.order else ''}"


# The table


def quantile_volumes(runs: Sequence[dict[str, Any]]) -> list[float]:
    """Hypervolumes as in the paper: both objectives spread over [0, 1] by their ranks in all of the runs."""
    observed = np.concatenate([np.array(run["evaluated"]) for run in runs])
    grids = [np.sort(observed[:, column]) for column in (0, 1)]

    def rank(grid: np.ndarray, values: np.ndarray) -> np.ndarray:
        middle = np.searchsorted(grid, values, "left") + np.searchsorted(grid, values, "right") - 1
        return middle / 2 / (len(grid) - 1)

    volumes = []
    for run in runs:
        points = np.array(run["evaluated"])
        volumes.append(hypervolume(list(zip(*(rank(grids[c], points[:, c]) for c in (0, 1)), strict=True))))
    return volumes


def best(points: list[dict[str, float]], share: float) -> dict[str, float] | None:
    """The point with the lowest validation error among those with at most so much of the encoder."""
    within = [point for point in points if point["encoder"] <= share + 1e-4]
    return min(within, key=lambda point: point["validation"], default=None)


def cell(points: list[dict[str, float]], share: float) -> str:
    point = best(points, share)
    return f"{100 * (1 - point['dev']):.1f} ({point['encoder']:.0%})" if point else "–"


def table(args: argparse.Namespace) -> str:
    runs = {path.stem.removeprefix("run-"): json.loads(path.read_text()) for path in args.output.glob("run-*.json")}
    plain = runs["standard-small"]
    lines = [
        f"Accuracy on the dev set in percent. {plain['steps']} steps of {plain['batch_size']} sentences of at most "
        f"{plain['max_length']} tokens for all, learning rate {plain['learning_rate']}, seed {plain['seed']}; random "
        f"search of {plain['samples']} sub-networks on {plain['validation']} validation sentences. Columns with a "
        "share of the encoder's parameters: of the front's points with at most that share the one with the lowest "
        "validation error, and in brackets its share. HV: hypervolume with the reference (2, 2), of validation errors "
        "and ratios of all parameters as they are, and after spreading both by their ranks in all rows of the table "
        "as the paper does. CPU time relative to plain fine-tuning, the training of `standard`.",
        "",
    ]
    head = [*(f"≤ {share:.0%} of the encoder" for share in SHARES)]

    def rows(title: str, names: dict[str, str]) -> list[str]:
        chosen = [key for key in names if key in runs]
        if len(chosen) < 2:  # nothing to compare
            return []
        volumes = quantile_volumes([runs[key] for key in chosen])
        columns = [title, "HV", "HV by ranks", "whole", *head, "training", "search"]
        out = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
        for key, volume in zip(chosen, volumes, strict=True):
            run = runs[key]
            times = [f"{run[part] / plain['train_cpu']:.2f}×" for part in ("train_cpu", "search_cpu")]
            whole = f"{100 * (1 - run['whole_dev']):.1f}"
            found = [cell(run["front"], share) for share in SHARES]
            entries = [names[key], f"{run['hypervolume']:.3f}", f"{volume:.3f}", whole, *found, *times]
            out.append(f"| {' | '.join(entries)} |")
        return [*out, ""]

    ordered = {"full-small-ordered": "full, units in the order of their Fisher information"}
    lines += rows("strategy, in SMALL", {f"{key}-small": name for key, name in NAMES.items()} | ordered)
    lines += rows("space, with `full`", {f"full-{space}": space.upper() for space in SPACES})
    path = args.output / "baselines.json"
    if path.exists():
        lines += [f"| method | {' | '.join(head)} |", "| --- |" + " ---: |" * len(head)]
        baseline = json.loads(path.read_text())
        pruned = baseline["baselines"]
        lines[0] += f" MODEL itself has {100 * baseline['whole']:.1f}."
        for method in dict.fromkeys(row["method"] for row in pruned):
            found = {}
            for row in pruned:  # each under the least share that it meets
                if row["method"] == method:
                    share = min(share for share in SHARES if row["encoder"] <= share + 1e-4)
                    found[share] = f"{100 * (1 - row['dev']):.1f} ({row['encoder']:.0%})"
            lines.append(f"| {method} | {' | '.join(found.get(share, '–') for share in SHARES)} |")
        for space in SPACES:
            if f"full-{space}" in runs:
                found = [cell(runs[f"full-{space}"]["front"], share) for share in SHARES]
                lines.append(f"| NAS, `full`, {space.upper()} | {' | '.join(found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("supernet", "baselines", "table"))
    parser.add_argument("--output", required=True, type=Path)
    for name in ("model", "train", "dev"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--strategy", choices=NAMES, default="full")
    parser.add_argument("--space", choices=SPACES, default="small")
    parser.add_argument("--order", action="store_true", help="sort heads and neurons by Fisher information before")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--validation", type=int, default=400, help="sentences for the search")
    parser.add_argument("--calibration", type=int, default=512, help="sentences for one-shot pruning and --order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.part == "table":
        print(table(args))
        return
    name = "baselines" if args.part == "baselines" else f"run-{name_of(args)}"
    path = args.output / f"{name}.json"
    if not path.exists():
        found = {"supernet": supernet, "baselines": baselines}[args.part](args)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
