"""Where tensors wait: weights, kept by Accelerate in CPU memory or on disk between forward passes, and what a run
keeps in files of its own.
"""

import os
import secrets
import shutil
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, offload_weight
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .errors import ConfigError, UnsupportedModelError

logger = logging.get_logger(__name__)


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of a model are on a device only while they are used."""
    return any(_offloading(module) is not None for module in model.modules())


def refuse_offloaded(model: nn.Module) -> None:
    """Raise if some weights of a model are offloaded.

    Raises:
        UnsupportedModelError: They are.
    """
    if is_offloaded(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is offloaded: load it without device_map offloading. Only methods that zero "
            "single weights, such as WandaConfig, prune offloaded models."
        )


def default_device() -> str:
    """Where to run if nobody says it: the GPU if there is one. Not Apple's: statistics are sums in float64."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its first weight, or the one to which that is brought."""
    for inner in module.modules():
        hook = _offloading(inner)
        for parameter in inner.parameters(recurse=False):
            return torch.device(hook.execution_device) if hook is not None else parameter.device
    return torch.device("cpu")


@contextmanager
def resident(root: nn.Module, write: bool = False) -> Iterator[None]:
    """Within the context, the offloaded weights inside a module stay on the device that computes with them.

    Args:
        root (`nn.Module`): A layer, as a rule. Nothing happens to what is not offloaded.
        write (`bool`, *optional*, defaults to `False`): Keep what the context changes; else it is lost.
    """
    held: list[tuple[nn.Module, Any, Any]] = []
    try:
        for module in root.modules():
            hook = _offloading(module)
            if hook is not None:
                hook.pre_forward(module)
                held.append((module, hook, module.forward))
                module.forward = module._old_forward  # type: ignore[assignment]  # without it, a call would offload
        yield
        if write:
            for module, hook, _ in held:
                for name, parameter in module.named_parameters(recurse=hook.place_submodules):
                    _store(hook.weights_map, name, parameter.detach())
    finally:
        for module, hook, forward in held:
            module.forward = forward
            hook.post_forward(module, None)


def _offloading(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(one, AlignDevicesHook) and one.offload:
            return one
    return None


def stored(model: nn.Module, name: str) -> torch.Tensor:
    """The value of an offloaded parameter or buffer, from where Accelerate keeps it."""
    weights, key = _place(model, name)
    return weights[key]


def storages(model: PreTrainedModel) -> dict[str, Hashable]:
    """For each parameter where its values are: the same for those that share memory, or an entry of a file.

    What a model ties by itself stays tied when it is offloaded. Other weights that share memory get a file each from
    `accelerate.disk_offload`: after that they are weights of their own.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = {name: _storage(model, name, parameter) for name, parameter in parameters.items()}
    for name, source in model.all_tied_weights_keys.items():
        if any(other in parameters and parameters[other].is_meta for other in (name, source)):
            places[name] = places[source]
    return places


def _storage(model: nn.Module, name: str, parameter: torch.Tensor) -> Hashable:
    if not parameter.is_meta:
        return parameter.data_ptr()
    weights, key = _place(model, name)
    if isinstance(weights, OffloadedWeightsLoader) and key not in weights.state_dict:
        entry = weights.index[key]
        return entry.get("safetensors_file", weights.save_folder), entry.get("weight_name", key)
    return weights[key].data_ptr()


def _place(model: nn.Module, name: str) -> tuple[Mapping[str, torch.Tensor], str]:
    """Where the hook looks that brings an offloaded weight: a mapping, and the key in it."""
    parts = name.split(".")
    for end in reversed(range(len(parts))):  # the hook of a module that holds it may serve for all inside
        hook = _offloading(model.get_submodule(".".join(parts[:end])))
        if hook is not None and (hook.place_submodules or end == len(parts) - 1):
            return _unprefixed(hook.weights_map, ".".join(parts[end:]))
    raise UnsupportedModelError(f"{name} is on the meta device, and no hook of Accelerate brings it: load it again.")


def _unprefixed(weights: Any, key: str) -> tuple[Any, str]:
    while isinstance(weights, PrefixedDataset):
        weights, key = weights.dataset, weights.prefix + key
    return weights, key


def _store(weights_map: Mapping[str, torch.Tensor], key: str, value: torch.Tensor) -> None:
    """Put a weight where its hook will look for it. Files of a checkpoint are never written to."""
    weights, key = _unprefixed(weights_map, key)
    if not isinstance(weights, OffloadedWeightsLoader):
        weights[key] = value.to("cpu", copy=True)
    elif key in weights.state_dict or weights.save_folder is None:
        weights.state_dict[key] = value.to("cpu", copy=True)
    else:
        weights.index[key] = offload_weight(value, key, str(weights.save_folder), {})[key]


# The files of a run

_PREFIX = "hf_prune-run-"


@contextmanager
def run_folder(parent: str | None) -> Iterator[Path | None]:
    """A folder inside another one for the files of a run. It goes with the context, however that ends.

    Runs that were killed could not remove theirs: they are known by a lock that nobody holds any more, and removed.

    Args:
        parent (`str`, *optional*): Where it is made. Without it there is none.

    Raises:
        ConfigError: The parent can't be made.
    """
    if parent is None:
        yield None
        return
    try:
        os.makedirs(parent, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"offload_folder {parent!r} can't be made: {error.strerror}.") from error
    for left in Path(parent).glob(f"{_PREFIX}*/"):
        if left.is_dir():
            _remove_abandoned(left)
    folder = Path(parent) / f"{_PREFIX}{secrets.token_hex(8)}"
    try:
        with WeakFileLock(_lock(folder)):  # before the folder: without a lock it would be taken for abandoned
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        _lock(folder).unlink(missing_ok=True)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_abandoned(folder: Path) -> None:
    try:
        with WeakFileLock(_lock(folder), timeout=0.1):
            shutil.rmtree(folder, ignore_errors=True)
    except TimeoutError:  # its run goes on
        return
    _lock(folder).unlink(missing_ok=True)
    logger.warning(f"Removed {folder}, which a run that was killed had left.")


@dataclass(frozen=True)
class Filed:
    """A tensor in a file."""

    path: Path


class Shelf:
    """Where tensors wait for their turn: in CPU memory, or in files.

    Args:
        folder (`Path`, *optional*): Where the files are.

    Attributes:
        nbytes (`int`): The bytes that were put there.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.nbytes = folder, 0

    def put(self, name: str, tensor: torch.Tensor) -> torch.Tensor | Filed:
        """Keep a tensor, in place of the one that had its name."""
        self.nbytes += tensor.nbytes
        if self.folder is None:
            return tensor.to("cpu")
        kept = Filed(self.folder / f"{name}.safetensors")
        save_file({"tensor": tensor.contiguous()}, kept.path)
        return kept


def fetched(kept: torch.Tensor | Filed) -> torch.Tensor:
    """What [`Shelf.put`] returned, as a tensor."""
    return load_file(kept.path)["tensor"] if isinstance(kept, Filed) else kept
