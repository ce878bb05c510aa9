"""Players of a run: the caller, the ranks, and the links between them, as processes of a loop of events.

Their rules are those of :mod:`asyncdiff_nodes.engine.rank`; see :mod:`.clock`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .events import EventLoop, Process
from .placement import Placement
from .plan import Plan
from .run_times import CallTimes, Costs, RankTimes, Timeline
from .schedule import Call, Kind, call_at, calls_ahead, in_bands


@dataclass(frozen=True)
class _MessageSent:
    """The caller has made a job, and the ranks know of it."""

    job: int


@dataclass(frozen=True)
class _JobBegun:
    """A rank has begun a job."""

    job: int
    rank: int


@dataclass(frozen=True)
class _JobDone:
    """A rank has computed a job."""

    job: int
    rank: int


@dataclass(frozen=True)
class _ValueMade:
    """A block's value, for one micro-batch of a job, is ready to be sent by a rank."""

    job: int
    micro: int
    block: int
    rank: int


@dataclass(frozen=True)
class _ValueThere:
    """Such a value has arrived at a rank."""

    job: int
    micro: int
    block: int
    rank: int


@dataclass(frozen=True)
class _AllThrough:
    """All values of a job that a link carries have crossed."""

    job: int
    sender: int
    receiver: int


@dataclass(frozen=True)
class _ResultThere:
    """The result of one of the caller's calls is there."""

    call: int


@dataclass(frozen=True)
class _Job:
    """What ranks compute together: one of the caller's calls, or one ahead.

    Attributes:
        number: among all jobs of a run.
        call: as of the schedule.
        micro: how many micro-batches it has.
        banded: all ranks compute it together.
    """

    number: int
    call: Call
    micro: int
    banded: bool


class RunPlayer:
    """One run: what the caller, the ranks and the links between them have to do, and when it happened.

    Attributes:
        calls: the caller's, with the jobs of each.
        jobs: of all calls.
        sources: of each rank, block that it reads of another -> that other rank, in execution order.
        sinks: blocks that any rank reads of another.
        links: pairs (sender, receiver) of ranks.
    """

    def __init__(self, placement: Placement, plan: Plan, calls: int, costs: Costs, speeds: Sequence[float]) -> None:
        self.placement, self.plan, self.costs, self.speeds = placement, plan, costs, speeds
        self.loop = EventLoop()
        self.jobs: list[_Job] = []
        self.calls = [(call, self._jobs_of(call, calls)) for call in (call_at(plan, k, calls) for k in range(calls))]
        self.sources = [self._sources_of(rank) for rank in range(len(speeds))]
        self.sinks = {block for sources in self.sources for block in sources}
        self.links = sorted({(sender, rank) for rank, sources in enumerate(self.sources) for sender in sources.values()})

    def timeline(self) -> Timeline:
        """Play it through."""
        caller, ranks = _Caller(self), [_Rank(self, rank) for rank in range(len(self.speeds))]
        links = (_link(self, sender, receiver) for sender, receiver in self.links)
        self.loop.run([caller.process(), *(rank.process() for rank in ranks), *links])
        return Timeline(tuple(caller.seen), tuple(rank.times() for rank in ranks))

    def computes(self, job: _Job, rank: int) -> bool:
        """Whether a rank computes in a job, or only listens."""
        return job.banded or job.call.works(rank, self.plan.segments)

    def _jobs_of(self, call: Call, calls: int) -> list[_Job]:
        """Add the jobs that a call of the caller's makes."""
        pipelined = self.plan.microbatches if self.placement.pipelines else 1
        made = []
        for each in (call, *calls_ahead(self.plan, call.index, calls)):
            if each.computes:
                banded = in_bands(self.plan, each, calls)
                micro = pipelined if each.kind is Kind.SYNCHRONOUS and not banded else 1
                made.append(_Job(len(self.jobs), each, micro, banded))
                self.jobs.append(made[-1])
        return made

    def _sources_of(self, rank: int) -> dict[int, int]:
        placement = self.placement
        return {block: placement.segments[block] for block in placement.incoming(placement.plan.segment_of_rank(rank))}


class _Caller:
    """The caller of a run.

    Attributes:
        seen: its calls so far.
    """

    def __init__(self, run: RunPlayer) -> None:
        self.seen: list[CallTimes] = []
        self._run = run

    def process(self) -> Process:
        """Make one call after the other."""
        run, now = self._run, 0.0
        for call, jobs in run.calls:
            start = now
            for job in jobs:
                run.loop.happens(_MessageSent(job.number), now + run.costs.round_trip)
            if call.kind is not Kind.REPEATED:
                now = max(now, (yield _ResultThere(call.index)))
            self.seen.append(CallTimes(call.index, call.kind, start, now))
            now += run.costs.caller


class _Rank:
    """One rank of a run."""

    def __init__(self, run: RunPlayer, rank: int) -> None:
        self._run, self._rank = run, rank
        self._own = set(run.placement.owned(run.placement.plan.segment_of_rank(rank)))
        self._receivers = [receiver for sender, receiver in run.links if sender == rank]
        # of each block that it reads of another, the jobs whose values it has not waited for yet, oldest first
        self._coming: dict[int, deque[int]] = {block: deque() for block in run.sources[rank]}
        self._now = self._busy = self._waiting = 0.0

    def times(self) -> RankTimes:
        """Sum up, at the end."""
        return RankTimes(self._rank, self._busy, self._waiting, self._now)

    def process(self) -> Process:
        """Do one job after the other."""
        for job in self._run.jobs:
            self._now = begin = max(self._now, (yield _MessageSent(job.number)))
            busy = self._busy
            yield from self._begin(job)
            if job.banded:
                for other in range(len(self._run.speeds)):
                    self._now = max(self._now, (yield _JobBegun(job.number, other)))
                self._compute(self._run.costs.bands)
            else:
                yield from self._pass_through(job)
            self._waiting += self._now - begin - (self._busy - busy)
            self._run.loop.happens(_JobDone(job.number, self._rank), self._now)
            for sender, call in job.call.results:
                if sender == self._rank:
                    self._run.loop.happens(_ResultThere(call), self._now)

    def _begin(self, job: _Job) -> Process:
        """Wait until the values that were sent in the job before the last are through; from now on those of this one may come."""
        run, rank = self._run, self._rank
        if job.number >= 2 and run.computes(run.jobs[job.number - 2], rank):
            for receiver in self._receivers:
                self._now = max(self._now, (yield _AllThrough(job.number - 2, rank, receiver)))
        run.loop.happens(_JobBegun(job.number, rank), self._now)
        for block, sender in run.sources[rank].items():
            if run.computes(job, sender) and not job.banded:
                self._coming[block].append(job.number)

    def _pass_through(self, job: _Job) -> Process:
        """Go through the model's blocks, once for each micro-batch; or only take the values that others send."""
        run, rank = self._run, self._rank
        computes = run.computes(job, rank)
        leave = 0 if computes and job.call.kind is not Kind.ASYNCHRONOUS else 1  # values that may still be on their way
        unit = 1 / run.speeds[rank] / job.micro  # of what the whole batch costs
        for micro in range(job.micro if computes else 1):
            if computes:
                self._compute(run.costs.glue * unit)
            for block, seconds in enumerate(run.costs.blocks):
                if block in self._own and computes:
                    self._compute(seconds * unit)
                    if block in run.sinks:
                        run.loop.happens(_ValueMade(job.number, micro, block, rank), self._now)
                elif block in self._coming:
                    yield from self._take(job, micro, block, leave)

    def _compute(self, seconds: float) -> None:
        self._now, self._busy = self._now + seconds, self._busy + seconds

    def _take(self, job: _Job, micro: int, block: int, leave: int) -> Process:
        """Wait for a block's values, oldest first, until at most ``leave`` are still on their way.

        Of this job's value only micro-batch ``micro`` is waited for: in a synchronous job the next ones are still to come.
        """
        coming = self._coming[block]
        while len(coming) > leave:
            sent = coming.popleft()
            for each in [micro] if sent == job.number else range(self._run.jobs[sent].micro):
                self._now = max(self._now, (yield _ValueThere(sent, each, block, self._rank)))
        if leave == 0 and micro + 1 < job.micro:
            coming.append(job.number)


def _link(run: RunPlayer, sender: int, receiver: int) -> Process:
    """Carry one value at a time, in the order in which they are made; see :mod:`.clock` for when that begins."""
    free = 0.0  # from when on
    link, happens = run.costs.link, run.loop.happens
    carried = [block for block, source in run.sources[receiver].items() if source == sender]
    for job in run.jobs:
        if not run.computes(job, sender):
            continue
        for micro, block in itertools.product(range(job.micro), () if job.banded else carried):
            size = _size_of(run.placement, block, whole=job.call.kind is Kind.SYNCHRONOUS)
            made = yield _ValueMade(job.number, micro, block, sender)
            begun = yield _JobBegun(job.number, receiver)
            if link.direct and job.call.kind is Kind.ASYNCHRONOUS:
                begun = max((yield _JobDone(job.number, sender)), (yield _JobDone(job.number, receiver)))
            free = max(free, made, begun) + size / job.micro / link.bandwidth
            happens(_ValueThere(job.number, micro, block, receiver), free + link.latency)
        happens(_AllThrough(job.number, sender, receiver), free)


def _size_of(placement: Placement, block: int, whole: bool) -> int:
    """Bytes in which a block's output crosses: the whole of it in synchronous calls, else as it may be compressed."""
    return placement.graph.blocks[block].output_bytes if whole else placement.crossing_bytes(block)
