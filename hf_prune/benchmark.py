"""What checkpoints cost when they run: latency, peak memory, size on disk, MACs and parameters, side by side.

MACs are never called speed: [`compare`] counts them and measures the latency beside them.
"""

import inspect
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel

from .costs import DEFAULT_LENGTH, model_costs
from .errors import ConfigError, PruningError
from .offload import execution_device


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one forward pass, over all the repeats.

    Args:
        p50_ms (`float`): Median, in milliseconds.
        p95_ms (`float`): 95th percentile, in milliseconds.
        batch_size (`int`): Examples in the batch.
        sequence_length (`int`): Tokens in each example.
        device (`str`): Where the model ran: `"cpu"`, `"cuda:0"`.
        threads (`int`): Threads that torch had on the CPU.
        dtype (`str`): Of the weights: `"float32"`.
    """

    p50_ms: float
    p95_ms: float
    batch_size: int
    sequence_length: int
    device: str
    threads: int
    dtype: str


@dataclass(frozen=True)
class Measurement:
    """What [`compare`] measured of one checkpoint. `dataclasses.asdict` makes it JSON-serialisable.

    Args:
        name (`str`): What the caller called it.
        parameters (`int`): All parameters, shared ones once.
        macs (`float`): Multiply-accumulates of one forward pass over one example, see [`~hf_prune.costs.model_costs`].
        disk_bytes (`int`): Size of its weights files.
        peak_memory_bytes (`int`): See [`peak_memory`], at the largest batch size.
        latency (`list[Latency]`): One for each batch size.
        scores (`dict[str, float]`, *optional*): Its quality, as the caller measured it.
    """

    name: str
    parameters: int
    macs: float
    disk_bytes: int
    peak_memory_bytes: int
    latency: list[Latency]
    scores: dict[str, float] = field(default_factory=dict)


def example_inputs(
    model: PreTrainedModel, batch_size: int, sequence_length: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs that a model accepts, on its device.

    Args:
        model (`PreTrainedModel`): A model of text, images, or Whisper's audio features.
        batch_size (`int`): Examples in the batch.
        sequence_length (`int`): Tokens in each example, on either side of an encoder-decoder. Images and audio
            features have the one size that the config names.
        seed (`int`, *optional*, defaults to `0`): The same seed gives the same inputs.

    Returns:
        `dict[str, torch.Tensor]`: Keyword arguments of `model.forward`.

    Raises:
        ConfigError: A size is out of range, or the model takes another kind of input.
    """
    _at_least_one(batch_size=batch_size, sequence_length=sequence_length)
    config, generator = model.config, torch.Generator().manual_seed(seed)
    inputs = {}
    if model.main_input_name == "input_ids":
        ids = _token_ids(config, (batch_size, sequence_length), generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs["pixel_values"] = torch.rand((batch_size, config.num_channels, height, width), generator=generator)
    elif model.main_input_name == "input_features":
        shape = (batch_size, config.num_mel_bins, 2 * config.max_source_positions)
        inputs["input_features"] = torch.rand(shape, generator=generator)
    else:
        raise ConfigError(
            f"{type(model).__name__} takes {model.main_input_name!r}; example inputs are known for input_ids, "
            "pixel_values and input_features."
        )
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = _token_ids(config, (batch_size, sequence_length), generator)
    device = execution_device(model)
    return {name: x.to(device, model.dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def _token_ids(
    config: transformers.PreTrainedConfig, shape: tuple[int, int], generator: torch.Generator
) -> torch.Tensor:
    config = config.get_text_config()
    # Absolute positions are a table: beyond its end the model fails with a bare index error.
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    if longest is not None and shape[1] > longest:
        raise ConfigError(f"A {config.model_type} of {longest} positions has no room for sequence_length={shape[1]}.")
    eos = getattr(config, "eos_token_id", None)
    ends: list[Any] = eos if isinstance(eos, list) else [eos]
    # Padding and end tokens steer some heads to one position, and the first ids are special in most vocabularies.
    special = {0, 1, 2, getattr(config, "pad_token_id", None), *ends}
    plain = torch.tensor([i for i in range(config.vocab_size) if i not in special] or range(config.vocab_size))
    ids = plain[torch.randint(len(plain), shape, generator=generator)]
    if config.is_encoder_decoder and eos is not None:
        ids[:, -1] = ends[0]  # BART's classifier reads the state at the end token
    return ids


def measure_latency(
    models: Mapping[str, PreTrainedModel],
    batch_size: int = 1,
    sequence_length: int = DEFAULT_LENGTH,
    *,
    repeats: int = 30,
    warmup: int = 3,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time one forward pass of several models on the same random inputs.

    The models take turns, once each in every round and in random order, so that whatever else the machine does hits
    all alike. Compare figures of one call with each other; those of different calls saw different noise. Where other
    work keeps some cores busy, threads wait for each other and the figures explode: `threads=1` is the steadiest.

    Args:
        models (`dict[str, PreTrainedModel]`): The models by name, each on the device where it shall run.
        batch_size (`int`, *optional*, defaults to `1`): Examples in the batch.
        sequence_length (`int`, *optional*, defaults to `128`): Tokens in each example, all of them real (no padding).
        repeats (`int`, *optional*, defaults to `30`): Timed rounds.
        warmup (`int`, *optional*, defaults to `3`): Rounds before them that are not counted.
        seed (`int`, *optional*, defaults to `0`): Of the inputs and of the order within a round.
        threads (`int`, *optional*): Threads on the CPU. Defaults to what torch uses now.

    Returns:
        `dict[str, Latency]`: In the order of `models`.

    Raises:
        ConfigError: No model is given, or a number is out of range.

    Examples:
        ```python
        >>> latency = measure_latency({"dense": dense, "pruned": pruned}, batch_size=8)
        >>> latency["pruned"].p50_ms < latency["dense"].p50_ms
        True
        ```
    """
    _at_least_one(models=len(models), repeats=repeats, **({} if threads is None else {"threads": threads}))
    if warmup < 0:
        raise ConfigError(f"warmup must be at least 0, got {warmup}.")
    inputs = {name: example_inputs(model, batch_size, sequence_length, seed) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    training = {name: model.training for name, model in models.items()}
    before, order, rng = torch.get_num_threads(), list(models), random.Random(seed)
    threads = threads or before
    try:
        torch.set_num_threads(threads)
        for model in models.values():
            model.train(False)
        rounds = tqdm(range(-warmup, repeats), desc=f"Latency, batch {batch_size}", leave=False, disable=None)
        with torch.inference_mode():
            for round_index in rounds:
                rng.shuffle(order)
                for name in order:
                    elapsed = _seconds(models[name], inputs[name])
                    if round_index >= 0:
                        seconds[name].append(elapsed)
    finally:
        torch.set_num_threads(before)
        for name, model in models.items():
            model.train(training[name])
    result = {}
    for name, model in models.items():
        p50, p95 = (float(p) for p in 1e3 * np.percentile(seconds[name], [50, 95]))
        dtype = str(model.dtype).removeprefix("torch.")
        result[name] = Latency(p50, p95, batch_size, sequence_length, str(model.device), threads, dtype)
    return result


def _seconds(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    # An accelerator only queues the work: without waiting before and after, the clock would see the queueing.
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    start = time.perf_counter()
    model(**inputs)
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter() - start


def disk_bytes(directory: str | os.PathLike[str]) -> int:
    """Size of the weights files (`model*.safetensors`) of a checkpoint, in bytes.

    Raises:
        ConfigError: There is no such folder, or it holds no weights.
    """
    sizes = [path.stat().st_size for path in _checkpoint(directory).glob("model*.safetensors")]
    if not sizes:
        raise ConfigError(f"{directory} holds no model*.safetensors. Write one with save_pretrained.")
    return sum(sizes)


def peak_memory(
    checkpoint: str | os.PathLike[str],
    batch_size: int = 1,
    sequence_length: int = DEFAULT_LENGTH,
    *,
    device: str | None = None,
) -> int:
    """Bytes that loading a checkpoint and one forward pass take at their peak, measured in a fresh process.

    On the CPU this is the rise of the process's peak resident memory above what Python and the imported libraries
    take. It counts weights as far as they are read (safetensors files are memory-mapped: rows of an embedding that no
    token asks for need not be resident), activations, and buffers of the kernels. On a GPU it is the peak of what
    torch allocated there; the CUDA context is not counted.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder that `save_pretrained` wrote.
        batch_size (`int`, *optional*, defaults to `1`): Examples in the batch.
        sequence_length (`int`, *optional*, defaults to `128`): Tokens in each example.
        device (`str`, *optional*): `"cpu"`, `"cuda"`. Defaults to the GPU if there is one.

    Raises:
        ConfigError: There is no such checkpoint, or a number is out of range.
        PruningError: The fresh process failed; its own words are in the message.
    """
    _at_least_one(batch_size=batch_size, sequence_length=sequence_length)
    _architecture(_checkpoint(checkpoint))
    code = "import sys; from hf_prune.benchmark import _print_peak; _print_peak(*sys.argv[1:])"
    arguments = [str(checkpoint), str(batch_size), str(sequence_length), device or _default_device()]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise PruningError(f"Measuring the memory of {checkpoint} failed:\n{done.stderr.strip()}")
    return int(done.stdout.split()[-1])


def _print_peak(checkpoint: str, batch_size: str, sequence_length: str, device: str) -> None:
    _architecture(Path(checkpoint))  # importing the model's code must not count
    before = _peak_resident()
    model = load_checkpoint(checkpoint, device=device)
    with torch.inference_mode():
        model(**example_inputs(model, int(batch_size), int(sequence_length)))
    if model.device.type == "cuda":
        print(torch.cuda.max_memory_allocated(model.device))
    else:
        print(_peak_resident() - before)


def _peak_resident() -> int:
    if sys.platform == "linux":
        # getrusage would start from the peak of the parent process here: Linux carries it over fork and exec.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="ignore")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load_checkpoint(checkpoint: str | os.PathLike[str], *, device: str | None = None) -> PreTrainedModel:
    """Load a checkpoint as the class that its config names, ready to run.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder that `save_pretrained` wrote.
        device (`str`, *optional*): `"cpu"`, `"cuda"`. Defaults to the GPU if there is one.

    Raises:
        ConfigError: There is no such checkpoint, or transformers has no such class.
    """
    path = _checkpoint(checkpoint)
    model: PreTrainedModel = _architecture(path).from_pretrained(path)
    return model.to(device or _default_device())


def compare(
    checkpoints: Mapping[str, str | os.PathLike[str]],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    sequence_length: int = DEFAULT_LENGTH,
    repeats: int = 30,
    threads: int | None = None,
    device: str | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Measurement]:
    """Measure several checkpoints side by side. The first one is the reference of [`comparison_table`].

    Args:
        checkpoints (`dict[str, str]`): Folders that `save_pretrained` wrote, by name.
        batch_sizes (`tuple[int]`, *optional*, defaults to `(1, 8)`): Latency is measured at each of them.
        sequence_length (`int`, *optional*, defaults to `128`): Tokens in each example.
        repeats (`int`, *optional*, defaults to `30`): Timed rounds, see [`measure_latency`].
        threads (`int`, *optional*): Threads on the CPU. Defaults to what torch uses now.
        device (`str`, *optional*): `"cpu"`, `"cuda"`. Defaults to the GPU if there is one.
        scores (`dict[str, dict[str, float]]`, *optional*): Quality by checkpoint and metric, such as
            `{"dense": {"accuracy": 0.86}, "pruned": {"accuracy": 0.85}}`. It is passed on to the rows.

    Returns:
        `list[Measurement]`: One row for each checkpoint, in their order.

    Raises:
        ConfigError: A checkpoint is missing, or an argument is out of range.

    Examples:
        ```python
        >>> rows = compare({"dense": "bert-sst2", "pruned": "bert-sst2-60"})
        >>> print(comparison_table(rows))
        ```
    """
    _at_least_one(checkpoints=len(checkpoints), batch_sizes=min(batch_sizes, default=0), repeats=repeats)
    scores = scores or {}
    if not scores.keys() <= checkpoints.keys():
        extra = sorted(scores.keys() - checkpoints.keys())
        raise ConfigError(f"scores are given for {extra}, which are not among the checkpoints {list(checkpoints)}.")
    disk = {name: disk_bytes(path) for name, path in checkpoints.items()}
    models = {name: load_checkpoint(path, device=device) for name, path in checkpoints.items()}
    latency = [
        measure_latency(models, batch_size, sequence_length, repeats=repeats, threads=threads)
        for batch_size in batch_sizes
    ]
    return [
        Measurement(
            name=name,
            parameters=model.num_parameters(),
            macs=model_costs(model, sequence_length=sequence_length).macs,
            disk_bytes=disk[name],
            peak_memory_bytes=peak_memory(checkpoints[name], max(batch_sizes), sequence_length, device=device),
            latency=[at_batch[name] for at_batch in latency],
            scores=dict(scores.get(name, {})),
        )
        for name, model in models.items()
    ]


def comparison_table(rows: Sequence[Measurement]) -> str:
    """Rows of [`compare`] as a Markdown table: a column for each checkpoint, then how it stands against the first one.

    Scores are compared by their difference, everything else by its ratio (×).
    """
    _at_least_one(rows=len(rows))
    first, *others = rows
    lines = [
        ["", *(row.name for row in rows), *(f"{row.name} vs {first.name}" for row in others)],
        ["---", *("--:" for _ in range(len(rows) + len(others)))],
    ]
    for metric in first.scores:
        values = [row.scores.get(metric, float("nan")) for row in rows]
        lines.append([metric, *(f"{v:.4f}" for v in values), *(f"{v - values[0]:+.4f}" for v in values[1:])])

    def add(what: str, values: Sequence[float], unit: str, prefix: str, scale: float) -> None:
        cells = [f"{value / scale:.2f} {prefix}{unit}" for value in values]
        lines.append([what, *cells, *(f"{value / values[0]:.2f}×" for value in values[1:])])

    for what, unit, counts in (
        ("parameters", "", [row.parameters for row in rows]),
        ("MACs per example", "", [row.macs for row in rows]),
        ("weights on disk", "B", [row.disk_bytes for row in rows]),
        ("peak memory", "B", [row.peak_memory_bytes for row in rows]),
    ):
        add(what, counts, unit, *si_scale(max(counts)))
    for i, run in enumerate(first.latency):
        add(f"latency p50, batch {run.batch_size}", [row.latency[i].p50_ms for row in rows], "s", "m", 1)
        add(f"latency p95, batch {run.batch_size}", [row.latency[i].p95_ms for row in rows], "s", "m", 1)
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{table}\n\n{setting(first)}."


def setting(row: Measurement) -> str:
    """The conditions of a measurement, in words, for the foot of a table or a figure."""
    run = row.latency[0]
    where = "CPU, 1 thread" if run.threads == 1 else f"CPU, {run.threads} threads"
    device = where if run.device == "cpu" else run.device
    batch = max(latency.batch_size for latency in row.latency)
    return f"{run.sequence_length} tokens, {run.dtype}, {device}; peak memory at batch {batch}, libraries excluded"


def si_scale(largest: float) -> tuple[str, float]:
    """SI prefix and its factor for a number: `("M", 1e6)` for 22.7 million."""
    return next(
        ((prefix, scale) for prefix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if largest >= scale), ("", 1.0)
    )


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}.")


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _checkpoint(directory: str | os.PathLike[str]) -> Path:
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{path} has no config.json, so it is no checkpoint. Give a folder that save_pretrained wrote."
        )
    return path


def _architecture(checkpoint: Path) -> type[PreTrainedModel]:
    names = AutoConfig.from_pretrained(checkpoint).architectures or ["nothing"]
    model_class: type[PreTrainedModel] | None = getattr(transformers, names[0], None)
    if model_class is None:
        raise ConfigError(f"{checkpoint} names {names[0]} as its architecture, which transformers does not have.")
    return model_class
