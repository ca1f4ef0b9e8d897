"""Perplexity and time of the methods that zero single weights, on a decoder language model.

    python benchmarks/weights.py --model MODEL --train wiki.train.tokens.gz --valid wiki.valid.tokens.gz \\
        --methods wanda:0.5 wanda:2:4 sparsegpt:0.5 wanda:0.6:owl --results weights.json

A method is NAME:SPARSITY or NAME:N:M, with `:owl` behind it for OWL's ratios, `:paper` for SparseGPT's threshold,
`:per_output` for RIA within each output, and any option that is a number, such as `ria:0.5:alpha=1`. Calibration: 16
windows of 512 tokens, the first of the characters 200,000 to 500,000 of the training text. Perplexity: 4 windows of
1,024 tokens, the first of the first 60,000 characters of the validation text. With `--recover N`, LoRA (r = 8, all
pruned projections) then trains N steps on one window each, behind the calibration windows, and merges; every zero is
checked. Each result is added to the file at once, and what it holds is not run again. `--copies N` only tells how
exact the figures are: N copies of the model are pruned, the first as it is, the others with each weight off by a
relative 1e-6 at random; the table has their mean and standard deviation. `--time` sets CPU seconds of the pruning
against plain passes: the calibration windows through embeddings and blocks, without the head, timed just before and
just after. `--table` only prints what the file holds.
"""

import argparse
import copy
import gzip
import json
import pathlib
import resource
import statistics
import tempfile
import time
from typing import Any

import torch
import transformers

import hf_prune
from hf_prune.metrics import perplexity


def read(path: str) -> str:
    data = pathlib.Path(path).read_bytes()
    return (gzip.decompress(data) if path.endswith(".gz") else data).decode()


def parts(method: str) -> tuple[str, list[str], list[str]]:
    """The name of a method, how much it prunes, and its other options."""
    name, *options = method.split(":")
    much = [option for option in options if option.replace(".", "").isdigit()]
    return name, much, options[len(much) :]


_FLAGS: dict[str, dict[str, object]] = {
    "owl": {"ratios": "owl"},
    "paper": {"threshold": "paper"},
    "per_output": {"per_output": True},
}


def config(method: str) -> hf_prune.MethodConfig:
    name, much, options = parts(method)
    values: dict[str, object] = {"pattern": ":".join(much)} if len(much) == 2 else {"sparsity": float(much[0])}
    for option in options:
        key, _, number = option.partition("=")
        values |= _FLAGS.get(key) or {key: float(number)}
    return hf_prune.MethodConfig.from_dict({"method": name, **values})


def table(results: dict[str, dict[str, Any]]) -> str:
    """Methods as rows, how much was pruned as columns: perplexity, and behind an arrow that after recovery."""
    cells: dict[str, dict[str, str]] = {}
    for method, found in results.items():
        name, much, options = parts(method)
        recovered = f" → {found['recovered']:.2f}" if "recovered" in found else ""
        row = cells.setdefault(" + ".join([name, *options]), {})
        if len(copies := found.get("copies", [])) > 1:
            row[":".join(much)] = f"{statistics.mean(copies):.2f} ± {statistics.stdev(copies):.2f}"
        else:
            row[":".join(much)] = f"{found['perplexity']:.2f}{recovered}"
    amounts = sorted({amount for row in cells.values() for amount in row if amount})
    lines = [["", *amounts], ["---"] * (len(amounts) + 1)]
    lines += [[name, *(row.get(amount, "") for amount in amounts)] for name, row in cells.items() if name != "dense"]
    dense = f"Dense: {results['dense']['perplexity']:.2f}.\n\n" if "dense" in results else ""
    return dense + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shaken(model: transformers.PreTrainedModel, seed: int) -> transformers.PreTrainedModel:
    """A copy whose weights are off by a relative 1e-6 at random; seed 0 leaves them."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters() if seed else ():
            weight *= 1 + 1e-6 * torch.randn(weight.shape, generator=generator)
    return model


def recover(
    model: transformers.PreTrainedModel, mask: hf_prune.WeightMask, windows: torch.Tensor, learning_rate: float
) -> None:
    rows = [{"input_ids": row, "labels": row} for row in windows]
    with tempfile.TemporaryDirectory() as scratch:
        args = transformers.TrainingArguments(
            scratch,
            learning_rate=learning_rate,
            per_device_train_batch_size=1,
            num_train_epochs=1,
            warmup_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=model.device.type == "cpu",
            disable_tqdm=True,
        )
        hf_prune.recover_with_lora(model, mask, rows, args=args)
    mask.check(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--methods", nargs="+", default=["wanda:0.5"], metavar="METHOD")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("weights.json"))
    parser.add_argument("--recover", type=int, default=0, metavar="STEPS")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--copies", type=int, default=0)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=1)
    args = parser.parse_args()

    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    if args.table:
        print(table(results))
        return

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    dense = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    ids = torch.tensor(tokenizer(read(args.train)[200_000 : 500_000 + 2_500 * args.recover])["input_ids"])
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)
    data = [{"input_ids": row} for row in windows[:16]]
    valid = [read(args.valid)[:60_000]]

    def quality(model: transformers.PreTrainedModel) -> float:
        return perplexity(model, tokenizer, valid, window=1024, max_tokens=4096)

    def plain_pass() -> float:
        started = time.process_time()
        with torch.no_grad():
            for batch in windows[:16].split(args.batch_size):
                dense.base_model(batch, use_cache=False)
        return time.process_time() - started

    def note(method: str, **found: Any) -> None:
        results.setdefault(method, {}).update(found)
        args.results.write_text(json.dumps(results, indent=1) + "\n")
        print(method, found, flush=True)

    if "dense" not in results:
        note("dense", perplexity=quality(dense))
    for method in args.methods:
        known = results.get(method, {})
        if args.copies:
            for seed in range(len(known.get("copies", [])), args.copies):
                model = shaken(dense, seed)
                hf_prune.prune(model, config(method), data, batch_size=args.batch_size)
                note(method, copies=[*results.get(method, {}).get("copies", []), quality(model)])
            continue
        wanted = {"perplexity", *(["passes"] if args.time else []), *(["recovered"] if args.recover else [])}
        if wanted <= set(known):
            continue
        plain = [plain_pass()] if args.time else []
        model = copy.deepcopy(dense)
        peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        result = hf_prune.prune(model, config(method), data, batch_size=args.batch_size)
        seconds = time.process_time() - started
        if args.time:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
            plain.append(plain_pass())
            note(method, seconds=seconds, passes=2 * seconds / sum(plain), megabytes=grown / 1e3)
        if "perplexity" not in known:
            note(method, zeros=result.report.sparsity(), perplexity=quality(model))
        if args.recover:
            recover(model, result.mask, windows[16 : 16 + args.recover], args.learning_rate)
            note(method, recovered=quality(model), steps=args.recover)


if __name__ == "__main__":
    main()
