"""Values from other people's nodes: numbers of any library as Python's own, and any value in a few words."""

from __future__ import annotations

import operator
import reprlib
from typing import Any, SupportsFloat, SupportsIndex

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = 60


def number(value: Any) -> float | None:
    """``value`` as a float, also from NumPy or a tensor with one element; None if it is not a number."""
    if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat | SupportsIndex):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # several numbers, none, or one that is too large
        return None


def whole(value: Any) -> int | None:
    """``value`` as an int, also from a float without a fraction; None if it is not a whole number."""
    try:
        return int(operator.index(value))
    except (TypeError, ValueError, RuntimeError):
        number_of = number(value)
        return int(number_of) if number_of is not None and number_of.is_integer() else None


def shown(value: Any) -> str:
    """``repr(value)`` for a message, as one short line."""
    try:
        return " ".join(map(str.strip, _SHORT.repr(value).splitlines()))
    except ValueError:  # whole numbers with thousands of digits
        return f"<{type(value).__name__}>"
