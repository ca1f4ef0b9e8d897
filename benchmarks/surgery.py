"""What shrinking and loading cost: seconds and peak memory, on 134 million parameters with the shapes of SmolLM2-135M.

    python benchmarks/surgery.py

Loading compares a shrunk checkpoint with a dense one of about the same number of bytes, each in turn, medians of 9.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import hf_prune


def smollm(layers: int = 30, neurons: int = 1536) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=neurons,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def memory(kind: str) -> int:
    """Bytes of resident memory of this process on Linux: now (`VmRSS`), or at its peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def shrinking() -> None:
    """Runs in a process of its own, so that the peak is its own."""
    model = smollm()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    hf_prune.prune(model, hf_prune.MagnitudeConfig(budget={"macs": 0.5}))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    others, started = memory("VmRSS") - size, time.perf_counter()
    hf_prune.shrink(model)
    seconds, peak = time.perf_counter() - started, (memory("VmHWM") - others) / size
    print(f"shrink: {seconds:.2f} s, peak memory {peak:.2f}x the model's {size / 1e6:.0f} MB")


def loading(folder: Path) -> None:
    model = smollm()
    hf_prune.prune(model, hf_prune.MagnitudeConfig(budget={"macs": 0.5}))
    hf_prune.shrink(model)
    hf_prune.save_pretrained(model, folder / "shrunk")
    target = sum(p.numel() for p in model.parameters())
    widths = range(64, 1537, 8)
    with torch.device("meta"):
        layer = {n: sum(p.numel() for p in smollm(1, n).parameters()) for n in (64, 72)}
        base = sum(p.numel() for p in smollm(30, 64).parameters())
    step = (layer[72] - layer[64]) * 30
    width = min(widths, key=lambda n: abs(base + (n - 64) // 8 * step - target))
    dense = smollm(30, width)
    dense.save_pretrained(folder / "dense")
    times: dict[str, list[float]] = {"dense": [], "shrunk": []}
    for _ in range(9):
        for name, seconds in times.items():
            started = time.perf_counter()
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / name)
            seconds.append(time.perf_counter() - started)
            size = sum(p.numel() for p in loaded.parameters())
            print(f"  {name}: {size / 1e6:.2f} M parameters in {seconds[-1]:.3f} s", file=sys.stderr)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratio = medians["shrunk"] / medians["dense"]
    print(f"load: shrunk {medians['shrunk']:.3f} s, dense of that size {medians['dense']:.3f} s, ratio {ratio:.3f}")


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    if sys.argv[1:] == ["shrinking"]:
        shrinking()
    else:
        subprocess.run([sys.executable, __file__, "shrinking"], check=True)
        with tempfile.TemporaryDirectory() as folder:
            loading(Path(folder))
