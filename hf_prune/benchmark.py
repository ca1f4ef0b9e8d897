"""What checkpoints cost when they run: latency, peak memory, size on disk, MACs and parameters, side by side.

MACs are never called speed: [`compare`] counts them and measures the latency beside them.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from .costs import model_costs
from .errors import ConfigError, PruningError, check_whole
from .export import measure_onnx_latency
from .offload import default_device
from .tables import markdown_table, quantities
from .timing import DEFAULT_LENGTH, Latency, example_inputs, measure_latency


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
        scored_on (`dict`, *optional*): The data behind the scores: `samples`, `dataset`, `split`, ...
        onnx_latency (`list[Latency]`, *optional*): As `latency`, in ONNX Runtime.
        intervals (`dict[str, tuple[float, float]]`, *optional*): 95 % confidence intervals of the scores, by metric.
            `hf-prune bench` adds that of a perplexity; those of accuracies follow from `samples`.
    """

    name: str
    parameters: int
    macs: float
    disk_bytes: int
    peak_memory_bytes: int
    latency: list[Latency]
    scores: dict[str, float] = field(default_factory=dict)
    scored_on: dict[str, Any] = field(default_factory=dict)
    onnx_latency: list[Latency] = field(default_factory=list)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Measurement":
        """Inverse of `dataclasses.asdict`. Keys that it does not know are those of a newer version: left out."""
        known = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        runs = {key: [Latency(**run) for run in known.get(key, ())] for key in ("latency", "onnx_latency")}
        return cls(**{**known, **runs})


def disk_bytes(directory: str | os.PathLike[str]) -> int:
    """Size of the weights files (`model*.safetensors`) of a checkpoint, in bytes.

    Args:
        directory (`str` or path): Folder that `save_pretrained` wrote.

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
    take: all weights, activations, and buffers of the kernels. On a GPU it is the peak of what torch allocated there;
    the CUDA context is not counted.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder that `save_pretrained` wrote.
        batch_size (`int`, *optional*, defaults to `1`): Examples in the batch.
        sequence_length (`int`, *optional*, defaults to `128`): Tokens in each example.
        device (`str`, *optional*): `"cpu"`, `"cuda"`. Defaults to the GPU if there is one.

    Returns:
        `int`: Bytes.

    Raises:
        ConfigError: There is no such checkpoint, or a number is out of range.
        PruningError: The fresh process failed; its own words are in the message.
    """
    check_whole(1, batch_size=batch_size, sequence_length=sequence_length)
    _architecture(_checkpoint(checkpoint))
    code = "import sys; from hf_prune.benchmark import _print_peak; _print_peak(*sys.argv[1:])"
    arguments = [str(checkpoint), str(batch_size), str(sequence_length), device or default_device()]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise PruningError(f"Measuring the memory of {checkpoint} failed:\n{done.stderr.strip()}")
    return int(done.stdout.split()[-1])


def _print_peak(checkpoint: str, batch_size: str, sequence_length: str, device: str) -> None:
    _architecture(Path(checkpoint))  # importing the model's code must not count
    before = _peak_resident()
    model = load_checkpoint(checkpoint, device=device)
    with torch.inference_mode():
        for parameter in model.parameters():
            # The file is mapped into memory, and how much of it is resident before it is read depends on the system.
            parameter.flatten()[::512].clone()
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

    Returns:
        `PreTrainedModel`: In evaluation mode.

    Raises:
        ConfigError: There is no such checkpoint, or transformers has no such class.
    """
    path = _checkpoint(checkpoint)
    model: PreTrainedModel = _architecture(path).from_pretrained(path)
    return model.to(device or default_device())


def compare(
    checkpoints: Mapping[str, str | os.PathLike[str]],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    sequence_length: int = DEFAULT_LENGTH,
    repeats: int = 30,
    threads: int | None = None,
    device: str | None = None,
    onnx: bool = False,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    scored_on: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """Measure several checkpoints side by side. The first one is the reference of [`comparison_table`].

    Args:
        checkpoints (`dict[str, str]`): Folders that `save_pretrained` wrote, by name.
        batch_sizes (`tuple[int]`, *optional*, defaults to `(1, 8)`): Latency is measured at each of them.
        sequence_length (`int`, *optional*, defaults to `128`): Tokens in each example.
        repeats (`int`, *optional*, defaults to `30`): Timed rounds, see [`measure_latency`].
        threads (`int`, *optional*): Threads on the CPU. Defaults to what torch uses now.
        device (`str`, *optional*): `"cpu"`, `"cuda"`. Defaults to the GPU if there is one.
        onnx (`bool`, *optional*, defaults to `False`): Export each checkpoint and measure its latency in ONNX Runtime
            too. Needs `pip install hf_prune[onnx]`.
        scores (`dict[str, dict[str, float]]`, *optional*): Quality by checkpoint and metric, such as
            `{"dense": {"accuracy": 0.86}, "pruned": {"accuracy": 0.85}}`. It is passed on to the rows.
        scored_on (`dict`, *optional*): The data behind the scores, passed on too.

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
    check_whole(1, checkpoints=len(checkpoints), batch_sizes=min(batch_sizes, default=0), repeats=repeats)
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
    onnx_latency: list[dict[str, Latency]] = []
    if onnx:
        onnx_latency = measure_onnx_latency(models, batch_sizes, sequence_length, repeats=repeats, threads=threads)
    return [
        Measurement(
            name=name,
            parameters=model.num_parameters(),
            macs=model_costs(model, sequence_length=sequence_length).macs,
            disk_bytes=disk[name],
            peak_memory_bytes=peak_memory(checkpoints[name], max(batch_sizes), sequence_length, device=device),
            latency=[at_batch[name] for at_batch in latency],
            onnx_latency=[at_batch[name] for at_batch in onnx_latency],
            scores=dict(scores.get(name, {})),
            scored_on=dict(scored_on or {}) if name in scores else {},
        )
        for name, model in models.items()
    ]


def comparison_table(rows: Sequence[Measurement]) -> str:
    """Rows of [`compare`] as a Markdown table: a column for each checkpoint, then how it stands against the first one.

    Scores are compared by their difference, everything else by its ratio (×).

    Args:
        rows (`list[Measurement]`): At least one; only metrics that the first one has are shown.

    Returns:
        `str`: The table, and below it the conditions of the measurement.

    Raises:
        ConfigError: There are no rows.
    """
    check_whole(1, rows=len(rows))
    first, *others = rows
    head = ["", *(row.name for row in rows), *(f"{row.name} vs {first.name}" for row in others)]
    lines = []
    for metric in first.scores:
        values = [row.scores.get(metric, float("nan")) for row in rows]
        lines.append([metric, *(f"{v:.4f}" for v in values), *(f"{v - values[0]:+.4f}" for v in values[1:])])

    def add(what: str, values: Sequence[float], unit: str = "") -> None:
        lines.append([what, *quantities(values, unit), *(f"{value / values[0]:.2f}×" for value in values[1:])])

    add("parameters", [row.parameters for row in rows])
    add("MACs per example", [row.macs for row in rows])
    add("weights on disk", [row.disk_bytes for row in rows], "B")
    add("peak memory", [row.peak_memory_bytes for row in rows], "B")
    for where, field_name in (("latency", "latency"), ("ONNX Runtime", "onnx_latency")):
        for runs in zip(*(getattr(row, field_name) for row in rows), strict=True):
            for percentile in ("p50", "p95"):
                values = [getattr(run, f"{percentile}_ms") for run in runs]
                add(f"{where} {percentile}, batch {runs[0].batch_size}", values, "ms")
    return f"{markdown_table(head, lines)}\n\n{setting(first)}."


def setting(row: Measurement) -> str:
    """The conditions of a measurement, in words, for the foot of a table or a figure.

    Args:
        row ([`Measurement`]): With at least one latency.

    Returns:
        `str`: `"128 tokens, float32, CPU, 1 thread; peak memory at batch 8, libraries excluded"`.
    """
    run = row.latency[0]
    where = "CPU, 1 thread" if run.threads == 1 else f"CPU, {run.threads} threads"
    device = where if run.device == "cpu" else run.device
    batch = max(latency.batch_size for latency in row.latency)
    return f"{run.sequence_length} tokens, {run.dtype}, {device}; peak memory at batch {batch}, libraries excluded"


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
