"""Where weights are: on one device, or, kept by Accelerate, in CPU memory or on disk between forward passes."""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, offload_weight
from torch import nn
from transformers import PreTrainedModel

from .errors import UnsupportedModelError


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
