"""One line of a self-test's result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SEND = "a fault of ours or of the machine: please send it"


@dataclass(frozen=True)
class Finding:
    """What was seen, and what to think of it.

    Attributes:
        check, subject: what was looked at, and of what.
        value: what was seen.
        verdict: ``good``, ``slow`` or ``wrong``.
        cure: what to do; "" if nothing.
        numbers: what was measured, in seconds and bytes.
    """

    check: str
    subject: str
    value: str
    verdict: str
    cure: str = ""
    numbers: Mapping[str, float] | None = None
