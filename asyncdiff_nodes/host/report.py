"""What is known about the last sampling: kept for the report node, and told to the page."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy_execution.utils import get_executing_context

from asyncdiff_nodes.engine import Placement, Plan, RunStats, WorkerGroup
from asyncdiff_nodes.engine.telemetry import CallRecord, RankReport

from .options import ALWAYS


@dataclass(frozen=True)
class RunRecord:
    """One finished sampling.

    Attributes:
        plan: None where the host computed everything itself.
        placement, stats: None there, too, and where the ranks were gone before they could report.
        notes: why something was not done as asked, in sentences.
    """

    notes: tuple[str, ...]
    plan: Plan | None = None
    placement: Placement | None = field(default=None, repr=False)
    stats: RunStats | None = field(default=None, repr=False)

    @classmethod
    def of(cls, group: WorkerGroup | None, plan: Plan | None, notes: Sequence[str]) -> RunRecord:
        """The record of the run that ``group`` (None: the host) has just finished."""
        if group is None:
            return cls(tuple(notes))
        return cls(tuple(notes), plan, group.placement, group.stats())

    @property
    def line(self) -> str:
        """One line for the node."""
        if self.stats is None:
            return ("" if self.plan else "ComfyUI sampled as usual: ") + "; ".join(self.notes)
        devices = ", ".join(rank.device for rank in self.stats.ranks)
        gain = f" · {self.speedup:.2f}x" if self.speedup else ""
        return f"{self.plan.segments} segments on {devices}{gain}" + "".join(f" · {note}" for note in self.notes)

    @property
    def step_seconds(self) -> float | None:
        """Median time of an asynchronous step; None if there was none."""
        calls = self._calls(synchronous=False)
        return statistics.median(calls) / self.plan.stride if calls else None

    @property
    def work_seconds(self) -> float | None:
        """Median compute time of all segments, one after the other: a step without AsyncDiff. None if it was not measured.

        Ranks that share a device slow each other down, so only their synchronous calls count, without the first (cold) one.
        """
        ranks = self.stats.ranks[: self.plan.segments]
        records = [[r for r in rank.records if r.synchronous and r.call > 0] for rank in ranks]
        if not all(records) and len({rank.device for rank in self.stats.ranks}) == len(self.stats.ranks):
            records = [rank.records for rank in ranks]
        return sum(statistics.median(r.compute for r in found) for found in records) if all(records) else None

    @property
    def speedup(self) -> float | None:
        """How many times faster an asynchronous step is than its segments one after the other; None if not measured."""
        return self.work_seconds / self.step_seconds if self.step_seconds and self.work_seconds else None

    def _calls(self, synchronous: bool) -> list[float]:
        """Seconds of each call, that of its slowest rank."""
        longest: dict[Any, float] = {}
        for record in self._computing():
            if record.synchronous is synchronous:
                key = record.stream, record.call
                longest[key] = max(longest.get(key, 0.0), record.end - record.start)
        return list(longest.values())

    def _computing(self) -> list[CallRecord]:
        """Without the replicas that only listened."""
        used = self.plan.world_size
        return [r for r in self.stats.records if r.rank < self.plan.segments or (r.rank < used and not r.synchronous)]

    def text(self) -> str:
        """The whole record in readable lines."""
        lines = [f"Note: {note}" for note in self.notes]
        if self.stats is None:
            return "\n".join([*([] if self.plan else ["AsyncDiff was not used: ComfyUI sampled as usual."]), *lines])
        plan, records = self.plan, self._computing()
        streams = {record.stream for record in records}
        calls = {(record.stream, record.call): record.synchronous for record in records}
        warmup = "every step synchronous" if plan.warmup >= ALWAYS else f"warm-up {plan.warmup}"
        stale = "forecast" if plan.forecast else "reuse"
        lines[:0] = [
            f"Plan: {plan.segments} segments, stride {plan.stride}, {warmup}, {stale}"
            + (", time shift" if plan.time_shift else ""),
            f"Calls: {len(calls)} on {len(streams)} stream(s), {sum(calls.values())} of them synchronous",
        ]
        if self.step_seconds:
            gain = f"; its segments one after the other {self.work_seconds:.3f} s: {self.speedup:.2f}x" if self.speedup else ""
            lines.append(f"Step: {self.step_seconds:.3f} s asynchronous{gain}")
        computed = max(1, len(calls))
        sent = self.stats.bytes_sent / computed
        lines.append(f"Sent between ranks: {_mib(sent)} per call; planned {_mib(self.stats.planned_bytes)}")
        lines += [self._rank_line(rank) for rank in self.stats.ranks]
        drifts = [value for record in records if not record.synchronous for value in record.drift.values()]
        if drifts:
            lines.append(
                f"Drift of what was sent, from call to call: median {statistics.median(drifts):.1%}, most {max(drifts):.1%}"
            )
        return "\n".join(lines)

    def _rank_line(self, rank: RankReport) -> str:
        names = [self.placement.graph.names[index] for index in self.placement.owned(rank.segment)]
        share = self.placement.shares[rank.segment]
        times = [record for record in self._computing() if record.rank == rank.rank]
        compute, wait = (statistics.median(getattr(r, kind) for r in times) if times else 0.0 for kind in ("compute", "wait"))
        return (
            f"Rank {rank.rank} on {rank.device}: segment {rank.segment + 1}, {len(names)} blocks from "
            f"{self.placement.cuts[rank.segment]} ({share:.0%} of the work), {_mib(rank.weight_bytes)} of weights, "
            f"compute {compute:.3f} s and wait {wait:.3f} s per call"
        )


_last: RunRecord | None = None


def last_run() -> RunRecord | None:
    """The last sampling of a model that AsyncDiff is attached to."""
    return _last


def publish(record: RunRecord) -> None:
    """Keep ``record`` as the last run, and show its line on the node that is executing."""
    global _last
    _last = record
    context = get_executing_context()
    # absent where the host's code runs without its server
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if context is not None and server is not None:
        server.send_progress_text(f"AsyncDiff: {record.line}", context.node_id)


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
