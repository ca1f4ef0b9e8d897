"""Wanda and SparseGPT on a GPU: time and peak memory beside plain passes, and how fast 2:4 weights run.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --layers 2 --hidden 64 --intermediate 96 --heads 4 --length 64

The model has the shape of Llama-7B and random weights, made anew for each method: time and memory don't depend on
their values. A method (NAME:SPARSITY or NAME:N:M, as in weights.py) is set against two plain passes, just before it,
of the same tokens through the same blocks in the same batches. Memory is what torch allocates on the GPU, the model
included; on the CPU it is not measured. Each method runs in llm-compressor too, if that is installed. Then the same
model, pruned to 2:4, goes to the sparse kernels: one pass of the whole, and the shapes of its projections by
themselves.
"""

import argparse
import gc
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.utils.benchmark import Timer
from weights import config, parts

import hf_prune


def build(args: argparse.Namespace) -> transformers.LlamaForCausalLM:
    gc.collect()  # the model before this one
    shape = transformers.LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        vocab_size=args.vocabulary,
        max_position_embeddings=max(args.length, 2048),
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        return transformers.AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, args.dtype)).eval()


def measured(device: str, function: Callable[..., object], *args: Any) -> tuple[float, float]:
    """Seconds, and the peak of the GPU's memory in GB."""
    if device == "cpu":
        started = time.perf_counter()
        function(*args)
        return time.perf_counter() - started, float("nan")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    function(*args)
    torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() / 1e9


def two_passes(model: transformers.LlamaForCausalLM, rows: torch.Tensor, args: argparse.Namespace) -> None:
    with torch.no_grad():
        for batch in (*rows.split(args.batch_size), *rows.split(args.batch_size)):
            model.model(batch.to(args.device), use_cache=False)


def ours(model: transformers.LlamaForCausalLM, method: str, rows: torch.Tensor, args: argparse.Namespace) -> None:
    hf_prune.prune(model, config(method), [{"input_ids": row} for row in rows], batch_size=args.batch_size)


def theirs(model: transformers.LlamaForCausalLM, method: str, rows: torch.Tensor, args: argparse.Namespace) -> None:
    import datasets
    import tokenizers
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

    name, much, _ = parts(method)
    options = {"sparsity": 0.5, "mask_structure": ":".join(much)} if len(much) == 2 else {"sparsity": float(much[0])}
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[name]
    unused = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel()))
    oneshot(
        model=model,
        dataset=datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": torch.ones_like(rows)}),
        recipe=modifier(targets=["Linear"], ignore=["re:.*lm_head"], **options),
        num_calibration_samples=len(rows),
        max_seq_length=args.length,
        batch_size=args.batch_size,
        processor=unused,
        clear_sparse_session=True,  # which holds the model
    )


def kernels(args: argparse.Namespace) -> None:
    model = build(args)
    hf_prune.prune(model, hf_prune.WeightMagnitudeConfig(pattern="2:4"))
    layers = {tuple(m.weight.shape): m for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear)}
    dense = {shape: layer.weight.detach().clone() for shape, layer in layers.items()}
    try:
        found = hf_prune.accelerate_sparse(model, batch_size=args.batch_size, sequence_length=args.length)
    except hf_prune.UnsupportedModelError as error:
        print(f"\nNo 2:4 kernels: {error}")
        return
    print("\n| 2:4 | tokens | dense, ms | sparse, ms | speed-up |\n|---|---|---|---|---|")

    def line(what: str, tokens: int, before: float, after: float) -> None:
        print(f"| {what} | {tokens} | {before:.3f} | {after:.3f} | {before / after:.2f}× |", flush=True)

    line("the model", args.batch_size * args.length, found["dense"].p50_ms, found["sparse"].p50_ms)
    for shape, layer in layers.items():
        for tokens in args.tokens:
            x = torch.randn(tokens, shape[1], dtype=model.dtype, device=args.device)
            times = []
            for weight in (dense[shape], layer.weight):
                call = {"linear": torch.nn.functional.linear, "x": x, "weight": weight}
                timer = Timer("linear(x, weight)", globals=call)
                with torch.inference_mode():
                    times.append(1e3 * timer.blocked_autorange(min_run_time=0.5).median)
            line("{}×{}".format(*shape), tokens, *times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["wanda:0.5", "wanda:2:4", "sparsegpt:0.5", "sparsegpt:2:4"])
    sizes = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "vocabulary": 32000}
    for name, size in (sizes | {"samples": 32, "length": 2048, "batch-size": 4}).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[128, 2048, 8192], help="for the kernels by themselves"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {args.samples} × {args.length} tokens, {args.dtype}")
    rows = torch.randint(args.vocabulary, (args.samples, args.length), generator=torch.Generator().manual_seed(0))
    packages = {"hf_prune": ours}
    if importlib.util.find_spec("llmcompressor") is not None:
        packages["llm-compressor"] = theirs
    else:
        print("llm-compressor is not installed (pip install llmcompressor)")

    print("\n| | two passes, s | s | times | passes, GB | peak, GB | times |\n|---|---|---|---|---|---|---|")
    for method in args.methods:
        for package, run in packages.items():
            model = build(args)
            two_passes(model, rows[: args.batch_size], args)  # warms up
            plain, small = measured(args.device, two_passes, model, rows, args)
            seconds, large = measured(args.device, run, model, method, rows, args)
            cells = [f"{plain:.1f}", f"{seconds:.1f}", f"{seconds / plain:.2f}"]
            cells += [f"{small:.2f}", f"{large:.2f}", f"{large / small:.2f}"]
            print("| " + " | ".join([f"{package} {method}", *cells]) + " |", flush=True)
            del model
    kernels(args)


if __name__ == "__main__":
    main()
