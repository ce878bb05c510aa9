"""Values of other people's nodes: numbers of any library as Python's own, and whatever it is in a few words."""

from __future__ import annotations

import operator
import reprlib
from typing import Any, SupportsFloat, SupportsIndex

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = 60


def number(value: Any) -> float | None:
    """``value`` as a float, such as that of NumPy's numbers and of tensors with one element; None if it is no number."""
    if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat | SupportsIndex):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # several numbers, none, or one that is too large
        return None


def whole(value: Any) -> int | None:
    """``value`` as an int, of a float without a fraction, too; None if it is no whole number."""
    try:
        return int(operator.index(value))
    except (TypeError, ValueError, RuntimeError):
        found = number(value)
        return int(found) if found is not None and found.is_integer() else None


def shown(value: Any) -> str:
    """``repr(value)`` for a message: one line, and not a long one."""
    try:
        return " ".join(map(str.strip, _SHORT.repr(value).splitlines()))
    except ValueError:  # whole numbers of thousands of digits
        return f"<{type(value).__name__}>"
