"""The partitioner: where to cut the circle of blocks.

A segment is an arc of the circle. Where segments work ahead, the circle is open: the first segment begins with the first block,
wherever the first cut, and another segment that reads blocks before that cut computes them, and what they are made of, again.

Time comes first: the slowest segment is within :data:`TIME_TOLERANCE` of the best possible. Among these cuts the one that sends
the fewest bytes wins, then the one whose result depends on the current input (wrapped), then the fastest. All three are sums or
maxima over segments, so dynamic programming over the circle finds the exact optimum. With fresh skips, as many of the largest
skip values as :data:`FRESH_SLACK` allows come before the first cut, where whoever reads them computes them itself; that is
decided first. What a transformer's hidden states are made of is taken for such a skip; even without fresh skips it comes before
the first cut if that takes as good as no time. No segment has more weights than its device has room for, where any cuts allow
that.

In an asynchronous call a segment computes while the values for its next one arrive: it takes as long as its blocks do, or, over
slow links, as long as all that it receives does.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import accumulate, islice, repeat

from .graph import BlockGraph

TIME_TOLERANCE = 0.025
FRESH_SLACK = 0.35  # how much slower than need be the slowest segment may be for fresh skips


class Arcs:
    """Cost of every possible segment, that is of every arc of the circle of blocks, and what it must receive.

    Args:
        ahead: whether segments work ahead.
        room: bytes of weights that each segment's device can hold; any number if None.
        per_byte: time, in the unit of ``costs``, that a byte takes from one segment to another.
    """

    def __init__(
        self,
        graph: BlockGraph,
        costs: Sequence[float],
        ahead: bool,
        room: Sequence[float] | None = None,
        per_byte: float = 0.0,
    ) -> None:
        self.count = len(graph.blocks)
        self.ahead = ahead
        self._per_byte = per_byte
        self._sums = [0, *accumulate([*costs, *costs])]
        weights = [block.weight_bytes for block in graph.blocks]
        self._weights = [0, *accumulate([*weights, *weights])]
        self._room = room and [each - graph.glue_bytes for each in room]
        self._edges = graph.edges
        # of each block the bits of all that it is made of, its own among them
        self._made_of = [_bits(graph.made_of([block])) for block in range(self.count)]
        self._hidden = graph.hidden and (max(graph.hidden.made_of, default=-1), _bits(graph.hidden.made_of))
        self._known: dict[int, tuple[float, int]] = {}
        consumers: dict[int, set[int]] = {}
        for producer, consumer in graph.edges:
            consumers.setdefault(producer, set()).add(consumer)
        self._sizes = [block.output_bytes for block in graph.blocks]
        self._producers = [[p for p, c in graph.edges if c == block] for block in range(self.count)]
        # of the path that begins with the first block: not of a ControlNet's, which would have to be computed again as well
        skips = [p for p, readers in consumers.items() if max(readers) > p + 1 and self._made_of[p] & 1]
        self._largest = [p for p in skips if self._sizes[p] == max(self._sizes[q] for q in skips)]

    def fresh(self, first: int) -> int:
        """How many of the largest skip values, which carry the finest detail, come from blocks before ``first``.

        What a transformer's hidden states are made of counts as one.
        """
        return sum(producer < first for producer in self._largest) + bool(self._hidden and self._hidden[0] < first)

    def again(self, first: int) -> list[int]:
        """For each block, those before the first cut at ``first`` that its segment must compute again: a bit for each."""
        found = [0] * self.count
        if self.ahead:
            for producer, consumer in self._edges:
                if producer < first <= consumer:
                    found[consumer] |= self._made_of[producer]
            if self._hidden and self._hidden[0] < first:
                found[first:] = [bits | self._hidden[1] for bits in found[first:]]
        return found

    def cost(self, start: int, end: int, again: int) -> float:
        """Cost of blocks ``start`` up to ``end``, which may run past the last one, round the circle, and of those ``again``."""
        return self._sums[end] - self._sums[start] + self._of(again)[0]

    def fits(self, segment: int, start: int, end: int, again: int) -> bool:
        """Whether the device of ``segment`` has room for the weights of these blocks, named as for :meth:`cost`."""
        held = self._weights[end] - self._weights[start] + self._of(again)[1]
        return self._room is None or held <= self._room[segment]

    def _of(self, bits: int) -> tuple[float, int]:
        """Cost and bytes of the weights of these blocks."""
        if bits not in self._known:
            blocks = [block for block in range(self.count) if bits >> block & 1]
            self._known[bits] = tuple(
                sum(sums[block + 1] - sums[block] for block in blocks) for sums in (self._sums, self._weights)
            )
        return self._known[bits]

    def received(self, blocks: Iterable[int], first: int) -> Iterator[int]:
        """Bytes that a segment must receive: each outside producer's output once, if anything inside reads it.

        For the first one of ``blocks``, the first two, and so on; they may be counted past the last one, round the circle.
        """
        inside: set[int] = set()
        outside: set[int] = set()  # producers
        total = 0
        for block in blocks:
            block %= self.count
            inside.add(block)
            if block in outside:
                outside.remove(block)
                total -= self._sizes[block]
            for producer in self._producers[block]:
                if producer not in inside and producer not in outside and not (self.ahead and producer < first):
                    outside.add(producer)
                    total += self._sizes[producer]
            yield total

    def transfer(self, blocks: Iterable[int], first: int) -> Iterator[float]:
        """Time that the same takes."""
        if not self._per_byte:
            return repeat(0.0)
        return (self._per_byte * received for received in self.received(blocks, first))


def _bits(blocks: Iterable[int]) -> int:
    return sum(1 << block for block in blocks)


def best_starts(arcs: Arcs, speeds: Sequence[float], copies_of_last: int, fresh: bool) -> tuple[int, ...] | None:
    """The cuts for segments of relative speed ``speeds``, the last one on ``copies_of_last`` devices.

    Args:
        fresh: whether to make skips fresh.

    Returns:
        None where no cuts leave every device room for its weights.
    """
    times = _fastest(arcs, speeds, FRESH_SLACK if fresh else TIME_TOLERANCE)
    if not times:
        return None
    if fresh:
        most = max(map(arcs.fresh, times))
        times = {first: time for first, time in times.items() if arcs.fresh(first) == most}
    limit = min(times.values()) * (1 + TIME_TOLERANCE)
    best: tuple[tuple[int, bool, float], tuple[int, ...]] | None = None
    for first in times:
        found = _fewest_bytes(arcs, speeds, limit, first, copies_of_last)
        if found is not None:
            sent, slowest, starts = found
            candidate = ((sent, first == 0, slowest), starts)
            best = candidate if best is None else min(best, candidate)
    assert best is not None  # the placement that set the limit is always found
    return best[1]


def _fastest(arcs: Arcs, speeds: Sequence[float], slack: float) -> dict[int, float]:
    """First cut -> smallest possible time of the slowest segment, in cost per unit of speed.

    Only first cuts that are within ``slack`` of the best.
    """
    times: dict[int, float] = {}
    bound = float("inf")
    for first in range(arcs.count - len(speeds) + 1):
        times[first] = _slowest(arcs, speeds, first, bound)
        bound = min(bound, times[first] * (1 + slack) * (1 + 1e-9))
    return {first: time for first, time in times.items() if time < bound}


def _slowest(arcs: Arcs, speeds: Sequence[float], first: int, bound: float) -> float:
    """The same with the first cut at block ``first``; infinite where it is not below ``bound``."""
    again = arcs.again(first)
    times = {first: 0.0}  # next cut -> time of the slowest segment before it
    for segment, speed in enumerate(speeds[:-1], 1):
        reached: dict[int, float] = {}
        for here, slowest in times.items():
            begin, more = (0 if arcs.ahead and segment == 1 else here), 0
            transfers = islice(arcs.transfer(range(begin, arcs.count), first), here - begin, None)
            # only the last segment may wrap: each of those after this one begins at a block of its own
            for cut in range(here + 1, arcs.count - len(speeds) + segment + 1):
                more |= again[cut - 1] if begin else 0
                time = arcs.cost(begin, cut, more) / speed
                if time >= bound or not arcs.fits(segment - 1, begin, cut, more):
                    break
                time = max(slowest, time, next(transfers))  # which may be less again for a later cut
                if time < bound:
                    reached[cut] = min(reached.get(cut, bound), time)
        times = reached
    backwards = _backwards(arcs, first)
    ends = [
        max(times[here], _time_of_last(arcs, speeds, first, here, again), transfer)
        for here, transfer in zip(backwards, arcs.transfer(backwards, first), strict=False)
        if here in times
    ]
    return min((time for time in ends if time < bound), default=float("inf"))


def _backwards(arcs: Arcs, first: int) -> range:
    """Blocks of the last segment, from its last one to the earliest that it can begin with."""
    return range((arcs.count if arcs.ahead else first + arcs.count) - 1, first, -1)


def _time_of_last(arcs: Arcs, speeds: Sequence[float], first: int, here: int, again: Sequence[int]) -> float:
    """Of the last segment if it begins at block ``here``; infinite where its device has no room for it."""
    end, more, last = arcs.count if arcs.ahead else first + arcs.count, reduce(operator.or_, again[here:], 0), len(speeds) - 1
    return arcs.cost(here, end, more) / speeds[last] if arcs.fits(last, here, end, more) else float("inf")


def _fewest_bytes(
    arcs: Arcs, speeds: Sequence[float], limit: float, first: int, copies_of_last: int
) -> tuple[int, float, tuple[int, ...]] | None:
    """Best (bytes, slowest time, starts) with the first cut at block ``first``, within the time limit."""
    states: dict[int, tuple[int, float, tuple[int, ...]]] = {first: (0, 0.0, (first,))}
    again, last = arcs.again(first), len(speeds) - 1
    for segment, speed in enumerate(speeds[:last]):
        reached: dict[int, tuple[int, float, tuple[int, ...]]] = {}
        for here, (sent, slowest, starts) in states.items():
            begin, more = (0 if arcs.ahead and segment == 0 else here), 0
            received, transfers = (
                islice(each(range(begin, arcs.count), first), here - begin, None) for each in (arcs.received, arcs.transfer)
            )
            for cut in range(here + 1, arcs.count):
                more |= again[cut - 1] if begin else 0
                time = arcs.cost(begin, cut, more) / speed
                if time > limit or not arcs.fits(segment, begin, cut, more):
                    break
                state = (sent + next(received), max(slowest, time, next(transfers)), (*starts, cut))
                if state[1] > limit:
                    continue
                if cut not in reached or state < reached[cut]:
                    reached[cut] = state
        states = reached
    final = []
    backwards = _backwards(arcs, first)
    received, transfers = arcs.received(backwards, first), arcs.transfer(backwards, first)
    for here, bytes_in, transfer in zip(backwards, received, transfers, strict=False):
        time = _time_of_last(arcs, speeds, first, here, again)
        if time > limit:
            break
        if here in states and transfer <= limit:
            sent, slowest, starts = states[here]
            final.append((sent + copies_of_last * bytes_in, max(slowest, time, transfer), starts))
    return min(final, default=None)
