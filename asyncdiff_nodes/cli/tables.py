"""Where and how commands print their numbers."""

from __future__ import annotations

import sys

from rich.console import Console

MIB = 2**20


def console() -> Console:
    """For tables; wide enough for them where the output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120)


def number(value: float | None, digits: int) -> str:
    """``value`` with so many digits, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"
