"""Schedule of a run: who computes what at which timestep, call by call (paper section 3.3 and its stride denoising).

k is the 0-based call of one stream in one run, W the warm-up, N the segments, S the stride, T the calls of the run.

* k < W, and k >= T - C where the schedule is known (C the cool-down): synchronous. Below, T is without the cool-down.
* k >= W, S = 1: every rank runs its segment once on x[k], t[k].
* k >= W, S > 1: calls come in batches of S that begin where k = 1 (mod S). At the first call of a batch ranks 0..N-1 run their
  segments on x[k] with the timestep of the batch's last call and keep their values for the next batch; rank N + j runs the last
  segment on x[k] with t[k + j] and keeps nothing. The result of call k + j is rank N + j's, that of the batch's last call rank
  N - 1's: the later calls of a batch compute nothing. Timesteps past the end of the run are clamped to its last.
* A call whose batch began before W (S > 1 and W - 1 not a multiple of S) repeats the result of call W - 1.
* time_shift: asynchronous calls use the timestep before.

Branches do all this side by side; ranks are counted within one of them. With one segment each, every call is asynchronous.

Working ahead (``forecast=1`` with a schedule) keeps this rhythm, but the ranks compute for other calls. Segment d < N - 1
computes, at the first call k of a batch, for the call k + (N - 1 - d) S, with the input that is expected there and that call's
timestep: when another segment comes to that call, the value is there and needs no guess. The last segment computes for each call
that it serves: k on x[k] itself, the others of the batch on the input expected there; all of them read what was computed for
call k. Calls past the end are clamped to the last. What the first asynchronous calls need is computed at the end of the warm-up:
a rank that is done with its part of call W - 1 goes on while the others are busy with theirs, see :func:`calls_ahead`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from asyncdiff_nodes.engine.errors import ScheduleError

from .plan import Plan


class Kind(Enum):
    """Kind of a call: what happens in it."""

    SYNCHRONOUS = "synchronous"
    ASYNCHRONOUS = "asynchronous"
    PREFETCHED = "prefetched"  # computed by an earlier call of the batch
    REPEATED = "repeated"  # the result of the last synchronous call once more
    AHEAD = "ahead"  # the first segments, for the first asynchronous calls; nobody waits for it


@dataclass(frozen=True)
class Call:
    """One call of one stream.

    Attributes:
        index: k.
        kind: what happens.
        targets: per rank, the index of the call that it computes for; ranks past its end compute nothing.
        reads: per rank, the index of the call whose values it wants of other segments; None for the latest, whatever they are.
        shift: a rank uses the timestep of its target, or with 1 that of the call before.
        results: rank -> index of the call that its output is the result of.
    """

    index: int
    kind: Kind
    targets: tuple[int, ...] = ()
    reads: tuple[int | None, ...] = ()
    results: tuple[tuple[int, int], ...] = ()
    shift: int = 0

    @property
    def timestep_indices(self) -> tuple[int, ...]:
        """Per rank, the index of the timestep that it uses."""
        return tuple(target - self.shift for target in self.targets)

    @property
    def computes(self) -> bool:
        """Whether any rank computes in this call."""
        return bool(self.targets)

    def works(self, rank: int, segments: int) -> bool:
        """Whether ``rank`` computes. Replicas of the last of ``segments`` only listen in synchronous calls, as do spare ranks."""
        return rank < (len(self.targets) if self.kind is Kind.ASYNCHRONOUS else min(len(self.targets), segments))


def call_at(plan: Plan, k: int, total: int | None) -> Call:
    """Plan call k of a run of ``total`` calls (may be unknown, ``None``, if the stride is 1).

    Raises:
        ScheduleError: stride > 1 without a schedule, or more calls than it has.
    """
    ranks, last = plan.branch_size, plan.segments - 1
    if plan.segments == 1:  # never behind
        return Call(k, Kind.ASYNCHRONOUS, (k,) * ranks, (k,) * ranks, ((0, k),))
    if plan.stride > 1 and total is None:
        raise ScheduleError(f"stride={plan.stride} needs the whole schedule: call begin(timesteps) before the first call")
    if total is not None and k >= total and (plan.stride > 1 or plan.forecast or plan.cooldown):
        raise ScheduleError(f"call {k + 1} of a run that was begun with {total} timesteps: call begin(timesteps) for a new run")
    here = (k,) * ranks
    end = 0 if total is None else _end(plan, total)
    if k < plan.warmup or (plan.cooldown and total is not None and k >= end):
        return Call(k, Kind.SYNCHRONOUS, here, here, ((last, k),))
    shift = int(plan.time_shift)
    latest = (None,) * ranks
    if total is None or (plan.stride == 1 and not plan.forecast):
        return Call(k, Kind.ASYNCHRONOUS, here, here if plan.forecast else latest, ((last, k),), shift)
    begin = k - (k - 1) % plan.stride
    if begin < plan.warmup:
        return Call(k, Kind.REPEATED)
    if begin < k:
        return Call(k, Kind.PREFETCHED)
    serves = [plan.stride - 1, *range(plan.stride - 1)]  # offset of the call that each rank of the last segment serves
    ahead = [(last - d) * plan.stride if plan.forecast else plan.stride - 1 for d in range(last)]
    targets = tuple(min(k + offset, end - 1) for offset in (*ahead, *serves))
    results = tuple((last + rank, k + offset) for rank, offset in enumerate(serves) if k + offset < end)
    reads = (*targets[:last], *(k,) * plan.stride) if plan.forecast else latest
    return Call(k, Kind.ASYNCHRONOUS, targets, reads, results, shift)


def calls_ahead(plan: Plan, k: int, total: int | None) -> tuple[Call, ...]:
    """Plan what follows call k, the last synchronous one: the first asynchronous calls find what was worked ahead for them.

    Each is synchronous but for its input: segments 0 to N - 2 - j compute for the j-th batch to come, one after the other.
    """
    if not plan.forecast or total is None or k != plan.warmup - 1:
        return ()
    first = k + 1 + -k % plan.stride  # where the first batch begins
    targets = range(first, _end(plan, total), plan.stride)[: plan.segments - 1]
    ranks = range(plan.segments - 1, 0, -1)
    return tuple(
        Call(k, Kind.AHEAD, (target,) * count, (target,) * count, shift=int(plan.time_shift))
        for target, count in zip(targets, ranks, strict=False)
    )


def in_bands(plan: Plan, call: Call, total: int | None) -> bool:
    """Whether all ranks of a branch compute ``call`` together.

    What the first asynchronous calls read is not there after such a call: it is, where it is worked ahead.
    """
    if plan.bands == 1 or plan.segments == 1:
        return plan.bands > 1
    last = call.index == plan.warmup - 1 and call.index + 1 != total
    return call.kind is Kind.SYNCHRONOUS and not (last and not calls_ahead(plan, call.index, total))


def _end(plan: Plan, total: int) -> int:
    """Find the call that the cool-down begins with; never before the end of the warm-up."""
    return max(plan.warmup, total - plan.cooldown)
