"""Who computes what at which timestep, call by call (paper section 3.3 and its stride denoising).

k is the 0-based call of one stream in one run, W the warm-up, N the segments, S the stride, T the calls of the run.

* k < W: synchronous.
* k >= W, S = 1: every rank runs its segment once on x[k], t[k].
* k >= W, S > 1: calls come in batches of S that begin where k = 1 (mod S). At the first call of a batch ranks 0..N-1 run their
  segments on x[k] with the timestep of the batch's last call and keep their values for the next batch; rank N + j runs the last
  segment on x[k] with t[k + j] and keeps nothing. The result of call k + j is rank N + j's, that of the batch's last call rank
  N - 1's: the later calls of a batch compute nothing. Timesteps past the end of the run are clamped to its last.
* A call whose batch began before W (S > 1 and W - 1 not a multiple of S) repeats the result of call W - 1.
* time_shift: asynchronous calls use the timestep before.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .errors import ScheduleError
from .plan import Plan


class Kind(Enum):
    """What happens in a call."""

    SYNCHRONOUS = "synchronous"
    ASYNCHRONOUS = "asynchronous"
    PREFETCHED = "prefetched"  # computed by an earlier call of the batch
    REPEATED = "repeated"  # the result of the last synchronous call once more


@dataclass(frozen=True)
class Call:
    """One call of one stream.

    Attributes:
        index: k.
        kind: what happens.
        targets: per rank, the index of the call that it computes for; empty where nothing is computed.
        shift: a rank uses the timestep of its target, or with 1 that of the call before.
        results: rank -> index of the call that its output is the result of.
    """

    index: int
    kind: Kind
    targets: tuple[int, ...] = ()
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


def call_at(plan: Plan, k: int, total: int | None) -> Call:
    """The call k of a run of ``total`` calls (may be unknown, ``None``, if the stride is 1).

    Raises:
        ScheduleError: stride > 1 without a schedule, or more calls than it has.
    """
    ranks, last = plan.world_size, plan.segments - 1
    if plan.stride > 1 and total is None:
        raise ScheduleError(f"stride={plan.stride} needs the whole schedule: call begin(timesteps) before the first call")
    if plan.stride > 1 and k >= total:
        raise ScheduleError(f"call {k + 1} of a run that was begun with {total} timesteps: call begin(timesteps) for a new run")
    if k < plan.warmup:
        return Call(k, Kind.SYNCHRONOUS, (k,) * ranks, ((last, k),))
    shift = int(plan.time_shift)
    if plan.stride == 1:
        return Call(k, Kind.ASYNCHRONOUS, (k,) * ranks, ((last, k),), shift)
    begin = k - (k - 1) % plan.stride
    if begin < plan.warmup:
        return Call(k, Kind.REPEATED)
    if begin < k:
        return Call(k, Kind.PREFETCHED)
    serves = [plan.stride - 1] * plan.segments + list(range(plan.stride - 1))  # offset of the call that each rank computes for
    results = tuple((rank, k + serves[rank]) for rank in range(last, ranks) if k + serves[rank] < total)
    return Call(k, Kind.ASYNCHRONOUS, tuple(min(k + s, total - 1) for s in serves), results, shift)
