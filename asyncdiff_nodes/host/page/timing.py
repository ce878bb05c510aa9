"""Numbers about a run, finished or under way, from the records of its ranks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from asyncdiff_nodes.engine import Plan
from asyncdiff_nodes.engine.telemetry import CallRecord


@dataclass(frozen=True)
class Timing:
    """Times from ``records``; each is None as long as it was not measured.

    A step here is one call of the network for each of its streams. A sampler that makes two calls per step counts as two steps.

    Args:
        plan: the run's plan.
        devices: one per rank.
        work: the work of all segments together, in evaluations of the model; above 1 where several compute the same blocks.
    """

    plan: Plan
    devices: Sequence[str]
    records: Sequence[CallRecord]
    work: float

    @cached_property
    def computing(self) -> list[CallRecord]:
        """Records without replicas that only listened, and without calls made ahead in the warm-up."""
        used, segments = self.plan.branch_size, self.plan.segments
        return [
            r for r in self.records if not r.ahead and (r.banded or r.rank % self._size < (segments if r.synchronous else used))
        ]

    @property
    def _size(self) -> int:
        """Number of ranks in one branch of the group; it may be more than this run uses."""
        return len(self.devices) // self.plan.branches

    @cached_property
    def _ranks(self) -> list[int]:
        """One rank per segment, in the branches that compute."""
        branches = sorted({record.rank // self._size for record in self.records})
        return [branch * self._size + segment for branch in branches for segment in range(self.plan.segments)]

    @cached_property
    def calls(self) -> dict[tuple[str, int], bool]:
        """Stream and number of each call, and whether it was synchronous."""
        return {(record.stream, record.call): record.synchronous for record in self.computing}

    @property
    def streams_per_step(self) -> float:
        """Number of calls that make up a step."""
        return len(self.calls) / max(1, len({call for _, call in self.calls}))

    @property
    def ahead(self) -> list[CallRecord]:
        """Records of asynchronous calls."""
        return [record for record in self.computing if not record.synchronous and not record.banded]

    @cached_property
    def step_seconds(self) -> float | None:
        """Median time of an asynchronous step; of one in bands, where there is no other."""
        longest: dict[Any, float] = {}
        for record in self.ahead or (record for record in self.computing if record.banded and record.call > 0):
            key = record.stream, record.call
            longest[key] = max(longest.get(key, 0.0), record.end - record.start)
        return statistics.median(longest.values()) * self.streams_per_step / self.plan.stride if longest else None

    @property
    def last_step_seconds(self) -> float | None:
        """Time of the last step that all ranks have reported, synchronous or not."""
        finished = [max((r.call for r in self.records if r.rank == rank), default=-1) for rank in self._ranks]
        spans: dict[str, list[CallRecord]] = {}
        for record in self.computing:
            if record.call == min(finished):
                spans.setdefault(record.stream, []).append(record)
        if not spans:
            return None
        last = next(iter(spans.values()))
        if last[0].synchronous:
            return self.streams_per_step * (max(r.end for r in last) - min(r.start for r in last))
        return self.streams_per_step * max(r.end - r.start for r in last) / self.plan.stride

    @cached_property
    def sequential_seconds(self) -> float | None:
        """Median compute time of all segments, or bands, of all branches, one after the other: a step without AsyncDiff.

        Ranks that share a device slow each other down, so only their synchronous calls count, without the first (cold) one. In
        bands they do the work of the model together, and that of exchanging: so calls that are in bands count where there are
        no others.
        """
        apart, bands = len(set(self.devices)) == len(self.devices), dict[int, list[float]]()
        for record in self.computing:
            if record.banded and record.call > 0 and not (apart and self.ahead):
                bands.setdefault(record.rank, []).append(record.compute)
        if bands:
            return sum(map(statistics.median, bands.values())) * self.streams_per_step
        ranks = self._ranks
        alone = [record for record in self.computing if not record.banded]
        seconds = [[r.compute for r in alone if r.rank == rank and r.synchronous and r.call > 0] for rank in ranks]
        if not all(seconds) and apart:
            seconds = [[r.compute for r in alone if r.rank == rank] for rank in ranks]
        whole = sum(map(statistics.median, seconds)) if seconds and all(seconds) else 0.0
        return whole / self.work * self.streams_per_step or None

    @property
    def speedup(self) -> float | None:
        """How many times faster an asynchronous step is than its segments one after the other."""
        return self.sequential_seconds / self.step_seconds if self.step_seconds and self.sequential_seconds else None

    @property
    def speedup_so_far(self) -> float | None:
        """Speed-up of the whole run so far, warm-up included."""
        if not self.records or not self.sequential_seconds:
            return None
        elapsed = max(r.end for r in self.records) - min(r.start for r in self.records)
        steps = (max(call for _, call in self.calls) + 1) if self.calls else 0
        return self.sequential_seconds * steps / elapsed if elapsed > 0 else None
