"""Arcs of the circle of blocks: what a segment costs, weighs and receives, wherever it begins and ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, repeat

from .graph import BlockGraph


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
        """Count the largest skip values, which carry the finest detail, that come from blocks before ``first``.

        What a transformer's hidden states are made of counts as one.
        """
        return sum(producer < first for producer in self._largest) + bool(self._hidden and self._hidden[0] < first)

    def stale(self, first: int) -> bool:
        """Whether the result does not depend on the current input, if the first cut is at block ``first``."""
        return first == 0 and not (self.ahead and self._hidden and self._hidden[0] < first)

    def again(self, first: int) -> list[int]:
        """Find for each block those before the first cut at ``first`` that its segment must compute again: a bit for each."""
        again = [0] * self.count
        if self.ahead:
            for producer, consumer in self._edges:
                if producer < first <= consumer:
                    again[consumer] |= self._made_of[producer]
            if self._hidden and self._hidden[0] < first:
                again[first:] = [bits | self._hidden[1] for bits in again[first:]]
        return again

    def cost(self, start: int, end: int, again: int) -> float:
        """Sum up blocks ``start`` up to ``end``, which may run past the last one, round the circle, and those ``again``."""
        return self._sums[end] - self._sums[start] + self._total(again)[0]

    def fits(self, segment: int, start: int, end: int, again: int) -> bool:
        """Whether the device of ``segment`` has room for the weights of these blocks, named as for :meth:`cost`."""
        held = self._weights[end] - self._weights[start] + self._total(again)[1]
        return self._room is None or held <= self._room[segment]

    def _total(self, bits: int) -> tuple[float, int]:
        """Sum up cost and bytes of the weights of these blocks."""
        if bits not in self._known:
            blocks = [block for block in range(self.count) if bits >> block & 1]
            cost = sum(self._sums[block + 1] - self._sums[block] for block in blocks)
            self._known[bits] = cost, sum(self._weights[block + 1] - self._weights[block] for block in blocks)
        return self._known[bits]

    def received(self, blocks: Iterable[int], first: int) -> Iterator[int]:
        """Yield the bytes that a segment must receive: each outside producer's output once, if anything inside reads it.

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
        """Yield the time that the same takes."""
        if not self._per_byte:
            return repeat(0.0)
        return (self._per_byte * received for received in self.received(blocks, first))


def _bits(blocks: Iterable[int]) -> int:
    """Set a bit for each block.

    >>> bin(_bits([0, 3]))
    '0b1001'
    """
    return sum(1 << block for block in blocks)
