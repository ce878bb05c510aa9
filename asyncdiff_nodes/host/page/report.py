"""The report on the last sampling, for the report node and for the page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from comfy_execution.utils import get_executing_context

from asyncdiff_nodes.engine import Placement, Plan, RunStats, WorkerGroup
from asyncdiff_nodes.engine.telemetry import CallSummary, RankReport
from asyncdiff_nodes.host.choices import ALWAYS

from .prompt_server import prompt_server
from .timing import Timing


@dataclass(frozen=True)
class RunRecord:
    """One finished sampling.

    Attributes:
        plan: None where the host computed everything itself.
        placement, stats: also None there, and where the ranks ended before they could report.
        notes: sentences about what was not done as asked, and why.
        verified: how many calls the host computed as well, with the same result.
        found: about the blocks, where they were found automatically.
        choice: between bands and working ahead, and why.
    """

    notes: tuple[str, ...]
    plan: Plan | None = None
    placement: Placement | None = field(default=None, repr=False)
    stats: RunStats | None = field(default=None, repr=False)
    verified: int = 0
    found: str = ""
    choice: str = ""

    @classmethod
    def of(
        cls,
        group: WorkerGroup | None,
        plan: Plan | None,
        notes: Sequence[str],
        timeout: float,
        verified: int = 0,
        choice: str = "",
    ) -> RunRecord:
        """Make the record of the run that ``group`` (None: the host) has just finished. Waits at most ``timeout`` seconds."""
        if group is None:
            return cls(tuple(notes))
        found = group.family.found
        about = found and (
            f"found automatically: {len(group.placement)} parts with {found.share:.0%} of the work"
            + (", a path that depends on values of the inputs" if found.read_values else "")
        )
        return cls(tuple(notes), plan, group.placement, group.stats(timeout), verified, about or "", choice)

    @property
    def line(self) -> str:
        """The record in one line, for the node."""
        if self.stats is None:
            return ("" if self.plan else "ComfyUI sampled as usual: ") + "; ".join(map(_first_line, self.notes))
        timing = self.timing
        devices = ", ".join(timing.devices)
        gain = f" · {timing.speedup:.2f}x" if timing.speedup else ""
        return f"{_in_words(self.plan)} on {devices}{gain}" + "".join(f" · {_first_line(note)}" for note in self.notes)

    @property
    def timing(self) -> Timing | None:
        """The measured times; None where the host computed everything itself."""
        if self.stats is None:
            return None
        return Timing(self.plan, [rank.device for rank in self.stats.ranks], self.stats.records, sum(self.placement.shares))

    def text(self) -> str:
        """The whole record as text."""
        lines = [f"Note: {note}" for note in self.notes]
        if self.stats is None:
            return "\n".join([*([] if self.plan else ["AsyncDiff was not used: ComfyUI sampled as usual."]), *lines])
        plan, timing = self.plan, self.timing
        calls = self.stats.calls
        streams = {call.stream for call in calls}
        working_ahead = plan.segments > 1 and not _only_bands(plan)
        warmup = "every step synchronous" if plan.warmup >= ALWAYS else f"warm-up {plan.warmup}"
        warmup += " in bands" if plan.bands > 1 else ""
        stale = "working ahead" if plan.forecast else "plain reuse"
        how = f"stride {plan.stride}, {warmup}, {stale}" + (", time shift" if plan.time_shift else "")
        how += f", {plan.compression} between ranks" if plan.compression != "none" else ""
        lines[:0] = [
            f"Plan: {_in_words(plan)}, " + (how if working_ahead else "each with the whole network, so nothing is stale"),
            f"Calls: {len(calls)} on {len(streams)} stream(s)"
            + (f"; synchronous: {_synchronous(calls)}" if working_ahead else ""),
        ]
        if timing.step_seconds:
            whole = timing.sequential_seconds
            alone = "its segments one after the other take" if plan.bands == 1 else "one such device would take"
            gain = f"; {alone} {whole:.3f} s: {timing.speedup:.2f}x" if whole else ""
            lines.append(f"Step: {timing.step_seconds:.3f} s" + (" asynchronous" if timing.ahead else "") + gain)
        lines.append(f"Sent between ranks: {_mib(self.stats.bytes_per_call)} per call; planned {self._planned_bytes()}")
        if self.choice:
            lines.append(f"Chosen: {self.choice}")
        if self.found:
            lines.append(f"Blocks: {self.found}")
        if self.verified:
            lines.append(f"Verified: ComfyUI computed {self.verified} call(s) as well, with the same result")
        lines += [self._rank_line(rank, timing) for rank in self.stats.ranks]
        drifts: dict[int, list[float]] = {}
        for call in calls:
            if call.drift is not None:
                drifts.setdefault(call.call + 1, []).append(call.drift)
        if drifts:
            by_call = ", ".join(f"{number}: {statistics.mean(values):.0%}" for number, values in drifts.items())
            lines.append(f"Drift (change of the values that are sent since the call before): {by_call}")
        return "\n".join(lines)

    def _planned_bytes(self) -> str:
        """Bytes per call of each kind that there was."""
        stats, planned = self.stats, []
        if not all(record.banded for record in stats.records):
            planned.append(_mib(stats.planned_bytes) + (" per asynchronous call" if self.plan.compression != "none" else ""))
        if any(record.banded for record in stats.records):
            planned.append(f"{_mib(stats.planned_band_bytes)} per call in bands")
        return ", ".join(planned)

    def _rank_line(self, rank: RankReport, timing: Timing) -> str:
        what = part(self.plan, rank)
        if _only_bands(self.plan):
            what += f" of {self.plan.bands}"
        else:
            blocks, share = len(self.placement.owned(rank.segment)), self.placement.shares[rank.segment]
            what += f", {blocks} blocks from {self.placement.span(rank.segment)[0]} ({share:.0%} of the work)"
        branch = f"branch {rank.rank * self.plan.branches // len(self.stats.ranks) + 1}, " if self.plan.branches > 1 else ""
        times = [record for record in timing.computing if record.rank == rank.rank]
        compute, wait = (statistics.median(getattr(r, kind) for r in times) if times else 0.0 for kind in ("compute", "wait"))
        return (
            f"Rank {rank.rank} on {rank.device}: {branch}{what}, {_mib(rank.weight_bytes)} of weights, "
            f"compute {compute:.3f} s and wait {wait:.3f} s per call"
        )


_last: RunRecord | None = None


def last_run() -> RunRecord | None:
    """The record of the last sampling of a model that AsyncDiff is attached to; None if there was none."""
    return _last


def publish(record: RunRecord) -> None:
    """Keep ``record`` as the last run, and show its line on the node that is executing."""
    global _last
    _last = record
    context = get_executing_context()
    server = prompt_server()
    if context is not None and server is not None:
        server.send_progress_text(f"AsyncDiff: {record.line}", context.node_id)


def _first_line(note: str) -> str:
    return note.partition("\n")[0]


def part(plan: Plan, rank: RankReport) -> str:
    """Say which part of the work a rank has, such as "segment 2" or "band 1"."""
    return f"band {rank.rank % plan.bands + 1}" if _only_bands(plan) else f"segment {rank.segment + 1}"


def _only_bands(plan: Plan) -> bool:
    """Whether every call is computed in bands; with segments, synchronous ones are."""
    return plan.bands > 1 and (plan.segments == 1 or plan.warmup >= ALWAYS)


def _in_words(plan: Plan) -> str:
    count, what = (plan.bands, "band") if _only_bands(plan) else (plan.segments, "segment")
    parts = f"{count} {what}" + ("s" if count > 1 else "")
    return parts if plan.branches == 1 else f"{plan.branches} branches of {parts}"


def _synchronous(calls: Sequence[CallSummary]) -> str:
    """Numbers of the synchronous calls, from 1, and why they were synchronous."""
    calls_by_reason: dict[str, list[int]] = {}
    for call in calls:
        if call.synchronous:
            calls_by_reason.setdefault(call.why, []).append(call.call + 1)
    spans = [(f"{min(n)} to {max(n)}" if min(n) < max(n) else str(min(n)), why) for why, n in calls_by_reason.items()]
    return ", ".join(f"{span} ({why})" for span, why in spans) or "none"


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
