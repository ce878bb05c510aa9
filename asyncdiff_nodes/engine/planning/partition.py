"""The partitioner: where to cut the circle of blocks.

A segment is an arc of the circle. Where segments work ahead, the circle is open: the first segment begins with the first block,
wherever the first cut, and another segment that reads blocks before that cut computes them, and what they are made of, again.

Time comes first: the slowest segment is within :data:`TIME_TOLERANCE` of the best possible. Among these cuts the one that sends
the fewest bytes wins, then the one whose result depends on the current input, then the fastest. All three are sums or
maxima over segments, so dynamic programming over the circle finds the exact optimum. With fresh skips, as many of the largest
skip values as :data:`FRESH_SLACK` allows come before the first cut, where whoever reads them computes them itself; that is
decided first. What a transformer's hidden states are made of is taken for such a skip; even without fresh skips it comes before
the first cut if that takes as good as no time. No segment has more weights than its device has room for, where any cuts allow
that.

In an asynchronous call a segment computes while the values for its next one arrive: it takes as long as its blocks do, or, over
slow links, as long as all that it receives does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from .arcs import Arcs

TIME_TOLERANCE = 0.025
FRESH_SLACK = 0.35  # how much slower than need be the slowest segment may be for fresh skips


def best_starts(arcs: Arcs, speeds: Sequence[float], copies_of_last: int, fresh: bool) -> tuple[int, ...] | None:
    """Find the cuts for segments of relative speed ``speeds``, the last one on ``copies_of_last`` devices.

    Args:
        fresh: whether to make skips fresh.

    Returns:
        None where no cuts leave every device room for its weights.

    Six blocks in a chain, the first of which costs as much as three others. On two equal devices the second segment begins with
    block 2, and with block 4 if the first device is three times as fast; block 0 is the first segment's, which works ahead:

    >>> from asyncdiff_nodes.engine.planning.graph import Block, BlockGraph
    >>> blocks = tuple(Block(f"b{i}", (), None, macs=1, weight_bytes=0) for i in range(6))
    >>> chain = BlockGraph(blocks, frozenset({(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)}), 0, 0)
    >>> arcs = Arcs(chain, costs=[3, 1, 1, 1, 1, 1], ahead=True)
    >>> best_starts(arcs, [1, 1], 1, fresh=False), best_starts(arcs, [3, 1], 1, fresh=False)
    ((1, 2), (1, 4))
    """
    times, bound = _fastest(arcs, speeds, FRESH_SLACK if fresh else TIME_TOLERANCE)
    if not times:
        return None
    if fresh:
        most = max(map(arcs.fresh, times))
        times = {first: time for first, time in times.items() if arcs.fresh(first) == most}
    limit = min(min(times.values()) * (1 + TIME_TOLERANCE), bound)
    best: tuple[tuple[int, bool, float], tuple[int, ...]] | None = None
    for first in times:
        cuts = _fewest_bytes(_Segments(arcs, speeds, first), limit, copies_of_last)
        if cuts is not None:
            candidate = ((cuts.sent, arcs.stale(first), cuts.slowest), cuts.starts)
            best = candidate if best is None else min(best, candidate)
    assert best is not None  # the placement that set the limit is always found
    return best[1]


def _fastest(arcs: Arcs, speeds: Sequence[float], slack: float) -> tuple[dict[int, float], float]:
    """Find for each first cut the smallest possible time of the slowest segment, in cost per unit of speed.

    Returns:
        Those times that are within ``slack`` of the best, and the time that is just beyond.
    """
    times: dict[int, float] = {}
    bound = float("inf")
    for first in range(arcs.count - len(speeds) + 1):
        times[first] = _slowest(_Segments(arcs, speeds, first), bound)
        bound = min(bound, times[first] * (1 + slack) * (1 + 1e-9))
    return {first: time for first, time in times.items() if time < bound}, bound


class _Segments:
    """What each segment of a placement can be, if the first cut is at block ``first``: how long it takes, what it receives.

    A segment is given by its number and the block ``here`` that it is cut off at; where segments work ahead, number 0 begins
    with the first block all the same. It can end before any later block that leaves one for each segment after it.

    >>> from asyncdiff_nodes.engine.planning.graph import Block, BlockGraph
    >>> blocks = tuple(Block(f"b{i}", (), None, macs=1, weight_bytes=0) for i in range(4))
    >>> chain = BlockGraph(blocks, frozenset({(0, 1), (1, 2), (2, 3)}), 0, 0)
    >>> wrapped = _Segments(Arcs(chain, [1, 2, 4, 8], ahead=False), speeds=[1, 1], first=1)
    >>> list(wrapped.times(0, here=1))  # cut before block 2, or 3
    [(2, 2.0), (3, 6.0)]
    >>> list(wrapped.times_of_last())  # block 0 alone, with block 3, with block 2
    [(4, 1.0), (3, 9.0), (2, 13.0)]
    >>> ahead = _Segments(Arcs(chain, [1, 2, 4, 8], ahead=True), speeds=[1, 1], first=1)
    >>> list(ahead.times(0, here=1)), list(ahead.times_of_last())
    ([(2, 3.0), (3, 7.0)], [(3, 8.0), (2, 12.0)])
    """

    def __init__(self, arcs: Arcs, speeds: Sequence[float], first: int) -> None:
        self.first = first
        self.last = len(speeds) - 1
        self._arcs, self._speeds = arcs, speeds
        self._again = arcs.again(first)
        self._end = arcs.count if arcs.ahead else first + arcs.count  # of the last segment

    def _begin(self, segment: int, here: int) -> int:
        return 0 if self._arcs.ahead and segment == 0 else here

    def times(self, segment: int, here: int) -> Iterator[tuple[int, float]]:
        """Yield each cut that a segment but the last can end before, and how long it takes; as far as its device has room."""
        arcs, speed = self._arcs, self._speeds[segment]
        begin, again = self._begin(segment, here), 0
        # only the last segment may wrap: each of those after this one begins at a block of its own
        for cut in range(here + 1, arcs.count - self.last + segment + 1):
            again |= self._again[cut - 1] if begin else 0
            if not arcs.fits(segment, begin, cut, again):
                return
            yield cut, arcs.cost(begin, cut, again) / speed

    def received(self, segment: int, here: int) -> Iterator[int]:
        """Yield the bytes that it receives, for the same cuts as :meth:`times`, and more."""
        begin = self._begin(segment, here)
        return islice(self._arcs.received(range(begin, self._arcs.count), self.first), here - begin, None)

    def transfers(self, segment: int, here: int) -> Iterator[float]:
        """Yield how long that takes."""
        begin = self._begin(segment, here)
        return islice(self._arcs.transfer(range(begin, self._arcs.count), self.first), here - begin, None)

    @property
    def _backwards(self) -> range:
        """Blocks of the last segment, from its last one to the earliest that it can begin with."""
        return range(self._end - 1, self.first, -1)

    def times_of_last(self) -> Iterator[tuple[int, float]]:
        """Yield each block that the last segment can begin with, the latest first, and how long it takes; see :meth:`times`."""
        arcs, again = self._arcs, 0
        for here in self._backwards:
            again |= self._again[here] if here < arcs.count else 0
            if not arcs.fits(self.last, here, self._end, again):
                return
            yield here, arcs.cost(here, self._end, again) / self._speeds[self.last]

    def received_of_last(self) -> Iterator[int]:
        """Yield the bytes that it receives, for the same blocks as :meth:`times_of_last`, and more."""
        return self._arcs.received(self._backwards, self.first)

    def transfers_of_last(self) -> Iterator[float]:
        """Yield how long that takes."""
        return self._arcs.transfer(self._backwards, self.first)


def _slowest(segments: _Segments, bound: float) -> float:
    """Find the smallest possible time of the slowest segment; infinite where it is not below ``bound``.

    The blocks of :class:`_Segments`'s example are cut before block 3, which leaves 1 + 2 + 4 and 8:

    >>> from asyncdiff_nodes.engine.planning.graph import Block, BlockGraph
    >>> blocks = tuple(Block(f"b{i}", (), None, macs=1, weight_bytes=0) for i in range(4))
    >>> chain = BlockGraph(blocks, frozenset({(0, 1), (1, 2), (2, 3)}), 0, 0)
    >>> segments = _Segments(Arcs(chain, [1, 2, 4, 8], ahead=True), speeds=[1, 1], first=1)
    >>> _slowest(segments, float("inf")), _slowest(segments, 8.0)
    (8.0, inf)
    """
    times = {segments.first: 0.0}  # where the next segment begins -> time of the slowest one before it
    for segment in range(segments.last):
        reached: dict[int, float] = {}
        for here, slowest in times.items():
            ways = zip(segments.times(segment, here), segments.transfers(segment, here), strict=False)
            for (cut, time), transfer in ways:
                if time >= bound:
                    break
                time = max(slowest, time, transfer)  # which may be less again for a later cut
                if time < bound:
                    reached[cut] = min(reached.get(cut, bound), time)
        times = reached
    ends = zip(segments.times_of_last(), segments.transfers_of_last(), strict=False)
    whole = (max(times[here], time, transfer) for (here, time), transfer in ends if here in times)
    return min((time for time in whole if time < bound), default=float("inf"))


class _Cuts(NamedTuple):  # compared field by field: the fewest bytes first
    """Some cuts: bytes that the segments before the last one receive, time of the slowest, and where each begins."""

    sent: int
    slowest: float
    starts: tuple[int, ...]


def _fewest_bytes(segments: _Segments, limit: float, copies_of_last: int) -> _Cuts | None:
    """Find the cuts of which all devices together receive the fewest bytes, and none takes longer than ``limit``.

    The blocks of :class:`_Segments`'s example; the first one hands 10 bytes to the next, the others 20. If the slowest segment
    may take long, the cut is where few bytes cross:

    >>> import torch
    >>> from asyncdiff_nodes.engine.planning.graph import Block, BlockGraph
    >>> from asyncdiff_nodes.engine.tensors import TensorMeta
    >>> layout = [TensorMeta((size,), (1,), torch.uint8) for size in (10, 20, 20, 20)]
    >>> blocks = tuple(Block(f"b{i}", (layout[i],), None, macs=1, weight_bytes=0) for i in range(4))
    >>> chain = BlockGraph(blocks, frozenset({(0, 1), (1, 2), (2, 3)}), 0, 0)
    >>> segments = _Segments(Arcs(chain, [1, 2, 4, 8], ahead=True), speeds=[1, 1], first=0)
    >>> _fewest_bytes(segments, 9.0, 1), _fewest_bytes(segments, 14.0, 1)
    (_Cuts(sent=20, slowest=8.0, starts=(0, 3)), _Cuts(sent=10, slowest=14.0, starts=(0, 1)))
    """
    best = {segments.first: _Cuts(0, 0.0, (segments.first,))}  # where the next segment begins -> the best cuts so far
    for segment in range(segments.last):
        reached: dict[int, _Cuts] = {}
        for here, (sent, slowest, starts) in best.items():
            ways = zip(
                segments.times(segment, here), segments.received(segment, here), segments.transfers(segment, here), strict=False
            )
            for (cut, time), received, transfer in ways:
                if time > limit:
                    break
                cuts = _Cuts(sent + received, max(slowest, time, transfer), (*starts, cut))
                if cuts.slowest <= limit and (cut not in reached or cuts < reached[cut]):
                    reached[cut] = cuts
        best = reached
    whole = []
    ends = zip(segments.times_of_last(), segments.received_of_last(), segments.transfers_of_last(), strict=False)
    for (here, time), received, transfer in ends:
        if time > limit:
            break
        if here in best and transfer <= limit:
            sent, slowest, starts = best[here]
            whole.append(_Cuts(sent + copies_of_last * received, max(slowest, time, transfer), starts))
    return min(whole, default=None)
