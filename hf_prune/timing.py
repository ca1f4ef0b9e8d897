"""Time forward passes on random inputs."""

import inspect
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

from .errors import ConfigError, check_whole
from .offload import execution_device

DEFAULT_LENGTH = 128


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


def example_inputs(
    model: PreTrainedModel,
    batch_size: int,
    sequence_length: int,
    seed: int = 0,
    *,
    target_length: int | None = None,
) -> dict[str, torch.Tensor]:
    """Random inputs that a model accepts, on its device.

    Args:
        model (`PreTrainedModel`): A model of text, images, or Whisper's audio features.
        batch_size (`int`): Examples in the batch.
        sequence_length (`int`): Tokens in each example, on either side of an encoder-decoder. Images and audio
            features have the one size that the config names.
        seed (`int`, *optional*, defaults to `0`): The same seed gives the same inputs.
        target_length (`int`, *optional*): Tokens on the decoder's side of an encoder-decoder, if there are others.

    Returns:
        `dict[str, torch.Tensor]`: Keyword arguments of `model.forward`.

    Raises:
        ConfigError: A size is out of range, or the model takes another kind of input.
    """
    target_length = sequence_length if target_length is None else target_length
    check_whole(1, batch_size=batch_size, sequence_length=sequence_length, target_length=target_length)
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
        inputs["decoder_input_ids"] = _token_ids(config, (batch_size, target_length), generator)
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
    target_length: int | None = None,
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
        target_length (`int`, *optional*): See [`example_inputs`].
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
    check_whole(1, models=len(models), repeats=repeats, **({} if threads is None else {"threads": threads}))
    check_whole(0, warmup=warmup)
    threads = threads or torch.get_num_threads()
    calls = {
        name: _call(model, example_inputs(model, batch_size, sequence_length, seed, target_length=target_length))
        for name, model in models.items()
    }
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with evaluating(*models.values()), torch.inference_mode():
            times = in_turns(calls, f"Latency, batch {batch_size}", repeats=repeats, warmup=warmup, seed=seed)
    finally:
        torch.set_num_threads(before)
    dtypes = {name: str(model.dtype).removeprefix("torch.") for name, model in models.items()}
    return {
        name: Latency(*times[name], batch_size, sequence_length, str(model.device), threads, dtypes[name])
        for name, model in models.items()
    }


def _call(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def call() -> None:
        model(**inputs)
        if model.device.type != "cpu":  # an accelerator only queues the work
            torch.accelerator.synchronize(model.device)

    return call


def in_turns(
    calls: Mapping[str, Callable[[], Any]], title: str, *, repeats: int, warmup: int = 3, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Median and 95th percentile, in milliseconds, of calls that take turns: once each a round, in random order.

    Args:
        calls (`dict[str, Callable]`): What to time, by name. A call returns when its work is done.
        title (`str`): Of the progress bar.
        repeats, warmup, seed: See [`measure_latency`].

    Returns:
        `dict[str, tuple[float, float]]`: Median and 95th percentile of the wall-clock times, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, rng = list(calls), random.Random(seed)
    for round_index in tqdm(range(-warmup, repeats), desc=title, leave=False, disable=None):
        rng.shuffle(order)
        for name in order:
            start = time.perf_counter()
            calls[name]()
            if round_index >= 0:
                seconds[name].append(time.perf_counter() - start)
    percentiles = {name: 1e3 * np.percentile(values, [50, 95]) for name, values in seconds.items()}
    return {name: (float(p50), float(p95)) for name, (p50, p95) in percentiles.items()}


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Within the context models run without gradients and dropout; the training mode of each module is restored."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
