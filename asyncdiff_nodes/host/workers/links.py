"""Direct links between GPUs: where they have failed they are not tried again, and every report says so."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations

from asyncdiff_nodes.host.page.settings import setting

log = logging.getLogger(__name__)

_refusals: dict[frozenset[str], str] = {}  # by the names of the two devices


def staged(devices: Sequence[str]) -> Collection[frozenset[str]]:
    """Name the pairs of devices that are to exchange values through the host's memory."""
    if setting("Links") == "host memory":
        return {frozenset(pair) for pair in combinations(devices, 2)}
    return set(_refusals)


def remember(refusals: Mapping[frozenset[str], str]) -> None:
    """Take what :attr:`~asyncdiff_nodes.engine.WorkerGroup.refusals` says."""
    for pair, why in refusals.items():
        log.warning("AsyncDiff: %s", _note(pair, why))
    _refusals.update(refusals)


def notes(devices: Sequence[str]) -> Iterator[str]:
    """Yield sentences for the report on a run with these devices."""
    if setting("Links") == "auto":
        yield from (_note(pair, why) for pair, why in _refusals.items() if pair <= set(devices))


def forget() -> None:
    """Have all of them tried again."""
    _refusals.clear()


def _note(pair: frozenset[str], why: str) -> str:
    return (
        f"{' and '.join(sorted(pair))} exchange values through the host's memory, which is slower: a direct link did not work "
        f"({why}). See Links between GPUs in docs/reliability.md"
    )
