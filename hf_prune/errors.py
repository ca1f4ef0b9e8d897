"""The exceptions of hf_prune.

Every one of them is raised before a weight changes, unless its message says otherwise.

PruningError
├── UnsupportedModelError (TypeError)   the model can't be pruned as it is: unknown, wrapped, quantised or offloaded
├── ConfigError (ValueError)            an option is out of range, unknown, or matches nothing
│   └── InfeasibleBudgetError           the budget lies below what the units in play can reach
├── MaskError (ValueError)              a mask is malformed or belongs to another model
├── CalibrationError (ValueError)       the data are empty, too small, all padding, or give NaN or Inf
├── LayoutError (ValueError)            the recorded shapes of a checkpoint are malformed or don't fit its model
└── SaveError (OSError)                 a checkpoint could not be written, or did not reload to the same function
"""

import difflib
import math
from collections.abc import Iterable


class PruningError(Exception):
    """Base of all errors that hf_prune raises on purpose."""


class UnsupportedModelError(PruningError, TypeError):
    """The model can't be pruned as it is."""


class ConfigError(PruningError, ValueError):
    """An option is out of range, unknown, or matches nothing."""


class InfeasibleBudgetError(ConfigError):
    """The budget lies below what the units in play can reach; the message names the nearest feasible value."""


class MaskError(PruningError, ValueError):
    """A mask is malformed or belongs to another model."""


class CalibrationError(PruningError, ValueError):
    """The calibration data are empty, too small, all padding, or give NaN or Inf."""


class LayoutError(PruningError, ValueError):
    """The recorded shapes of a checkpoint are malformed or don't fit its model."""


class SaveError(PruningError, OSError):
    """A checkpoint could not be written, or did not reload to the same function."""


def check_whole(least: int, /, **numbers: object) -> None:
    """Raise unless all numbers are whole and at least `least`.

    Args:
        least (`int`): The least that is legal.
        numbers: What to check, by the names that the message uses. A bool or a float is no whole number.

    Raises:
        ConfigError: One is not; it is named as the argument.
    """
    for name, number in numbers.items():
        if type(number) is not int or number < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {number!r}.")


def check_positive(**numbers: object) -> None:
    """Raise unless all numbers are positive and finite.

    Args:
        numbers: What to check, by the names that the message uses. A bool is no number.

    Raises:
        ConfigError: One is not; it is named as the argument.
    """
    for name, number in numbers.items():
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < math.inf:
            raise ConfigError(f"{name} must be a positive number, got {number!r}.")


def unknown(what: str, given: object, known: Iterable[str], then: str = "") -> str:
    """Message for a name that is not among the known ones, with the closest match.

    Args:
        what (`str`): What it is a name of: `"metric in budget"`.
        given: The name, or what was given for one.
        known (iterable of `str`): The legal names; the message sorts them.
        then (`str`, *optional*): What the message ends with, such as what to do.

    Returns:
        `str`: `"Unknown metric in budget 'mac'. Did you mean 'macs'? Known: latency, macs, memory, params."`
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {what} {given!r}.{hint} Known: {', '.join(names)}.{' ' + then if then else ''}"
