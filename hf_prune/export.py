"""Out of PyTorch, to ONNX or `torch.export`, through `transformers.exporters`: compared with the model, then kept."""

import contextlib
import importlib.util
import inspect
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .errors import ConfigError, PruningError, check_whole, unknown
from .gates import current_mask
from .timing import DEFAULT_LENGTH, Latency, evaluating, example_inputs, in_turns

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
# Batch, length, and length on the decoder's side: of the example that is traced, then of those it is compared on.
_TRACED, _UNSEEN = (2, 11, 7), ((3, 17, 5), (1, 6, 9))


def export_model(model: PreTrainedModel, output: str | os.PathLike[str], format: str = "onnx") -> Any:
    """Write a model in a format that runs without PyTorch's Python, compare it with the model, and only then keep it.

    One graph is exported: a forward pass without a cache of keys and values. Batch and length are dynamic. Before
    anything is written, the graph runs (an ONNX file in ONNX Runtime) on the example that was traced and on others of
    a batch and length that it has not seen, with padding, and each output is compared.

    Args:
        model (`PreTrainedModel`): The model, shrunk if it was pruned; layers may differ in width.
        output (`str` or path): The folder. It gets `model.onnx` and its weights `model.onnx.data`, or `model.pt2`;
            and `config.json` and `export.json`.
        format (`str`, *optional*, defaults to `"onnx"`): `"onnx"`, which needs `pip install hf_prune[onnx]`, or
            `"torch"`, a program of `torch.export`.

    Returns:
        `transformers.exporters.ExportedModel`: Ready to run, called like the model. `ExportedModel.from_pretrained`
        loads it again from the folder.

    Raises:
        ConfigError: The format is unknown, the model is masked, or the folder is a file or holds a model.
        UnsupportedModelError: The family is unknown, or the model can't be pruned.
        PruningError: Packages are missing, transformers can't export this family, or the graph computes something
            else.

    Examples:
        ```python
        >>> exported = export_model(model, "bert-sst2-60-onnx")
        >>> exported(**tokenizer("A film with a heart.", return_tensors="pt")).logits
        ```
    """
    target = export_folder(output)
    exported = _exported(model, format)
    exported.save_pretrained(target)
    return exported


def export_folder(output: str | os.PathLike[str]) -> Path:
    """A folder that an export may be written to.

    Raises:
        ConfigError: It is a file, or holds a model, whose config the export would replace.
    """
    path = Path(output).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file: give a folder.")
    if (path / "config.json").exists() and not (path / "export.json").exists():
        raise ConfigError(f"{path} holds a model, whose config.json the export would replace: give another folder.")
    return path


def measure_onnx_latency(
    models: Mapping[str, PreTrainedModel],
    batch_sizes: Sequence[int] = (1,),
    sequence_length: int = DEFAULT_LENGTH,
    *,
    repeats: int = 30,
    threads: int | None = None,
) -> list[dict[str, Latency]]:
    """Time the forward pass of several models in ONNX Runtime, side by side, see
    [`~hf_prune.timing.measure_latency`].

    Args:
        models (`dict[str, PreTrainedModel]`): The models by name. Each is exported once.
        batch_sizes (`tuple[int]`, *optional*, defaults to `(1,)`): Latency is measured at each of them.
        sequence_length (`int`, *optional*, defaults to `128`): Tokens in each example.
        repeats (`int`, *optional*, defaults to `30`): Timed rounds.
        threads (`int`, *optional*): Threads on the CPU. Defaults to what torch uses now.

    Returns:
        `list[dict[str, Latency]]`: One entry for each batch size.

    Raises:
        ConfigError: No model is given, or a number is out of range.
        PruningError: See [`export_model`].
    """
    threads = torch.get_num_threads() if threads is None else threads
    sizes = {"batch_sizes": min(batch_sizes, default=0), "repeats": repeats, "threads": threads}
    check_whole(1, models=len(models), **sizes)
    exported = {name: _exported(model, "onnx") for name, model in models.items()}
    from onnxruntime import SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = threads
    for graph in exported.values():
        graph.to(session_options=options)

    def call(name: str, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
        return lambda: exported[name](**inputs)

    dtypes = {name: str(graph.dtype).removeprefix("torch.") for name, graph in exported.items()}
    found = []
    for batch_size in batch_sizes:
        inputs = {name: example_inputs(model, batch_size, sequence_length) for name, model in models.items()}
        calls = {name: call(name, inputs[name]) for name in models}
        times = in_turns(calls, f"ONNX Runtime, batch {batch_size}", repeats=repeats)
        found.append(
            {
                name: Latency(*times[name], batch_size, sequence_length, str(graph.device), threads, dtypes[name])
                for name, graph in exported.items()
            }
        )
    return found


def _exported(model: PreTrainedModel, format: str) -> Any:
    """The exported model, once it has computed what the model does."""
    if format not in FORMATS:
        raise ConfigError(unknown("export format", format, FORMATS))
    missing = [name for name in _PACKAGES[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise PruningError(f"Export to ONNX needs {', '.join(missing)}: pip install 'hf_prune[onnx]'")
    if current_mask(model) is not None:
        raise ConfigError("The model is masked, not shrunk: call shrink(model) first, so that its graph is smaller.")
    try:
        from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter
    except ImportError as error:
        raise PruningError(f"Export needs transformers.exporters: pip install -U transformers ({error})") from error

    kind = f"{type(model).__name__} ({model.config.model_type})"
    inputs = _inputs(model, *_TRACED)
    shapes = {name: {axis: torch.export.Dim.AUTO for axis in _dynamic(x)} for name, x in inputs.items()}
    exporter, config = (OnnxExporter, OnnxConfig) if format == "onnx" else (DynamoExporter, DynamoConfig)
    with evaluating(model):
        try:
            with _quiet():
                exported = exporter().export(
                    model, {**inputs, **_no_cache(model)}, config(dynamic=True, dynamic_shapes=shapes)
                )
        except Exception as error:  # whatever torch raises while it traces and translates
            raise PruningError(f"transformers can't export a {kind} to {format}: {error}") from error
        for sizes in (_TRACED, *_UNSEEN):
            _compare(model, exported, kind, sizes)
    return exported


def _inputs(model: PreTrainedModel, batch_size: int, length: int, target_length: int) -> dict[str, torch.Tensor]:
    inputs = example_inputs(model, batch_size, length, target_length=target_length)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, -2:] = 0
    return inputs


def _dynamic(inputs: torch.Tensor) -> range:
    """Axes that vary: batch and length of tokens, the batch alone of images and audio features."""
    return range(2 if inputs.dim() == 2 else 1)


def _no_cache(model: PreTrainedModel) -> dict[str, Any]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _compare(model: PreTrainedModel, exported: Any, kind: str, sizes: tuple[int, int, int]) -> None:
    inputs = _inputs(model, *sizes)
    shape = f"batch {sizes[0]}, length {sizes[1]}"
    expected = model(**inputs, **_no_cache(model))
    try:
        found = exported(**inputs)
    except Exception as error:  # the runtime's own
        raise PruningError(f"The exported {kind} does not run at {shape}, nothing was written: {error}") from error
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    for name, ours in expected.items():
        if not isinstance(ours, torch.Tensor):
            continue
        theirs = found[name].to(ours.device)
        scale = ours.abs().max().clamp_min(1.0)
        if ours.shape != theirs.shape or not bool((ours - theirs).abs().max() <= tolerance * scale):
            raise PruningError(
                f"The exported {kind} computes other {name} than the model at {shape}, nothing was written."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print each step, and warn of operators and versions that the model does not use."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers.exporters")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
