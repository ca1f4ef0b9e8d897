"""The layout of a shrunk model: recorded in its config, rebuilt when it is loaded.

`config.hf_prune = {"version": 1, "numbers": {"encoder.layer.0.output.dense.in_features": 1021, ...}}` lists the whole
numbers in which the modules differ from those that the rest of the config builds. Names are relative to the base
model, so every head loads; the numbers of features of a Linear or Conv1D say how its weight is sliced; `x.config.y` is
what module x alone reads as y in its config. Loading needs no table of families: [`apply_layout`] slices the freshly
built modules, on the meta device as a rule. A layout comes from a file that a stranger may have written. It is
validated, and it can only make a model smaller.

Where a stock config can hold the shapes (uniform widths, dropped layers) none of this is needed: no key is written.
"""

import copy
import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .emptied import run_empty
from .errors import LayoutError

if TYPE_CHECKING:
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


def _numbers(layout: Any) -> dict[str, int]:
    if (
        not isinstance(layout, dict)
        or set(layout) != {"version", "numbers"}
        or not isinstance(layout["numbers"], dict)
    ):
        raise LayoutError("config.hf_prune must have exactly the keys 'version' and 'numbers', a dict.")
    if type(layout["version"]) is not int or layout["version"] != 1:
        raise LayoutError(f"config.hf_prune: version is {layout['version']!r}, this code reads 1: update hf_prune.")
    return dict(layout["numbers"])


def _slice(module: Any, attribute: str, count: int) -> None:
    """Cut a Linear or Conv1D to its first inputs or outputs; what they hold is loaded afterwards."""
    import torch

    outputs = attribute in ("out_features", "nf")
    rows = outputs == (attribute in ("out_features", "in_features"))  # Conv1D has a row for each input

    def cut(parameter: Any, dim: int) -> Any:
        if parameter.is_meta:  # as a rule: the weights are loaded afterwards
            small = parameter.new_empty([count if d == dim else n for d, n in enumerate(parameter.shape)])
        else:
            small = parameter.detach().narrow(dim, 0, count).clone()
        return torch.nn.Parameter(small, requires_grad=parameter.requires_grad)

    module.weight = cut(module.weight, 0 if rows else 1)
    if outputs and module.bias is not None:
        module.bias = cut(module.bias, 0)


def apply_layout(model: Any) -> None:
    """Give a freshly built model the shapes that `config.hf_prune` records. Does nothing without that key, or twice.

    Args:
        model (`PreTrainedModel`): The model, on any device. Models nested in it may be sliced already.

    Raises:
        LayoutError: The layout is malformed, names what the model does not have, or asks for more than it has.
    """
    layout = getattr(model.config, "hf_prune", None)
    base = model.base_model
    if layout is None or vars(base).get("_hf_prune_done"):  # the head comes after the base model
        return
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    features = {Linear: ("in_features", "out_features"), Conv1D: ("nx", "nf")}
    modules = dict(base.named_modules())
    # A stack of a larger model (BartEncoder) is built before it, and knows none of the names: its turn comes with the
    # whole. An encoder-only class of an encoder-decoder knows some. The class that was saved knows all.
    architectures = getattr(model.config, "architectures", None)
    whole = isinstance(architectures, list | tuple) and type(model).__name__ in architectures
    found: list[tuple[str, str, Any]] = []
    views: dict[str, dict[str, Any]] = {}
    for path, value in _numbers(layout).items():
        name, _, attribute = path.rpartition(".")
        owner, _, last = name.rpartition(".")
        if last == "config" and name not in modules and owner in modules:
            views.setdefault(owner, {})[attribute] = value
        elif name in modules:
            found.append((name, attribute, value))
        else:
            root = name.partition(".")[0]
            if hasattr(base, root) or (whole and root not in ("encoder", "decoder")):
                raise LayoutError(f"config.hf_prune: {type(model).__name__} has no module {name!r}.")
    base._hf_prune_done = len(found) + sum(map(len, views.values())) == len(layout["numbers"])
    for name, attribute, value in found:
        module = modules[name]
        dense = vars(module).get(attribute)
        if attribute.startswith("_") or type(dense) is not int:
            raise LayoutError(f"config.hf_prune: {name} has no whole number {attribute!r}.")
        count = _count(value, dense, f"{name}.{attribute}")
        if attribute in features.get(type(module), ()) and count < dense:
            _slice(module, attribute, count)
        setattr(module, attribute, count)
    for module in modules.values():
        run_empty(module)
    for name, values in views.items():
        config = getattr(modules[name], "config", None)
        if config is None:
            raise LayoutError(f"config.hf_prune: {name} has no config.")
        if not hasattr(config, "_own"):  # else it is a ConfigView, of this module or of code that came with a model
            own = {key: _count(n, getattr(config, key, None), f"{name}.config.{key}") for key, n in values.items()}
            modules[name].config = ConfigView(config, own)


# Recording


def skeleton(model: "PreTrainedModel", config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model that a config builds, on the meta device.

    Args:
        model (`PreTrainedModel`): Whose class is built.
        config (`PreTrainedConfig`): The config. It is copied.
    """
    import torch

    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def describe(model: "PreTrainedModel", dense: "PreTrainedModel") -> dict[str, int]:
    """The numbers of a layout that turns `dense` into the shapes of `model`; empty if they are equal.

    Args:
        model (`PreTrainedModel`): The shrunk model, on any device.
        dense (`PreTrainedModel`): What its config builds without a layout, or with another one.

    Returns:
        `dict[str, int]`: By `module.attribute` the number in `model`.

    Raises:
        LayoutError: They differ in more than a layout can hold.
    """
    numbers: dict[str, int] = {}
    theirs = dict(dense.base_model.named_modules())
    for name, module in model.base_model.named_modules():
        if name not in theirs:
            raise LayoutError(f"{type(model).__name__} has a module {name!r} that its config does not build.")
        other = vars(theirs[name])
        differing = {k: n for k, n in vars(module).items() if type(n) is int and k[0] != "_" and other.get(k) != n}
        shapes, before = ({k: p.shape for k, p in m.named_parameters(recurse=False)} for m in (module, theirs[name]))
        if shapes != before and not {"in_features", "out_features", "nx", "nf"} & set(differing):
            raise LayoutError(f"{name} ({type(module).__name__}) has other shapes than its config builds.")
        numbers |= {f"{name}.{key}": n for key, n in differing.items()}
        view: Any = getattr(module, "config", None)
        for key in getattr(view, "_own", ()):
            if getattr(theirs[name].config, key) != getattr(view, key):
                numbers[f"{name}.config.{key}"] = getattr(view, key)
    return numbers


def record(model: "PreTrainedModel", candidates: Sequence["PreTrainedConfig"]) -> "PreTrainedConfig":
    """The config to save a shrunk model with: the first candidate that builds it, else the last with a layout.

    Args:
        model (`PreTrainedModel`): The shrunk model, on any device.
        candidates (sequence of `PreTrainedConfig`): Configs without a layout, plainest first.

    Raises:
        LayoutError: No config can describe the model.
    """
    from huggingface_hub.errors import StrictDataclassError

    for config in candidates:
        try:
            # Some configs check their numbers only when they are created, as they are when a checkpoint is loaded.
            type(config).from_dict(config.to_dict())
            numbers = describe(model, skeleton(model, config))
        except (ValueError, ZeroDivisionError, StrictDataclassError, LayoutError):  # divided by no heads in layer 0
            if config is candidates[-1]:
                raise
            continue
        if not numbers:
            return config
    config.hf_prune = {"version": 1, "numbers": numbers}
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
    """Let `from_pretrained` and `from_config` build shrunk models, and `from_pretrained` read compressed checkpoints.

    `PreTrainedModel.post_init` ends with [`apply_layout`] from then on, and the tensors of a checkpoint go through
    [`compression.expanded`] before they are loaded; `import hf_prune` calls this. Other models are not affected.
    """
    if _MODELING not in sys.modules:
        if not any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _PatchOnImport())
        return
    modeling: Any = sys.modules[_MODELING]
    original, load = modeling.PreTrainedModel.post_init, modeling.convert_and_load_state_dict_in_model
    if getattr(original, "_hf_prune", False):
        return

    @functools.wraps(original)
    def post_init(self: "PreTrainedModel") -> None:
        original(self)
        apply_layout(self)

    parameters = inspect.signature(load)

    @functools.wraps(load)
    def load_expanded(*args: Any, **kwargs: Any) -> Any:
        from .compression import expanded

        given = parameters.bind(*args, **kwargs)
        parts = given.arguments["state_dict"]
        whole = given.arguments["state_dict"] = expanded(parts)
        index = given.arguments.get("disk_offload_index") or {}
        for target, entry in list(index.items()):
            name = entry.get("weight_name")
            if name in parts and whole[name] is not parts[name]:
                del index[target]  # hooks would read a part from the checkpoint later: the whole is written elsewhere
        return load(*given.args, **given.kwargs)

    post_init._hf_prune = True  # type: ignore[attr-defined]
    modeling.PreTrainedModel.post_init = post_init
    modeling.convert_and_load_state_dict_in_model = load_expanded


def disable() -> None:
    """Undo [`enable`]."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PatchOnImport)]
    if _MODELING in sys.modules:
        modeling: Any = sys.modules[_MODELING]
        if getattr(modeling.PreTrainedModel.post_init, "_hf_prune", False):
            modeling.PreTrainedModel.post_init = modeling.PreTrainedModel.post_init.__wrapped__
            modeling.convert_and_load_state_dict_in_model = modeling.convert_and_load_state_dict_in_model.__wrapped__
