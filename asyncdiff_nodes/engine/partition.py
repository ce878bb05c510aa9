"""The partitioner: where to cut the circle of blocks.

Time comes first: the slowest segment is within :data:`TIME_TOLERANCE` of the best possible. Among these cuts the one that
sends the fewest bytes wins, then the one whose result depends on the current input (wrapped), then the fastest. All three
are sums or maxima over segments, so dynamic programming over the circle finds the exact optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from .graph import BlockGraph

TIME_TOLERANCE = 0.025


class Arcs:
    """Cost of every possible segment, that is of every arc of the circle of blocks."""

    def __init__(self, graph: BlockGraph, costs: Sequence[float]) -> None:
        self.count = len(graph.blocks)
        self._sums = [0, *accumulate([*costs, *costs])]
        consumers: dict[int, set[int]] = {}
        for producer, consumer in graph.edges:
            consumers.setdefault(producer, set()).add(consumer)
        self._flows = [(p, graph.blocks[p].output_bytes, sorted(c)) for p, c in consumers.items()]
        self._received: dict[tuple[int, int], int] = {}

    def cost(self, start: int, end: int) -> float:
        """Cost of blocks ``start`` up to ``end``; ``end`` may run past the last block, round the circle."""
        return self._sums[end] - self._sums[start]

    def received(self, start: int, end: int) -> int:
        """Bytes that this segment must receive: each outside producer's output once, if anything inside reads it."""
        if (start, end) not in self._received:

            def inside(block: int) -> bool:
                return start <= block < end or start <= block + self.count < end

            self._received[start, end] = sum(
                size for producer, size, readers in self._flows if not inside(producer) and any(map(inside, readers))
            )
        return self._received[start, end]


def best_starts(arcs: Arcs, speeds: Sequence[float], copies_of_last: int = 1) -> tuple[int, ...]:
    """First block of each segment for segments of relative speed ``speeds``, the last one on ``copies_of_last`` devices."""
    limit = _fastest(arcs, speeds) * (1 + TIME_TOLERANCE)
    best: tuple[tuple[int, bool, float], tuple[int, ...]] | None = None
    for first in range(arcs.count):
        found = _fewest_bytes(arcs, speeds, limit, first, copies_of_last)
        if found is not None:
            sent, slowest, starts = found
            candidate = ((sent, first == 0, slowest), starts)
            best = candidate if best is None else min(best, candidate)
    assert best is not None  # the placement that set the limit is always found
    return best[1]


def _fastest(arcs: Arcs, speeds: Sequence[float]) -> float:
    """Smallest possible time of the slowest segment, in cost per unit of speed."""
    best = float("inf")
    for first in range(arcs.count - len(speeds) + 1):
        best = min(best, _slowest(arcs, speeds, first, best))
    return best


def _slowest(arcs: Arcs, speeds: Sequence[float], first: int, bound: float) -> float:
    """The same with the first segment beginning at block ``first``; infinite where it is not below ``bound``."""
    *others, last = speeds
    times = {first: 0.0}  # next cut -> time of the slowest segment before it
    for segment, speed in enumerate(others, 1):
        reached: dict[int, float] = {}
        for here, slowest in times.items():
            # only the last segment may wrap: each of those after this one begins at a block of its own
            for cut in range(here + 1, arcs.count - len(speeds) + segment + 1):
                time = arcs.cost(here, cut) / speed
                if time >= bound:
                    break
                reached[cut] = min(reached.get(cut, bound), max(slowest, time))
        times = reached
    ends = [max(slowest, arcs.cost(here, first + arcs.count) / last) for here, slowest in times.items()]
    return min((time for time in ends if time < bound), default=float("inf"))


def _fewest_bytes(
    arcs: Arcs, speeds: Sequence[float], limit: float, first: int, copies_of_last: int
) -> tuple[int, float, tuple[int, ...]] | None:
    """Best (bytes, slowest time, starts) with the first segment beginning at block ``first``, within the time limit."""
    states: dict[int, tuple[int, float, tuple[int, ...]]] = {first: (0, 0.0, (first,))}
    last = len(speeds) - 1
    for speed in speeds[:last]:
        reached: dict[int, tuple[int, float, tuple[int, ...]]] = {}
        for here, (sent, slowest, starts) in states.items():
            for cut in range(here + 1, arcs.count):
                time = arcs.cost(here, cut) / speed
                if time > limit:
                    break
                state = (sent + arcs.received(here, cut), max(slowest, time), (*starts, cut))
                if cut not in reached or state < reached[cut]:
                    reached[cut] = state
        states = reached
    final = []
    for here, (sent, slowest, starts) in states.items():
        end = first + arcs.count
        time = arcs.cost(here, end) / speeds[last]
        if time <= limit:
            final.append((sent + copies_of_last * arcs.received(here, end), max(slowest, time), starts))
    return min(final, default=None)
