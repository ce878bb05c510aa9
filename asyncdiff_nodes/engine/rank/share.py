"""One rank's share of a model: which blocks it owns, and what it exchanges with other ranks."""

from __future__ import annotations

from dataclasses import dataclass

from asyncdiff_nodes.engine.planning.graph import Hidden


@dataclass(frozen=True)
class Share:
    """What one rank owns and exchanges. Blocks are named; sequences are in execution order.

    Attributes:
        first: the first rank of its branch; the others below are counted from there.
        sources: block of another segment that this rank reads -> the rank that sends it.
        sinks: own block -> the ranks that read it.
        hidden: as in :class:`~.placement.Placement`.
        bands: how many ranks of the branch compute each call together.
    """

    rank: int
    first: int
    segment: int
    blocks: tuple[str, ...]
    owned: frozenset[str]
    sources: dict[str, int]
    sinks: dict[str, tuple[int, ...]]
    hidden: Hidden | None = None
    bands: int = 1

    @property
    def partners(self) -> range:
        """The ranks that compute each call together with this one, itself included."""
        return range(self.first, self.first + self.bands)
