"""Everything that writes checkpoints: to disk, and to the Hub."""

from .card import render_card, write_card
from .push import push_to_hub
from .saving import save_pretrained

__all__ = ["push_to_hub", "render_card", "save_pretrained", "write_card"]
