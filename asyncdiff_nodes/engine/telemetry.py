"""Telemetry: what each rank did in each call, when, and how stale its inputs were. One record type for every reader."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from . import accelerator


@dataclass(frozen=True)
class CallRecord:
    """One computing call on one rank.

    Attributes:
        stream, call: the stream's key and the 0-based call in the run.
        rank, segment, synchronous: who, what, how.
        start, end: seconds on the :data:`clock` of the machine; as the caller gets it, of the caller's machine.
        compute, wait: seconds of it spent computing, and waiting for values of other ranks.
        waits: start and end of each of these waits.
        bytes_sent: payload bytes that this rank sent to other ranks.
        why: it is synchronous: "warm-up", "move" (the first after one), "cool-down", or "" where it is not.
        ahead: done for later calls, after this rank's part of the last synchronous call.
        banded: computed in bands, together with the other ranks of the branch.
        drift: producer block -> relative L2 change of its output since the value before, for values received.
        blocks: own block -> seconds that it took; empty in calls that were not asked for them, see :class:`~.course.Course`.
        not_finite: own blocks that made NaN or infinity of what was finite; empty in calls that were not asked for them.
    """

    stream: str
    call: int
    rank: int
    segment: int
    synchronous: bool
    start: float
    end: float
    compute: float
    wait: float
    bytes_sent: int
    waits: tuple[tuple[float, float], ...] = ()
    ahead: bool = False
    banded: bool = False
    why: str = ""
    drift: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()

    def shifted(self, seconds: float) -> CallRecord:
        """Return the same on a clock that is ahead of this record's by so many seconds."""
        waits = tuple((start + seconds, end + seconds) for start, end in self.waits)
        return replace(self, start=self.start + seconds, end=self.end + seconds, waits=waits)


@dataclass(frozen=True)
class CallSummary:
    """One call of one stream, on all ranks.

    Attributes:
        stream, call, synchronous, why: as in :class:`CallRecord`.
        drift: mean over all values that were received; None where nothing was received before, or at all.
    """

    stream: str
    call: int
    synchronous: bool
    why: str
    drift: float | None


@dataclass(frozen=True)
class RankReport:
    """One rank at the time of asking.

    Attributes:
        weights: name -> bytes of every parameter and buffer that it holds.
        replicated_bytes: how many of these bytes every rank holds (embeddings and other glue).
        records: its calls in the last run.
    """

    rank: int
    pid: int
    device: str
    segment: int
    weights: dict[str, int]
    replicated_bytes: int
    records: tuple[CallRecord, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights held."""
        return sum(self.weights.values())

    def having(self, records: Iterable[CallRecord]) -> RankReport:
        """Return this report with those of ``records`` that are of its rank."""
        return replace(self, records=tuple(record for record in records if record.rank == self.rank))


@dataclass(frozen=True)
class RunStats:
    """Telemetry of the last run of a group.

    Attributes:
        planned_bytes: bytes that the plan says all ranks send per asynchronous call, for the inputs of the last call; without
            compression, per computing call that is not in bands.
        planned_band_bytes: the same, per call in bands.
        ranks: one report per rank.
    """

    planned_bytes: int
    planned_band_bytes: int
    ranks: tuple[RankReport, ...]

    @property
    def records(self) -> list[CallRecord]:
        """All records, by call and rank."""
        records = (record for rank in self.ranks for record in rank.records)
        return sorted(records, key=lambda r: (r.call, r.stream, r.rank))

    @property
    def calls(self) -> list[CallSummary]:
        """The run call by call: which were synchronous, and why, and how much changed since the call before."""
        by_call: dict[tuple[int, str], list[CallRecord]] = {}
        for record in self.records:
            if not record.ahead:
                by_call.setdefault((record.call, record.stream), []).append(record)
        summaries = []
        for (call, stream), records in by_call.items():
            drifts = [value for record in records for value in record.drift.values()]
            drift = sum(drifts) / len(drifts) if drifts else None
            summaries.append(CallSummary(stream, call, records[0].synchronous, records[0].why, drift))
        return summaries

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that all ranks sent to each other in the run, counted by the transport."""
        return sum(record.bytes_sent for record in self.records)

    @property
    def bytes_per_call(self) -> float:
        """Payload of the run per computing call; see :func:`bytes_per_call`."""
        return bytes_per_call(self.records)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)


def bytes_per_call(records: Iterable[CallRecord]) -> float:
    """Payload that all ranks together sent to each other per computing call, without what was sent ahead in the warm-up."""
    sent, calls = 0, set()
    for record in records:
        if not record.ahead:
            sent += record.bytes_sent
            calls.add((record.stream, record.call))
    return sent / max(1, len(calls))


#: The machine's clock, in seconds: all of its processes share it. On Windows, time.monotonic jumps by 15.6 ms before Python 3.13.
clock = time.perf_counter
#: A point in time: on the machine's clock, or in a GPU's order of work.
Mark = float | accelerator.Event


class Stopwatch:
    """Time marks on the clock of the device that does the work; read only later, so that a GPU is never waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._origin: accelerator.Event | None = None
        self.restart()

    def restart(self) -> None:
        """Set the device's clock by the machine's; earlier marks are void. Waits for a GPU's queue."""
        if self._device.type != "cpu":  # from time to time: the driver counts in single precision from the origin on
            accelerator.synchronize(self._device)
            self._zero, self._origin = clock(), accelerator.event(self._device, timing=True)

    def reached(self, mark: Mark) -> bool:
        """Whether the device has come to ``mark``."""
        return isinstance(mark, float) or bool(mark.query())

    def mark(self) -> Mark:
        """Mark a point in time in the device's order of work."""
        return clock() if self._origin is None else accelerator.event(self._device, timing=True)

    def seconds(self, mark: Mark) -> float:
        """Tell when ``mark`` was reached; waits for it on a GPU."""
        if isinstance(mark, float):
            return mark
        assert self._origin is not None, "marks on a CPU are times"
        mark.synchronize()
        return self._zero + self._origin.elapsed_time(mark) / 1e3

    def between(self, start: Mark, end: Mark) -> float:
        """Count the seconds from mark ``start`` to mark ``end``; waits for both on a GPU."""
        return self.seconds(end) - self.seconds(start)
