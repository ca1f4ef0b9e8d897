"""`model_type` -> [`Architecture`]."""

from collections.abc import Iterable

from ..errors import ConfigError, UnsupportedModelError, unknown
from .specs import Architecture

_ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(
    model_type: str | Iterable[str], architecture: Architecture, *, exist_ok: bool = False
) -> None:
    """Tell hf_prune where a model family keeps its heads and neurons.

    Args:
        model_type (`str` or iterable of `str`): `config.model_type` of the family.
        architecture ([`Architecture`]): Its stacks of layers.
        exist_ok (`bool`, *optional*, defaults to `False`): Replace an entry that is there already.

    Raises:
        ConfigError: The argument is no [`Architecture`], or the type is registered already.

    Run [`verify_architecture`] on a small model of the family afterwards: it finds a wrong entry.
    """
    if not isinstance(architecture, Architecture):
        raise ConfigError(f"register_architecture takes an Architecture, got {type(architecture).__name__}.")
    for name in [model_type] if isinstance(model_type, str) else model_type:
        if name in _ARCHITECTURES and not exist_ok:
            raise ConfigError(f"model_type {name!r} is registered already. Pass exist_ok=True to replace its entry.")
        _ARCHITECTURES[name] = architecture


def known_model_types() -> list[str]:
    """The registered values of `config.model_type`, sorted."""
    return sorted(_ARCHITECTURES)


def get_architecture(model_type: str) -> Architecture:
    """The entry of a family.

    Raises:
        UnsupportedModelError: No such entry.
    """
    try:
        return _ARCHITECTURES[model_type]
    except KeyError:
        raise UnsupportedModelError(
            unknown(
                "model_type",
                model_type,
                _ARCHITECTURES,
                "To add a family, describe its layers with `hf_prune.register_architecture(model_type, "
                "Architecture(...))` and prove the entry with `hf_prune.verify_architecture(model)`.",
            )
        ) from None
