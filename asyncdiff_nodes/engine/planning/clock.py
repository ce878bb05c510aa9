"""How long a run takes on given devices and links: a discrete-event model of the engine, without tensors or processes.

It follows the same schedule (:func:`~.schedule.call_at`, :func:`~.schedule.calls_ahead`) by the rules of :mod:`.split`,
:mod:`.stub` and :mod:`.transport`:

* A rank takes its messages in order, and begins with the next one when it is done, however late.
* It goes through the model's blocks in execution order. Its own take their time. At another's, whose value it reads, it waits: in
  a synchronous call for this call's value, in an asynchronous one until no more than the newest is still on its way.
* A value leaves as soon as it is made and does not hold its rank up; but no rank begins a call before what it sent in the call
  before the last is through.
* In a synchronous call it does so for one micro-batch after the other; the last segment's result is there after the last of them.
* A link carries one value at a time, in the order in which they were made, and none before its receiver has begun the call.
* The caller waits for the result of its call alone, and not at all for one that came with a batch.

Each rank, each link and the caller is a generator. It yields the name of an event that it needs and is sent the time of it; the
order in which generators are run does not matter, since each of them only ever adds up times and takes the later of two.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass

from asyncdiff_nodes.engine.errors import PlanError

from .plan import Placement, Plan
from .schedule import Call, Kind, call_at, calls_ahead

Process = Generator[Hashable, float, None]  # yields events, is sent their times


def _check(name: str, values: Sequence[float], count: int, zero: bool = False) -> None:
    if len(values) != count or not all(0 < value < float("inf") or (zero and value == 0) for value in values):
        raise PlanError(f"{name}: give {count} {'numbers from 0 on' if zero else 'positive numbers'}, not {list(values)}")


@dataclass(frozen=True)
class Link:
    """Between any two ranks.

    Attributes:
        latency: seconds until the first byte is there; the link is free again before that.
        bandwidth: bytes per second.
    """

    latency: float = 0.0
    bandwidth: float = float("inf")

    def __post_init__(self) -> None:
        _check("latency", [self.latency], 1, zero=True)
        if not self.bandwidth > 0:
            raise PlanError(f"bandwidth={self.bandwidth}: give a positive number of bytes per second")


@dataclass(frozen=True)
class Costs:
    """Seconds of everything in a call, on a device of speed 1.

    Attributes:
        blocks: of each block, in execution order, for the batch that one rank computes.
        glue: of what every rank computes besides its blocks.
        link: between ranks.
        round_trip: from a result, on its rank, to the ranks' start with the next call, if the caller does nothing between.
        caller: what the caller does between two calls, such as the sampler's step.
    """

    blocks: tuple[float, ...]
    glue: float = 0.0
    link: Link = Link()
    round_trip: float = 0.0
    caller: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        _check("blocks", self.blocks, len(self.blocks), zero=True)
        for name in ("glue", "round_trip", "caller"):
            _check(name, [getattr(self, name)], 1, zero=True)

    @property
    def unrouted(self) -> float:
        """Of one call of the whole model on one device."""
        return sum(self.blocks) + self.glue


@dataclass(frozen=True)
class CallTimes:
    """One call, as the caller sees it, in seconds from the beginning of the run.

    Attributes:
        index: of the call in the run.
        start: when it was made.
        result: when its result was there.
    """

    index: int
    kind: Kind
    start: float
    result: float


@dataclass(frozen=True)
class RankTimes:
    """One rank over a run.

    Attributes:
        busy: seconds spent computing.
        waiting: seconds spent waiting, in a call, for values of other ranks and for its own to be taken.
        end: when it was done, in seconds from the beginning of the run.
    """

    rank: int
    busy: float
    waiting: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A run of one stream."""

    calls: tuple[CallTimes, ...]
    ranks: tuple[RankTimes, ...]

    @property
    def seconds(self) -> float:
        """Of the whole run, up to its last result."""
        return self.calls[-1].result

    def pace(self, first: int, last: int) -> float:
        """Seconds per call from the result of call ``first`` to that of call ``last``."""
        return (self.calls[last].result - self.calls[first].result) / (last - first)


def simulate(placement: Placement, plan: Plan, calls: int, costs: Costs, speeds: Sequence[float] | None = None) -> Timeline:
    """A run of ``calls`` calls of one stream, whose timesteps are known and whose inputs can be foreseen.

    Of one branch, and so of all that are alike: costs are those of its part of the batch.

    Args:
        placement: of the group's blocks.
        plan: of the run; as for ``WorkerGroup.begin``, it may differ from the placement's in warm-up, cool-down, time shift and
            micro-batches, and be smaller in stride and forecast. Micro-batches are taken to cost their part of the whole.
        speeds: of each of the branch's devices, relative to the one that ``costs`` are for; all 1 if None.

    Raises:
        PlanError: no call, or costs or speeds of another number of blocks or ranks.
    """
    ranks = placement.plan.branch_size
    if calls < 1:
        raise PlanError(f"calls={calls}: a run has at least one")
    _check("blocks", costs.blocks, len(placement), zero=True)
    speeds = [1.0] * ranks if speeds is None else list(speeds)
    _check("speeds", speeds, ranks)
    return _Clock(placement, plan, calls, costs, speeds).run()


def step_seconds(placement: Placement, costs: Costs, speeds: Sequence[float] | None = None) -> float:
    """Seconds per asynchronous step of a run without end; see :func:`simulate`."""
    plan = placement.plan
    begin = plan.warmup + -(plan.warmup - 1) % plan.stride  # where the first batch does
    # a rank that is a little slower than the others holds them up when it has fallen a whole call behind, and no sooner
    settled = begin + 120 * plan.stride
    end = settled + 8 * plan.stride
    return simulate(placement, plan, end + 1 + plan.cooldown, costs, speeds).pace(settled, end)


class _Clock:
    """One simulation. Its events, with n the number of a call among those that ranks compute in, those ahead included:

    ("message", n) the caller made it, ("begun", n, rank), ("made", n, m, block, rank) the value of micro-batch m is ready to be
    sent, ("there", n, m, block, rank) it has arrived, ("through", n, link) all of the call's values have crossed, ("result", k)
    of the caller's call k.
    """

    def __init__(self, placement: Placement, plan: Plan, calls: int, costs: Costs, speeds: Sequence[float]) -> None:
        self._placement, self._plan, self._costs, self._speeds = placement, plan, costs, speeds
        self._calls = [call_at(plan, k, calls) for k in range(calls)]
        # what each call has the ranks do
        self._parts = [[p for p in (call, *calls_ahead(plan, call.index, calls)) if p.computes] for call in self._calls]
        self._all_parts = [part for parts in self._parts for part in parts]
        self._micro = [self._microbatches(part) for part in self._all_parts]
        self._sources = [self._sources_of(rank) for rank in range(len(speeds))]
        self._sinks = {block for sources in self._sources for block in sources}
        self._links = sorted({(s, rank) for rank, sources in enumerate(self._sources) for s in sources.values()})
        self._times: dict[Hashable, float] = {}
        self._blocked: dict[Hashable, list[Process]] = {}
        self._ready: deque[tuple[Process, float | None]] = deque()
        self._seen: list[CallTimes] = []
        self._worked: list[RankTimes] = []

    def run(self) -> Timeline:
        processes = [
            self._caller(),
            *map(self._rank, range(len(self._speeds))),
            *(self._link(sender, receiver) for sender, receiver in self._links),
        ]
        self._ready.extend((process, None) for process in processes)
        while self._ready:
            process, time = self._ready.popleft()
            try:
                event = process.send(time)
            except StopIteration:
                continue
            if event in self._times:
                self._ready.append((process, self._times[event]))
            else:
                self._blocked.setdefault(event, []).append(process)
        assert not self._blocked, f"nothing will ever bring about {list(self._blocked)}"
        return Timeline(tuple(self._seen), tuple(sorted(self._worked, key=lambda rank: rank.rank)))

    def _happens(self, event: Hashable, time: float) -> None:
        self._times[event] = time
        self._ready.extend((process, time) for process in self._blocked.pop(event, ()))

    def _caller(self) -> Process:
        now, part = 0.0, 0
        for call, parts in zip(self._calls, self._parts, strict=True):
            start = now
            for _ in parts:
                self._happens(("message", part), now + self._costs.round_trip)
                part += 1
            if call.kind is not Kind.REPEATED:
                now = max(now, (yield "result", call.index))
            self._seen.append(CallTimes(call.index, call.kind, start, now))
            now += self._costs.caller

    def _rank(self, rank: int) -> Process:
        placement, speed = self._placement, self._speeds[rank]
        own = set(placement.owned(placement.plan.segment_of_rank(rank)))
        sources = self._sources[rank]
        coming: dict[int, deque[int]] = {block: deque() for block in sources}  # the calls in which each value was sent
        now = busy = waiting = 0.0
        for n, part in enumerate(self._all_parts):
            now = begin = max(now, (yield "message", n))
            for link in self._links:
                if link[0] == rank and n >= 2 and self._works(self._all_parts[n - 2], rank):
                    now = max(now, (yield "through", n - 2, link))
            self._happens(("begun", n, rank), now)
            for block, sender in sources.items():
                if self._works(part, sender):
                    coming[block].append(n)
            works, before = self._works(part, rank), busy
            leave = 0 if works and part.kind is not Kind.ASYNCHRONOUS else 1
            for micro in range(self._micro[n] if works else 1):
                unit = 1 / speed / self._micro[n]  # of what the whole batch costs
                if works:
                    now, busy = now + self._costs.glue * unit, busy + self._costs.glue * unit
                for block, seconds in enumerate(self._costs.blocks):
                    if block in own and works:
                        now, busy = now + seconds * unit, busy + seconds * unit
                        if block in self._sinks:
                            self._happens(("made", n, micro, block, rank), now)
                    elif block in coming:
                        while len(coming[block]) > leave:
                            call = coming[block].popleft()
                            for m in [micro] if call == n else range(self._micro[call]):
                                now = max(now, (yield "there", call, m, block, rank))
                        if leave == 0 and micro + 1 < self._micro[n]:
                            coming[block].append(n)  # the next micro-batch is still to come
            waiting += now - begin - (busy - before)
            for sender, index in part.results:
                if sender == rank:
                    self._happens(("result", index), now)
        self._worked.append(RankTimes(rank, busy, waiting, now))

    def _link(self, sender: int, receiver: int) -> Process:
        free = 0.0
        placement, link = self._placement, self._costs.link
        carried = [block for block, source in self._sources[receiver].items() if source == sender]
        for n, part in enumerate(self._all_parts):
            if not self._works(part, sender):
                continue
            whole = part.kind is Kind.SYNCHRONOUS
            for micro, block in itertools.product(range(self._micro[n]), carried):
                size = placement.graph.blocks[block].output_bytes if whole else placement.crossing_bytes(block)
                made = yield "made", n, micro, block, sender
                begun = yield "begun", n, receiver
                free = max(free, made, begun) + size / self._micro[n] / link.bandwidth
                self._happens(("there", n, micro, block, receiver), free + link.latency)
            self._happens(("through", n, (sender, receiver)), free)

    def _microbatches(self, part: Call) -> int:
        return self._plan.microbatches if part.kind is Kind.SYNCHRONOUS and self._placement.pipelines else 1

    def _works(self, part: Call, rank: int) -> bool:
        return part.works(rank, self._plan.segments)

    def _sources_of(self, rank: int) -> dict[int, int]:
        """Block that ``rank`` reads of another -> that other rank, in execution order."""
        placement = self._placement
        return {block: placement.segments[block] for block in placement.incoming(placement.plan.segment_of_rank(rank))}
