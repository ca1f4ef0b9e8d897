"""Peak memory of the one-shot methods as a multiple of that of plain inference with the same batches.

    python benchmarks/memory.py --task sst2 --model MODEL --train train.tsv.gz --methods kprune fisher kcm

Each measurement is the largest resident set of a process of its own, with everything that is loaded in it. The
examples are sorted by length and taken in batches of 32, as the methods do.
"""

import argparse
import resource
import subprocess
import sys

import pandas
import torch
import transformers
from tasks import TASKS, inputs

import hf_prune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="sst2")
    for name in ("model", "train"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--methods", nargs="+", default=["kprune", "fisher", "kcm", "flap", "magnitude", "layer_drop"])
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=794)
    parser.add_argument("--one", metavar="METHOD", help="measure this one in this process")
    args = parser.parse_args()
    if args.one:
        print(peak(args))
        return
    own = [sys.executable, __file__, *sys.argv[1:], "--one"]
    print("| method | peak MB | of plain inference |\n|---|---|---|")
    plain = 0.0
    for method in ("inference", *args.methods):
        found = subprocess.run([*own, method], capture_output=True, text=True, check=True)
        megabytes = float(found.stdout.split()[-1])
        plain = plain or megabytes
        print(f"| {method} | {megabytes:.0f} | {megabytes / plain:.2f}× |", flush=True)


def peak(args: argparse.Namespace) -> float:
    """Run inference or a method in this process, and return the largest resident set in MB."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    task, tokenizer = TASKS[args.task], transformers.AutoTokenizer.from_pretrained(args.model)
    model = task.auto.from_pretrained(args.model).eval()
    train = task.read(args.train, tokenizer)
    train = [train[i] for i in pandas.Series(range(len(train))).sample(args.samples, random_state=0)]
    calibrator = hf_prune.Calibrator(model, inputs(train), processing_class=tokenizer, labels=True)
    if args.one == "inference":
        with calibrator.evaluating():
            for _, batch in calibrator.batches("inference"):
                calibrator.forward(batch)
    else:
        options = {"method": args.one, "budget": {"macs": args.macs}}
        hf_prune.prune(model, hf_prune.PruningConfig.from_dict(options), calibrator)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
