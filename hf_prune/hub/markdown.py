"""Foreign words in Markdown: they come out as they are, and can't become markup, HTML or the end of a block."""

import html
import re
import unicodedata
from typing import Any


def line(value: Any) -> str:
    """Plain words on one line."""
    return " ".join(_printable(value).split())


def text(value: Any) -> str:
    """One line of words, also in the cell of a table."""
    return html.escape(re.sub(r"([\\`*_{}\[\]|~$#!])", r"\\\1", line(value)), quote=False)


def code(value: Any) -> str:
    """What stands between the backticks of a span of code."""
    return line(value).replace("`", "'")


def block(value: Any, language: str = "") -> str:
    """A fenced block of code, with a fence that is longer than any in it.

    Args:
        value: The code; its string is taken.
        language (`str`, *optional*): What stands behind the fence.
    """
    source = _printable(value)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", source)), default=0))
    return f"{fence}{language}\n{source}\n{fence}"


def _printable(value: Any) -> str:
    """Without characters that nobody sees, or that turn the direction of writing."""
    return "".join(c for c in str(value) if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
