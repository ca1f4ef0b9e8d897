"""Tables in Markdown, and the figures in them."""

import re
from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown: the first column to the left, the others to the right. Bars are escaped.

    Args:
        head (sequence of `str`): The cells of the head.
        rows (sequence of sequences of `str`): The cells of each line, as many as in the head.

    Returns:
        `str`: Lines without a newline at the end.
    """
    lines = [head, ["---", *("--:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |" for line in lines)


def si_scale(largest: float) -> tuple[str, float]:
    """SI prefix and its factor for a number: `("M", 1e6)` for 22.7 million."""
    return next(
        ((prefix, scale) for prefix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if largest >= scale), ("", 1.0)
    )


def quantities(values: Sequence[float], unit: str = "") -> list[str]:
    """The figures of a row as cells, with the prefix of the largest: `["4.00 MB", "0.30 MB"]`.

    Args:
        values (sequence of `float`): The figures.
        unit (`str`, *optional*, defaults to `""`): `"B"`; `"ms"`, which gets no prefix.

    Returns:
        `list[str]`: Two digits behind the point.
    """
    prefix, scale = si_scale(max(values)) if unit != "ms" else ("", 1.0)
    return [f"{value / scale:.2f} {prefix}{unit}".rstrip() for value in values]
