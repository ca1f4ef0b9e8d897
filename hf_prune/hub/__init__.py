"""Everything that writes checkpoints."""

from .saving import save_pretrained

__all__ = ["save_pretrained"]
