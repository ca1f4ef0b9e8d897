"""Search spaces of sub-networks."""

from .spaces import LargeSpace, LayerSpace, MediumSpace, SearchSpace, SmallSpace, known_spaces, search_space

__all__ = [
    "LargeSpace",
    "LayerSpace",
    "MediumSpace",
    "SearchSpace",
    "SmallSpace",
    "known_spaces",
    "search_space",
]
