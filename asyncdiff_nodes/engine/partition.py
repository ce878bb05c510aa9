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

    def __init__(self, graph: BlockGraph) -> None:
        self.count = len(graph.blocks)
        # every block costs something, so that a zero-MAC norm cannot be split off for free
        macs = [max(1, block.macs) for block in graph.blocks]
        self._sums = [0, *accumulate(macs * 2)]
        consumers: dict[int, set[int]] = {}
        for producer, consumer in graph.edges:
            consumers.setdefault(producer, set()).add(consumer)
        self._flows = [(p, graph.blocks[p].output_bytes, sorted(c)) for p, c in consumers.items()]
        self._received: dict[tuple[int, int], int] = {}

    def cost(self, start: int, end: int) -> int:
        """MACs of blocks ``start`` up to ``end``; ``end`` may run past the last block, round the circle."""
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
    """Smallest possible time of the slowest segment, in MACs per unit of speed, to one part in a million."""
    low, high = arcs.cost(0, arcs.count) / sum(speeds), arcs.cost(0, arcs.count) / min(speeds)
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if any(_fits(arcs, speeds, middle, first) for first in range(arcs.count)):
            high = middle
        else:
            low = middle
    return high


def _fits(arcs: Arcs, speeds: Sequence[float], limit: float, first: int) -> bool:
    """Whether segments as long as the limit allows, from block ``first``, reach all round the circle."""
    here, end = first, first + arcs.count
    for segment, speed in enumerate(speeds):
        left = len(speeds) - segment - 1  # segments after this one, each needs a block
        # only the last segment may wrap: each of those after this one begins at a block of its own
        stop = end if left == 0 else arcs.count - left
        reach = here
        while reach < stop and arcs.cost(here, reach + 1) <= limit * speed:
            reach += 1
        if reach == here:
            return False
        here = reach
    return here == end


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
