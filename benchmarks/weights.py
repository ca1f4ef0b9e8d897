"""Perplexity and time of the methods that zero single weights, on a decoder language model.

    python benchmarks/weights.py --model MODEL --train wiki.train.tokens.gz --valid wiki.valid.tokens.gz \\
        --methods wanda:0.5 wanda:2:4 sparsegpt:0.5 wanda:0.6:owl

A method is NAME:SPARSITY or NAME:N:M, with `:owl` behind it for OWL's ratios, or `:paper` for SparseGPT's threshold.
Calibration: 16 windows of 512 tokens, the first of the characters 200,000 to 500,000 of the training text.
Perplexity: 4 windows of 1,024 tokens, the first of the validation text. A plain pass runs the calibration windows
through embeddings and blocks, without the head, timed just before each pruning; all in CPU seconds on one thread.
"""

import argparse
import copy
import gzip
import pathlib
import time

import torch
import transformers

import hf_prune
from hf_prune.metrics import perplexity


def read(path: str) -> str:
    data = pathlib.Path(path).read_bytes()
    return (gzip.decompress(data) if path.endswith(".gz") else data).decode()


def config(method: str) -> hf_prune.MethodConfig:
    name, *options = method.split(":")
    extra = {"owl": {"ratios": "owl"}, "paper": {"threshold": "paper"}}.get(options[-1], {})
    options = options[: len(options) - len(extra)]
    much = {"pattern": ":".join(options)} if len(options) == 2 else {"sparsity": float(options[0])}
    return hf_prune.MethodConfig.from_dict({"method": name, **much, **extra})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--methods", nargs="+", default=["wanda:0.5"], metavar="METHOD")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    dense = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()

    def windows(text: str, count: int, length: int) -> torch.Tensor:
        return torch.tensor(tokenizer(text)["input_ids"][: count * length]).view(count, length)

    data = [{"input_ids": row} for row in windows(read(args.train)[200_000:500_000], 16, 512)]
    valid = [read(args.valid)[:60_000]]

    def quality(model: transformers.PreTrainedModel) -> str:
        return f"{perplexity(model, tokenizer, valid, window=1024, max_tokens=4096):.2f}"

    print(f"dense: perplexity {quality(dense)}", flush=True)
    print("| method | zeros | perplexity | seconds | plain passes |\n|---|---|---|---|---|")
    for method in args.methods:
        started = time.process_time()
        with torch.no_grad():
            for index in range(0, len(data), args.batch_size):
                batch = torch.stack([row["input_ids"] for row in data[index : index + args.batch_size]])
                dense.base_model(batch, use_cache=False)
        plain, model = time.process_time() - started, copy.deepcopy(dense)
        started = time.process_time()
        result = hf_prune.prune(model, config(method), data, batch_size=args.batch_size)
        seconds = time.process_time() - started
        cells = [method, f"{result.report.sparsity():.2%}", quality(model), f"{seconds:.1f}"]
        print("| " + " | ".join([*cells, f"{seconds / plain:.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
