"""The layout of a shrunk model: recorded in its config, rebuilt when it is loaded.

`config.hf_prune = {"version": 1, "modules": {name: {"weight": [rows, columns], "attributes": {...}, "config":
{...}}}}` lists what differs from the model that the rest of the config describes; names are relative to the base
model, so every head loads. Loading needs no table of families: [`apply_layout`] slices the freshly built modules, on
the meta device as a rule. A layout comes from a file that a stranger may have written. It is validated, and it can
only make a model smaller.

Where a stock config can hold the shapes (uniform widths, dropped layers) none of this is needed, and no key is
written.
"""

import copy
import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import LayoutError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

KEY = "hf_prune"


class ConfigView:
    """The config of one module: a few values of its own, all else is read from and written to the config of the model.

    A copy would not follow later changes, such as `model.set_attn_implementation(...)`.
    """

    def __init__(self, config: Any, values: dict[str, int]) -> None:
        self.__dict__.update(values, _config=config, _own=tuple(values))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_own"):
            raise AttributeError(name)
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            self.__dict__[name] = value
        else:
            setattr(self._config, name, value)


def _count(value: Any, limit: Any, key: str) -> int:
    """A number from a layout, between 0 and that of the dense model."""
    if type(value) is not int or type(limit) is not int or not 0 <= value <= limit:
        raise LayoutError(f"config.hf_prune: {key} is {value!r}, it must be a whole number between 0 and {limit!r}.")
    return value


def _layout_modules(layout: Any) -> dict[str, dict[str, Any]]:
    if (
        not isinstance(layout, dict)
        or set(layout) != {"version", "modules"}
        or not isinstance(layout["modules"], dict)
    ):
        raise LayoutError("config.hf_prune must have exactly the keys 'version' and 'modules'.")
    if type(layout["version"]) is not int or layout["version"] != 1:
        raise LayoutError(f"config.hf_prune: version is {layout['version']!r}, this code reads 1: update hf_prune.")
    for name, entry in layout["modules"].items():
        if not isinstance(entry, dict) or not set(entry) <= {"weight", "attributes", "config"}:
            raise LayoutError(
                f"config.hf_prune: {name} must be a dict with keys among 'weight', 'attributes' and 'config'."
            )
        for key in ("attributes", "config"):
            if not isinstance(entry.get(key, {}), dict):
                raise LayoutError(f"config.hf_prune: {name}.{key} must be a dict of whole numbers.")
    return dict(layout["modules"])


def _slice(module: Any, shape: Any, name: str) -> None:
    """Cut the weight of a Linear or Conv1D to its first rows and columns; what they hold is loaded afterwards."""
    import torch
    from transformers.pytorch_utils import Conv1D

    conv = isinstance(module, Conv1D)
    if not conv and type(module) is not torch.nn.Linear:
        raise LayoutError(
            f"config.hf_prune: {name} is a {type(module).__name__}, only Linear and Conv1D have a weight to cut."
        )
    if not isinstance(shape, list) or len(shape) != 2:
        raise LayoutError(f"config.hf_prune: {name}.weight is {shape!r}, it must be [rows, columns].")
    rows, columns = (_count(n, limit, f"{name}.weight") for n, limit in zip(shape, module.weight.shape, strict=True))
    if (rows, columns) == tuple(module.weight.shape):
        return

    def cut(parameter: Any, *size: int) -> Any:
        if parameter.is_meta:  # as a rule: the weights are loaded afterwards
            small = parameter.new_empty(size)
        else:
            small = parameter.detach()[tuple(slice(n) for n in size)].clone()
        return torch.nn.Parameter(small, requires_grad=parameter.requires_grad)

    outputs = columns if conv else rows
    module.weight = cut(module.weight, rows, columns)
    if module.bias is not None:
        module.bias = cut(module.bias, outputs)
    if conv:
        module.nx, module.nf = rows, columns
    else:
        module.out_features, module.in_features = rows, columns


def apply_layout(model: Any) -> None:
    """Give a freshly built model the shapes that `config.hf_prune` records. Does nothing without that key, or twice.

    Args:
        model (`PreTrainedModel`): The model, on any device. Models nested in it may be sliced already.

    Raises:
        LayoutError: The layout is malformed, names what the model does not have, or asks for more than it has.
    """
    layout = getattr(model.config, "hf_prune", None)
    if layout is None:
        return
    base = model.base_model
    modules = dict(base.named_modules())
    entries = _layout_modules(layout)
    # A stack of a larger model (BartEncoder) is built before it, and knows none of the names: its turn comes with the
    # whole. An encoder-only class of an encoder-decoder knows some. The class that was saved knows all.
    whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    for name in entries:
        root = name.partition(".")[0]
        if name not in modules and (hasattr(base, root) or (whole and root not in ("encoder", "decoder"))):
            raise LayoutError(f"config.hf_prune: {type(model).__name__} has no module {name!r}.")
    if vars(base).get("_hf_prune_done"):  # the head comes after the base model
        return
    base._hf_prune_done = any(name in modules for name in entries)
    for name, entry in entries.items():
        if name not in modules:
            continue
        module = modules[name]
        if "weight" in entry:
            _slice(module, entry["weight"], name)
        for attribute, value in entry.get("attributes", {}).items():
            if attribute.startswith("_") or type(vars(module).get(attribute)) is not int:
                raise LayoutError(f"config.hf_prune: {name} has no whole number {attribute!r}.")
            setattr(module, attribute, _count(value, vars(module)[attribute], f"{name}.{attribute}"))
        if "config" in entry:
            values = entry["config"]
            if not hasattr(module, "config"):
                raise LayoutError(f"config.hf_prune: {name} has no config to change.")
            if hasattr(module.config, "_own"):  # a ConfigView, of this module or of code that came with a checkpoint
                continue
            limits = {key: getattr(module.config, key, None) for key in values}
            module.config = ConfigView(
                module.config, {k: _count(v, limits[k], f"{name}.config.{k}") for k, v in values.items()}
            )


# Recording


def skeleton(model: "PreTrainedModel", config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model that a config builds, of the class of `model`, on the meta device."""
    import torch

    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def describe(model: "PreTrainedModel", dense: "PreTrainedModel") -> dict[str, dict[str, Any]]:
    """The entries of a layout that turns `dense` into the shapes of `model`; empty if they are equal.

    Raises:
        LayoutError: They differ in more than a layout can hold.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    entries: dict[str, dict[str, Any]] = {}
    theirs = dict(dense.base_model.named_modules())
    for name, module in model.base_model.named_modules():
        if name not in theirs:
            raise LayoutError(f"{type(model).__name__} has a module {name!r} that its config does not build.")
        other = theirs[name]
        entry: dict[str, Any] = {}
        mine = {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)}
        if mine != {key: tuple(p.shape) for key, p in other.named_parameters(recurse=False)}:
            if not isinstance(module, nn.Linear | Conv1D):
                raise LayoutError(f"{name} ({type(module).__name__}) has other shapes than its config builds.")
            entry["weight"] = list(mine["weight"])
        attributes = _counters(module)
        attributes = {key: n for key, n in attributes.items() if n != _counters(other).get(key)}
        if attributes:
            entry["attributes"] = attributes
        view: Any = getattr(module, "config", None)
        if hasattr(view, "_own"):
            own = {key: getattr(view, key) for key in view._own}
            if any(getattr(other.config, key) != n for key, n in own.items()):
                entry["config"] = own
        if entry:
            entries[name] = entry
    return entries


def _counters(module: "nn.Module") -> dict[str, int]:
    """The whole numbers that a module keeps, but for those that follow from its weight."""
    derived = ("in_features", "out_features", "nx", "nf")
    return {k: v for k, v in vars(module).items() if type(v) is int and not k.startswith("_") and k not in derived}


def record(model: "PreTrainedModel", candidates: Sequence["PreTrainedConfig"]) -> "PreTrainedConfig":
    """The config to save a shrunk model with: the first candidate that builds it, else the last with a layout.

    Args:
        model (`PreTrainedModel`): The shrunk model, on any device.
        candidates (sequence of `PreTrainedConfig`): Configs without a layout, plainest first.

    Raises:
        LayoutError: No config can describe the model.
    """
    for config in candidates:
        try:
            # Some configs check their numbers only when they are created, as they are when a checkpoint is loaded.
            type(config).from_dict(config.to_dict())
            entries = describe(model, skeleton(model, config))
        except (ValueError, LayoutError):
            if config is candidates[-1]:
                raise
            continue
        if not entries:
            return config
    config.hf_prune = {"version": 1, "modules": entries}
    if left := describe(model, skeleton(model, config)):
        raise LayoutError(f"The layout of {type(model).__name__} does not rebuild {', '.join(left)}.")
    return config


# Loading

_MODELING = "transformers.modeling_utils"


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Calls [`enable`] once transformers.modeling_utils is imported: importing it early would cost seconds."""

    def find_spec(
        self, name: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODELING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enable(module: ModuleType) -> None:
                execute(module)
                enable()

            spec.loader.exec_module = execute_and_enable  # type: ignore[method-assign]
        return spec


def enable() -> None:
    """Let `from_pretrained` and `from_config` build shrunk models.

    `PreTrainedModel.post_init` ends with [`apply_layout`] from then on; `import hf_prune` calls this. Configs without
    a layout are not affected.
    """
    if _MODELING not in sys.modules:
        if not any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _PatchOnImport())
        return
    cls = sys.modules[_MODELING].PreTrainedModel
    original = cls.post_init
    if getattr(original, "_hf_prune", False):
        return

    @functools.wraps(original)
    def post_init(self: "PreTrainedModel") -> None:
        original(self)
        apply_layout(self)

    post_init._hf_prune = True  # type: ignore[attr-defined]
    cls.post_init = post_init


def disable() -> None:
    """Undo [`enable`]."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PatchOnImport)]
    if _MODELING in sys.modules:
        cls = sys.modules[_MODELING].PreTrainedModel
        if getattr(cls.post_init, "_hf_prune", False):
            cls.post_init = cls.post_init.__wrapped__
