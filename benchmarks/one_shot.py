"""Quality and cost of the one-shot methods on a fine-tuned model, beside plain forward passes over the same examples.

    python benchmarks/one_shot.py --task sst2 --model MODEL --train train.tsv.gz --dev dev.tsv --methods kprune fisher

MODEL was fine-tuned on the task, for instance by `fine_tune.py`; `METHOD:RECOVER` sets how a method ends. Each seed
draws `--samples` training examples for the methods with labels and for those whose papers take thousands, and
`--few` for K-prune (20,000 tokens at the mean length of the dev set, as in its paper). A plain pass takes them in
batches of 32 in the order drawn, padded per batch, on one thread, just before each pruning. KL (for regression the
squared error) is the mean divergence from the dense model's predictions on the dev set; the latency ratio is that of
the shrunk model at batch 8. MACs are counted at the mean length of the dev set.
"""

import argparse
import copy
import statistics
import time

import pandas
import torch
import transformers
from tasks import TASKS, batches, inputs, run

import hf_prune
from hf_prune.benchmark import measure_latency
from hf_prune.methods.auto import mean_divergence

DEFAULT = ["random", "magnitude", "magnitude:lstsq", "kcm", "flap", "flap:lstsq", "fisher", "kprune", "layer_drop"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="sst2")
    for name in ("model", "train", "dev"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--methods", nargs="+", default=DEFAULT, metavar="METHOD[:RECOVER]")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.75, 0.6, 0.5, 0.4, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--few", type=int, default=794)
    args = parser.parse_args()

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    task = TASKS[args.task]
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    dense = task.auto.from_pretrained(args.model).eval()
    train, dev = (task.read(path, tokenizer) for path in (args.train, args.dev))

    print(f"dense: {task.metric} {task.score(run(dense, dev, tokenizer), dev):.2f} on {len(dev)} examples")
    print(f"| method | MACs kept | {task.metric} | KL | latency | seconds | plain passes |")
    print("|---|---|---|---|---|---|---|")
    for method, macs in ((method, macs) for method in args.methods for macs in args.macs):
        name, _, recover = method.partition(":")
        options = {"method": name, "budget": {"macs": macs}, "sequence_length": task.length}
        found: dict[str, list[float]] = {"score": [], "kl": [], "latency": [], "seconds": [], "passes": []}
        for seed in args.seeds:
            config = hf_prune.PruningConfig.from_dict({**options, **({"recover": recover} if recover else {})})
            if name == "random":
                config.seed = seed
            count = min(args.few if name == "kprune" else args.samples, len(train))
            sample = [train[i] for i in pandas.Series(range(len(train))).sample(count, random_state=seed)]
            started = time.perf_counter()
            with torch.no_grad():
                for batch in batches(sample, tokenizer):
                    dense(**batch)
            plain, model = time.perf_counter() - started, copy.deepcopy(dense)
            started = time.perf_counter()
            try:
                hf_prune.prune(model, config, inputs(sample), processing_class=tokenizer)
            except hf_prune.InfeasibleBudgetError:
                break
            found["seconds"].append(time.perf_counter() - started)
            found["passes"].append(found["seconds"][-1] / plain)
            hf_prune.shrink(model)
            found["score"].append(task.score(run(model, dev, tokenizer), dev))
            data = hf_prune.Calibrator(model, inputs(dev), processing_class=tokenizer)
            found["kl"].append(mean_divergence(dense, data))
            latency = measure_latency({"dense": dense, "pruned": model}, 8, round(task.length), repeats=9)
            found["latency"].append(latency["pruned"].p50_ms / latency["dense"].p50_ms)
        if not found["score"]:
            print(f"| {method} | {macs} | can't | | | | |", flush=True)
            continue
        mean = {key: statistics.mean(values) for key, values in found.items()}
        spread = statistics.stdev(found["score"]) if len(found["score"]) > 1 else 0.0
        cells = [method, macs, f"{mean['score']:.2f} ± {spread:.2f}", f"{mean['kl']:.4f}", f"{mean['latency']:.2f}×"]
        print(
            "| " + " | ".join(map(str, [*cells, f"{mean['seconds']:.1f}", f"{mean['passes']:.2f}"])) + " |", flush=True
        )


if __name__ == "__main__":
    main()
