"""The sampling that is under way, or the last one, for the page: what every rank does, and events to those who watch.

The sampler's thread writes, the server's threads read; a page that watches asks again every few seconds, so nothing is sent
to a page that is closed or whose panel is.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import psutil
import torch
from comfy_execution.utils import get_executing_context

from asyncdiff_nodes.engine import Plan, WorkerGroup
from asyncdiff_nodes.engine.devices import on_cluster
from asyncdiff_nodes.engine.telemetry import CallRecord, bytes_per_call
from asyncdiff_nodes.host.routing.options import ALWAYS

from .prompt_server import prompt_server
from .timing import Timing

log = logging.getLogger(__name__)

EVENT = "asyncdiff.run"
LEASE = 15.0  # seconds that a page is sent events after it asked
_KEPT = 5000  # records in one answer
_numbers = itertools.count(1)
current: Progress | None = None  # the run that goes on, or was last


class Progress:
    """One sampling, from its first moment on.

    Attributes:
        phase: starting (workers, weights), sampling, usual (ComfyUI samples as usual); then done, cancelled or failed.
        posted: calls of the busiest stream that were begun.
    """

    def __init__(self, steps: int) -> None:
        """``steps`` of the sampler's schedule."""
        global current
        current = self
        context = get_executing_context()
        self.number = next(_numbers)
        self.phase = "starting"
        self.notes: list[str] = []
        self.posted = 0
        self._node = None if context is None else context.node_id
        self._steps = steps
        self._group: WorkerGroup | None = None
        self._plan: Plan | None = None
        self._records: list[CallRecord] = []
        self._calls: dict[Any, int] = {}
        self._memory: tuple[float, list[Any]] = (-math.inf, [])
        WATCHERS.tell(self, at_once=True)

    def sampling(self, group: WorkerGroup, plan: Plan, calls: int | None = None) -> None:
        """``group`` is ready, and samples with ``plan`` from now on; ``calls`` of each stream, if that is known."""
        self._group, self._plan, self._steps = group, plan, calls or self._steps
        self.enter("sampling")

    def enter(self, phase: str) -> None:
        """The run is in ``phase`` from now on."""
        self.phase = phase
        WATCHERS.tell(self, at_once=True)

    def call(self, stream: Any, turn: int = 0) -> None:
        """A call of ``stream`` begins; the ``turn``-th, counting those of streams whose place it took."""
        self._calls[stream] = self._calls.get(stream, 0) + 1
        self.posted = max(self.posted, self._calls[stream], turn)

    def add(self, record: CallRecord) -> None:
        """A rank has finished a call."""
        self._records.append(record)
        WATCHERS.tell(self)

    def snapshot(self, first: int | None = None) -> dict[str, Any]:
        """Plain data for the page, with the records from number ``first`` on; ``None``: all that it may need."""
        group, plan, records = self._group, self._plan, list(self._records)
        found = {"number": self.number, "node": self._node, "phase": self.phase, "notes": list(self.notes)}
        found |= {"steps": self._steps, "step": self.posted}
        if group is None or plan is None:
            return found
        first = max(0, len(records) - _KEPT) if first is None else first
        # of a very long run the warm-up and the latest steps, so that an event costs the same at any time
        some = records if len(records) < 1000 else records[:200] + records[-800:]
        timing = Timing(plan, group.devices, some, sum(group.placement.shares))
        return found | {
            "plan": {**asdict(plan), "warmup": None if plan.warmup >= ALWAYS else plan.warmup},
            "ranks": [self._rank(group, rank) for rank in range(group.plan.world_size)],
            "memory": self._memory_used(group),
            "seconds_now": timing.last_step_seconds,
            "seconds": timing.step_seconds,
            "sequential": timing.sequential_seconds,
            "speedup": timing.speedup,
            "speedup_so_far": timing.speedup_so_far,
            "bytes_per_step": bytes_per_call(some) * timing.streams_per_step / plan.stride,
            "first": first,
            "records": [_row(record) for record in records[first:]],
        }

    @property
    def recorded(self) -> int:
        """Number of records so far."""
        return len(self._records)

    def _rank(self, group: WorkerGroup, rank: int) -> dict[str, Any]:
        placement = group.placement
        segment = group.plan.segment_of_rank(rank)
        begins, ends = placement.span(segment)
        return {
            "branch": rank // group.plan.branch_size,
            "segment": segment,
            "device": group.devices[rank],
            "title": title(group.devices[rank]),
            "blocks": len(placement.owned(segment)),
            "begins": begins,
            "ends": ends,
            "share": placement.shares[segment],
            "weights": placement.weight_bytes(segment),
        }

    def _memory_used(self, group: WorkerGroup) -> list[Any]:
        """Used and total bytes per rank: of the whole GPU, or of the rank's process on a CPU. Looked up once a second."""
        if group.closed:
            return []
        when, found = self._memory
        if time.monotonic() - when > 1.0:
            found = [_memory(device, pid) for device, pid in zip(group.devices, group.pids, strict=True)]
            self._memory = time.monotonic(), found
        return found


class Watchers:
    """The pages that are shown a run while it goes on."""

    def __init__(self) -> None:
        self._pages: dict[str, _Page] = {}

    def watch(self, client: str, interval: float) -> None:
        """Send events to the page ``client`` for the next :data:`LEASE` seconds, at most one every ``interval`` seconds."""
        self._pages.setdefault(client, _Page()).renew(interval)

    def dismiss(self, client: str | None) -> None:
        """Send no more events to the page ``client``."""
        self._pages.pop(client, None)

    def tell(self, progress: Progress, at_once: bool = False) -> None:
        """Send what is new to all that are due."""
        for client, page in list(self._pages.items()):
            now = time.monotonic()
            if now > page.until:
                self.dismiss(client)
            elif at_once or now >= page.due:
                try:
                    page.due = now + page.interval
                    page.send(client, progress)
                except Exception:  # a picture must not be lost for what is told about it
                    log.exception("AsyncDiff: the panel is sent nothing more")
                    self.dismiss(client)


WATCHERS = Watchers()


class _Page:
    """One watching page: until when, how often, when next, and from which record on."""

    def __init__(self) -> None:
        self.until = self.interval = self.due = 0.0
        self.number = self.first = 0

    def renew(self, interval: float) -> None:
        self.until, self.interval = time.monotonic() + LEASE, interval

    def send(self, client: str, progress: Progress) -> None:
        """What is new to this page."""
        if self.number != progress.number:
            self.number, self.first = progress.number, 0
        first, self.first = self.first, progress.recorded
        data, server = progress.snapshot(first), prompt_server()
        if server is not None:
            server.send_sync(EVENT, data, client)


def title(device: str) -> str:
    """What people call a device, such as ``RTX 4090``."""
    if on_cluster(device):
        return device
    if torch.device(device).type != "cuda":
        return device.upper()
    name = torch.cuda.get_device_properties(device).name
    return name.removeprefix("NVIDIA ").removeprefix("GeForce ")


def visible_devices() -> Iterator[dict[str, Any]]:
    """The GPUs that ``auto`` stands for; without looking at their use, which would take memory on each."""
    for index in range(torch.cuda.device_count()):
        device = f"cuda:{index}"
        yield {"device": device, "title": title(device), "total": torch.cuda.get_device_properties(device).total_memory}


def _memory(device: str, pid: int) -> Sequence[int] | None:
    if on_cluster(device):
        return None
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    try:
        return psutil.Process(pid).memory_info().rss, psutil.virtual_memory().total
    except psutil.Error:  # it has just ended
        return None


def _row(record: CallRecord) -> list[Any]:
    """Rank, call, synchronous, start, end, [start, end, ...] of its waits, mean drift."""
    drift = sum(record.drift.values()) / len(record.drift) if record.drift else None
    waits = [round(edge, 4) for span in record.waits for edge in span]
    return [record.rank, record.call, int(record.synchronous), round(record.start, 4), round(record.end, 4), waits, drift]
