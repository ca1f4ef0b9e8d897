"""Super-network NAS on SST-2: strategies, spaces, and one-shot pruning at equal parameters.

    python benchmarks/nas.py supernet --model ENCODER --train train.tsv.gz --dev dev.tsv --output OUT \\
        --strategy full --space small
    python benchmarks/nas.py baselines --train train.tsv.gz --dev dev.tsv --output OUT
    python benchmarks/nas.py table --output OUT > benchmarks/results/nas.md

`supernet` starts from a pretrained encoder, trains it on 70 % of the training file, searches at random with sentences
of the other 30 %, and tests the front on the dev file; one call for each strategy and space. `baselines` prunes what
`supernet --strategy standard` has trained, in one shot. Each call writes one file of OUT, and does nothing where it is
there. `table` renders what there is.
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
BATCH = 32
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
    parts = (rows.iloc[order[:border][: BATCH * args.steps]], rows.iloc[order[border:][: args.validation]], dev)
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


def train(args: argparse.Namespace, model: Any, tokenizer: Any, examples: list[Any], space: Any) -> float:
    """Train a super-network; CPU seconds."""
    options = hf_prune.SuperNetTrainingArguments(
        str(args.output),
        strategy=args.strategy,
        search_space=args.space,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        warmup_steps=args.steps // 10,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="group_by_length",
        seed=args.seed,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = hf_prune.SuperNetTrainer(model, options, space=space, train_dataset=examples, processing_class=tokenizer)
    started = time.process_time()
    trainer.train()
    return time.process_time() - started


def supernet(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    examples, validation, dev = splits(args, tokenizer)
    transformers.set_seed(args.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    space = hf_prune.search_space(args.space, model)
    seconds = train(args, model, tokenizer, examples, space)
    if args.strategy == "standard":
        model.save_pretrained(args.output / "plain")
        tokenizer.save_pretrained(args.output / "plain")
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
    front.save(args.output / f"front-{args.strategy}-{args.space}-{args.seed}")
    table = hf_prune.CostTable(model)
    points = []
    for point in front:
        small = hf_prune.subnetwork(model, point.mask)
        points.append(
            {
                "encoder": encoder_share(table, point.costs["params"]),
                "validation": point.error,
                "dev": 1 - accuracy(small, dev, tokenizer),
            }
        )
    return {
        "strategy": args.strategy,
        "space": args.space,
        "train_cpu": seconds,
        "search_cpu": search,
        "whole_dev": 1 - accuracy(model, dev, tokenizer),
        "evaluated": [[p.costs["params"] / front.dense["params"], p.error] for p in front.evaluated],
        "shares": [encoder_share(table, p.costs["params"]) for p in front.evaluated],
        "hypervolume": front.hypervolume(),
        "front": points,
        **settings(args),
    }


def baselines(args: argparse.Namespace) -> dict[str, Any]:
    folder = args.output / "plain"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    examples, _, dev = splits(args, tokenizer)
    data = [{"input_ids": e["input_ids"]} for e in examples[:1024]]
    rows = []
    for share in SHARES:
        for name, config in (("K-prune", hf_prune.KPruneConfig), ("layer drop", hf_prune.LayerDropConfig)):
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
            table = hf_prune.CostTable(model)
            limit = table.rest.params + share * (table.of().params - table.rest.params)
            started = time.process_time()
            result = hf_prune.prune(
                model, config(budget={"params": int(limit)}), data, processing_class=tokenizer, batch_size=64
            )
            seconds = time.process_time() - started
            hf_prune.shrink(model)
            rows.append(
                {
                    "method": name,
                    "share": share,
                    "encoder": encoder_share(table, result.report.after["params"]),
                    "dev": 1 - accuracy(model, dev, tokenizer),
                    "cpu": seconds,
                }
            )
    return {"baselines": rows, **settings(args)}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "seed", "samples", "validation", "learning_rate", "max_length")
    return {name: getattr(args, name) for name in names}


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


def best(run: dict[str, Any], share: float) -> dict[str, float] | None:
    """The point with the lowest validation error among those with at most so much of the encoder."""
    points = [point for point in run["front"] if point["encoder"] <= share + 1e-4]
    return min(points, key=lambda point: point["validation"], default=None)


def cells(run: dict[str, Any]) -> list[str]:
    found = [best(run, share) for share in SHARES]
    return [f"{100 * (1 - point['dev']):.1f} ({point['encoder']:.0%})" if point else "–" for point in found]


def table(args: argparse.Namespace) -> str:
    runs = {tuple(path.stem.split("-")[1:3]): json.loads(path.read_text()) for path in args.output.glob("run-*.json")}
    plain = runs[("standard", "small")]
    lines = [
        f"Accuracy on the dev set in percent. {plain['steps']} steps of 32 sentences of at most {plain['max_length']} "
        f"tokens for all, learning rate {plain['learning_rate']}, seed {plain['seed']}; random search of "
        f"{plain['samples']} sub-networks on {plain['validation']} validation sentences. Columns with a share of the "
        "encoder's parameters: of the front's points with at most that share the one with the lowest validation "
        "error, and in brackets its share. HV: hypervolume with the reference (2, 2), of errors and ratios of all "
        "parameters as they are, and after spreading both by their ranks in all rows of the table as the paper does. "
        "CPU time relative to plain fine-tuning.",
        "",
    ]
    head = [*(f"≤ {share:.0%} of the encoder" for share in SHARES)]

    def rows(title: str, keys: list[tuple[str, str]], name: Any) -> list[str]:
        chosen = [key for key in keys if key in runs]
        volumes = quantile_volumes([runs[key] for key in chosen])
        columns = [title, "HV", "HV by ranks", "whole", *head, "training", "search"]
        out = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
        for key, volume in zip(chosen, volumes, strict=True):
            run = runs[key]
            times = [f"{run[part] / plain['train_cpu']:.2f}×" for part in ("train_cpu", "search_cpu")]
            whole = f"{100 * (1 - run['whole_dev']):.1f}"
            entries = [name(key), f"{run['hypervolume']:.3f}", f"{volume:.3f}", whole, *cells(run), *times]
            out.append(f"| {' | '.join(entries)} |")
        return [*out, ""]

    lines += rows("strategy, in SMALL", [(strategy, "small") for strategy in NAMES], lambda key: NAMES[key[0]])
    lines += rows("space, with `full`", [("full", space) for space in SPACES], lambda key: key[1].upper())
    path = args.output / "baselines.json"
    if path.exists():
        lines += [f"| method | {' | '.join(head)} |", "| --- |" + " ---: |" * len(head)]
        pruned = json.loads(path.read_text())["baselines"]
        for method in dict.fromkeys(row["method"] for row in pruned):
            entries = [f"{100 * (1 - r['dev']):.1f} ({r['encoder']:.0%})" for r in pruned if r["method"] == method]
            lines.append(f"| {method} of the plainly fine-tuned model | {' | '.join(entries)} |")
        for space in SPACES:
            if ("full", space) in runs:
                lines.append(f"| NAS, `full`, {space.upper()} | {' | '.join(cells(runs[('full', space)]))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("supernet", "baselines", "table"))
    parser.add_argument("--output", required=True, type=Path)
    for name in ("model", "train", "dev"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--strategy", choices=NAMES, default="full")
    parser.add_argument("--space", choices=SPACES, default="small")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.part == "table":
        print(table(args))
        return
    name = "baselines" if args.part == "baselines" else f"run-{args.strategy}-{args.space}"
    path = args.output / f"{name}.json"
    if not path.exists():
        found = {"supernet": supernet, "baselines": baselines}[args.part](args)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
