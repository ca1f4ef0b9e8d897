"""Search spaces of sub-networks, and the order of units in them."""

from .base import SearchSpace
from .ordering import order_units
from .spaces import LargeSpace, LayerSpace, MediumSpace, SmallSpace, known_spaces, search_space

__all__ = [
    "LargeSpace",
    "LayerSpace",
    "MediumSpace",
    "SearchSpace",
    "SmallSpace",
    "known_spaces",
    "order_units",
    "search_space",
]
