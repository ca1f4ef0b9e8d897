"""Quality and cost of the one-shot methods on a fine-tuned model, and a table of them.

    python benchmarks/one_shot.py --task sst2 --model MODEL --train train.tsv.gz --dev dev.tsv --methods kprune fisher
    python benchmarks/one_shot.py --table benchmarks/results/one_shot.md

MODEL was fine-tuned on the task, for instance by `fine_tune.py`; `METHOD:lstsq` (`scale`, `bias`, `none`) sets how a
method ends, and any other name behind it is an option that is switched on, as in `fisher:per_sample`. Each seed draws
`--samples` training examples for the methods with labels and for those whose papers take thousands, and `--few` for
K-prune (20,000 tokens at the mean length of the dev set, as in its paper). Cost is the CPU time of the pruning on one
thread, as a multiple of that of a plain forward pass over the same examples in batches of 32 in the order drawn,
padded per batch: the mean of one just before and one just after. KL (for regression the squared error) is the mean
divergence from the dense model's predictions on the dev set; the latency ratio is that of the shrunk model of the
first seed at batch 8. MACs are counted at the mean length of the dev set.

Each result is a line of `--results`; what is there is not run again.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import pandas
import torch
import transformers
from tasks import TASKS, batches, gap, inputs, run, up_to

import hf_prune
from hf_prune.benchmark import measure_latency
from hf_prune.layer_walk import Recovery
from hf_prune.methods import get_pruner

DEFAULT = ["random", "magnitude", "magnitude:lstsq", "kcm", "flap", "flap:lstsq", "fisher", "kprune", "layer_drop"]
KEYS = ("task", "method", "macs", "samples", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="sst2")
    for name in ("model", "train", "dev"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--methods", nargs="+", default=DEFAULT, metavar="METHOD[:OPTION]")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.75, 0.6, 0.5, 0.4, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a method without chance takes one")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--few", type=int, default=794)
    parser.add_argument("--longest", type=int, default=512, help="leave out examples of more tokens")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "one_shot.jsonl")
    parser.add_argument("--table", type=Path, help="write the table of the results, and run nothing")
    args = parser.parse_args()
    if args.table:
        args.table.write_text(table(read(args.results)))
    else:
        measure(args)


def read(path: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def measure(args: argparse.Namespace) -> None:
    """Run what is missing in the results."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    task, tokenizer = TASKS[args.task], transformers.AutoTokenizer.from_pretrained(args.model)
    dense = task.auto.from_pretrained(args.model).eval()
    train, dev = (up_to(args.longest, task.read(path, tokenizer)) for path in (args.train, args.dev))
    length = statistics.mean(len(example["input_ids"]) for example in dev)
    outputs = run(dense, dev, tokenizer)
    known = {tuple(row[key] for key in KEYS) for row in read(args.results)}
    args.results.parent.mkdir(exist_ok=True)

    def note(row: dict[str, Any]) -> None:
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    label = {"task": args.task, "metric": task.metric, "dev": len(dev)}
    if (args.task, "dense", 1.0, 0, 0) not in known:
        row = {**label, "longest": args.longest, "score": task.score(outputs, dev)}
        note({**row, "method": "dense", "macs": 1.0, "samples": 0, "seed": 0})
    for method, macs in ((method, macs) for method in args.methods for macs in args.macs):
        name, *chosen = method.split(":")
        options = {"method": name, "budget": {"macs": macs}, "sequence_length": length}
        options |= dict(
            ("recover", option) if option in (*get_args(Recovery), "none") else (option, True) for option in chosen
        )
        for seed in args.seeds:
            config = hf_prune.PruningConfig.from_dict(options)
            if name == "random":
                config.seed = seed
            pruner = get_pruner(name)(config)
            count = min(args.few if name == "kprune" else args.samples, len(train)) if pruner.wants_data else 0
            row = {**label, "method": method, "macs": macs, "samples": count, "seed": seed}
            if tuple(row[key] for key in KEYS) in known:
                continue
            sample = [train[i] for i in pandas.Series(range(len(train))).sample(count, random_state=seed)]
            plain = seconds(dense, sample, tokenizer)
            model, started = copy.deepcopy(dense), time.process_time()
            try:
                hf_prune.prune(model, config, inputs(sample) if count else None, processing_class=tokenizer)
            except hf_prune.InfeasibleBudgetError:
                note({**row, "score": None})
                break
            if count:
                taken = time.process_time() - started
                row["passes"] = 2 * taken / (plain + seconds(dense, sample, tokenizer))
            hf_prune.shrink(model)
            found = run(model, dev, tokenizer)
            row |= {"score": task.score(found, dev), "kl": gap(found, outputs, dev)}
            if seed == args.seeds[0]:
                latency = measure_latency({"dense": dense, "pruned": model}, 8, round(length), repeats=99)
                row["latency"] = latency["pruned"].p50_ms / latency["dense"].p50_ms
            note(row)
            if name != "random" and not count:
                break


def seconds(model: transformers.PreTrainedModel, sample: list[dict[str, Any]], tokenizer: Any) -> float:
    """CPU seconds of a plain forward pass over examples in the order drawn."""
    started = time.process_time()
    with torch.no_grad():
        for batch in batches(sample, tokenizer):
            model(**batch)
    return time.process_time() - started


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown, a section for each task."""
    text = [f"# One-shot methods\n\nBy `{Path(__file__).name}`, which says what the columns are.\n"]
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        dense = next(row for row in own if row["method"] == "dense")
        where = f"on the {dense['dev']} dev examples of up to {dense['longest']} tokens"
        text.append(f"## {task}\n\nDense: {dense['metric']} {dense['score']:.2f} {where}.\n")
        text.append(f"| MACs kept | method | examples | seeds | {dense['metric']} | KL | latency | plain passes |")
        text.append("|---|---|---|---|---|---|---|---|")
        kinds = sorted({(-row["macs"], row["method"], row["samples"]) for row in own if row is not dense})
        sections = [[row for row in own if (-row["macs"], row["method"], row["samples"]) == kind] for kind in kinds]
        for same in sorted(sections, key=lambda same: (-same[0]["macs"], same[0].get("kl", float("inf")))):
            text.append(line(same))
        text.append("")
    return "\n".join(text)


def line(rows: list[dict[str, Any]]) -> str:
    """The row of the table for the seeds of a method."""
    first = rows[0]
    cells = [f"{first['macs']:.2f}", first["method"], str(first["samples"] or "none")]
    if first["score"] is None:
        return "| " + " | ".join([*cells, "", "can't be met", "", "", ""]) + " |"
    scores = [row["score"] for row in rows]
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    cells += [str(len(rows)), f"{statistics.mean(scores):.2f}{spread}"]
    cells += [f"{statistics.mean(row['kl'] for row in rows):.4f}", f"{first['latency']:.2f}×"]
    passes = [row["passes"] for row in rows if "passes" in row]
    return "| " + " | ".join([*cells, f"{statistics.mean(passes):.2f}" if passes else "0"]) + " |"


if __name__ == "__main__":
    main()
