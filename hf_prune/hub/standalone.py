"""Code that travels with a checkpoint: it loads with `trust_remote_code=True` where hf_prune is not installed."""

import inspect
import json
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .. import emptied, layout
from ..errors import SaveError

MODULE = "modeling_hf_prune"

_HEAD = '''"""Rebuilds the shapes of a pruned model, held by config.hf_prune. Made by hf_prune (Apache-2.0)."""

from typing import Any

import transformers


class LayoutError(ValueError):
    """The recorded shapes are malformed or do not fit the model."""


'''

_CLASS = """class {name}(transformers.{name}):
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        apply_layout(self)
"""


def auto_classes(model_type: str) -> dict[str, str]:
    """The auto classes of transformers that know a family, each with the class that it loads.

    Args:
        model_type (`str`): The family, `config.model_type`.

    Returns:
        `dict[str, str]`: Names of classes by name of the auto class: `{"AutoModel": "BertModel", ...}`.
    """
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None:
            classes = mapping._model_mapping.get(model_type)
            cls = classes[0] if isinstance(classes, list | tuple) else classes
            if cls and hasattr(transformers, cls):
                found[name] = cls
    return found


def add_standalone_code(model: PreTrainedModel, directory: Path) -> None:
    """Write the module, and point `auto_map` in config.json to it.

    Args:
        model (`PreTrainedModel`): The model that was saved.
        directory (`Path`): Where, beside its config.json.

    Raises:
        SaveError: Its class is not one of transformers.
    """
    autos = auto_classes(model.config.model_type)
    if not hasattr(transformers, type(model).__name__):
        raise SaveError(f"standalone=True is for classes of transformers, {type(model).__name__} is not one of them.")
    names = sorted({*autos.values(), type(model).__name__})
    parts: list[Any] = [
        *(layout.ConfigView, layout._count, layout._numbers, layout._slice),
        *(emptied.Emptied, emptied.NoInputs, emptied.NoHeads, emptied._is_empty, emptied._emptied, emptied._remade),
        emptied.run_empty,
        layout.apply_layout,
    ]
    source = _HEAD + "\n\n".join([*map(inspect.getsource, parts), *(_CLASS.format(name=name) for name in names)])
    (directory / f"{MODULE}.py").write_text(source, encoding="utf-8")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {auto: f"{MODULE}.{cls}" for auto, cls in autos.items()}
    if type(model).__name__ not in autos.values():
        config["auto_map"]["AutoModel"] = f"{MODULE}.{type(model).__name__}"
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
