"""Latency of shrunk models against dense ones, beside the MACs that they keep.

    python benchmarks/latency.py [--shapes bert-base llama] [--threads 1] [--device cpu] [--dtype float32]

Random weights: latency does not depend on them. Heads and neurons are kept in about equal shares, once in widths as a
budget leaves them and once rounded to a multiple of 64. `overhead` is time ratio / MACs ratio: 1 is ideal.
"""

import argparse
import copy

import torch
import transformers

import hf_prune
from hf_prune.benchmark import measure_latency

SHAPES = {
    "bert-base": lambda: transformers.BertModel(transformers.BertConfig()),
    "bert-large": lambda: transformers.BertModel(
        transformers.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    ),
    # TinyLlama's layers, four of them
    "llama": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(
            hidden_size=2048,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_key_value_heads=4,
            intermediate_size=5632,
            vocab_size=1000,
        )
    ),
    # Llama-2-7B's layers, eight of them
    "llama-7b": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(hidden_size=4096, num_hidden_layers=8, intermediate_size=11008, vocab_size=1000)
    ),
}


def shrunk(dense: transformers.PreTrainedModel, ratio: float, multiple_of: int, length: int) -> tuple[object, float]:
    """A copy that keeps `ratio` of the MACs, heads and neurons in equal shares, and the ratio it really keeps."""
    model = copy.deepcopy(dense)
    config = hf_prune.RandomConfig(budget={"macs": ratio}, multiple_of=multiple_of, sequence_length=length)
    report = hf_prune.prune(model, config).report
    return hf_prune.shrink(model), report.ratio("macs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["bert-base", "llama"], choices=SHAPES)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    print("| shape | MACs kept | widths | p50 ms | time ratio | overhead |\n|---|---|---|---|---|---|")
    for shape in args.shapes:
        torch.manual_seed(0)
        dense = SHAPES[shape]().to(args.device, getattr(torch, args.dtype)).eval()
        models, kept = {"dense": dense}, {"dense": 1.0}
        for ratio in (0.75, 0.5, 0.25):
            for multiple in (1, 64):
                name = f"{ratio} {'rounded' if multiple > 1 else 'any'}"
                models[name], kept[name] = shrunk(dense, ratio, multiple, args.sequence_length)
        times = measure_latency(
            models, args.batch_size, args.sequence_length, repeats=args.repeats, threads=args.threads
        )
        for name, latency in times.items():
            ratio = latency.p50_ms / times["dense"].p50_ms
            cells = [shape, f"{kept[name]:.3f}", name.partition(" ")[2], f"{latency.p50_ms:.1f}", f"{ratio:.3f}"]
            print("| " + " | ".join([*cells, f"{ratio / kept[name]:.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
