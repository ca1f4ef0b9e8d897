"""What a model family looks like: specs, the table of families, and the registry."""

from .registry import get_architecture, known_model_types, register_architecture
from .specs import Architecture, AttentionSpec, FeedForwardSpec, StackSpec

from . import families as families  # isort: skip  # fills the registry

__all__ = [
    "Architecture",
    "AttentionSpec",
    "FeedForwardSpec",
    "StackSpec",
    "get_architecture",
    "known_model_types",
    "register_architecture",
]
