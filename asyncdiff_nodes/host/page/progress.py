"""The current sampling, or the last one, for the page: what every rank does, and events for pages that watch.

The sampler's thread writes; the server's threads read. A page that watches asks again every few seconds. So nothing is sent to a
page that is closed, or whose panel is closed.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import comfy.model_management
import torch
from comfy_execution.utils import get_executing_context

from asyncdiff_nodes.engine import Plan, WorkerGroup, accelerator
from asyncdiff_nodes.engine.devices import on_cluster
from asyncdiff_nodes.engine.telemetry import CallRecord, bytes_per_call
from asyncdiff_nodes.host.choices import ALWAYS

from .prompt_server import prompt_server
from .timing import Timing

log = logging.getLogger(__name__)

EVENT = "asyncdiff.run"
LEASE = 15.0  # seconds for which a page gets events after it has asked
_KEPT = 5000  # the most records in one answer
_numbers = itertools.count(1)
current: Progress | None = None  # the current run, or the last one


class Progress:
    """One sampling, from its first moment on.

    Attributes:
        phase: starting (workers, weights), sampling, usual (ComfyUI samples as usual); then done, cancelled or failed.
        posted: how many calls of the busiest stream have begun.
    """

    def __init__(self, steps: int) -> None:
        """Begin a run whose schedule has ``steps`` steps."""
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
        """Note that ``group`` samples with ``plan`` from now on, with ``calls`` calls per stream if that is known."""
        self._group, self._plan, self._steps = group, plan, calls or self._steps
        self.enter("sampling")

    def enter(self, phase: str) -> None:
        """Note that the run is in ``phase`` from now on."""
        self.phase = phase
        WATCHERS.tell(self, at_once=True)

    def call(self, stream: Any, turn: int = 0) -> None:
        """Note that a call of ``stream`` begins: the ``turn``-th, counting calls of the streams that it replaced."""
        self._calls[stream] = self._calls.get(stream, 0) + 1
        self.posted = max(self.posted, self._calls[stream], turn)

    def add(self, record: CallRecord) -> None:
        """Add the record of a call that a rank has finished."""
        self._records.append(record)
        WATCHERS.tell(self)

    def snapshot(self, first: int | None = None) -> dict[str, Any]:
        """Plain data for the page, with the records from number ``first`` on; ``None``: all records that it may need."""
        group, plan, records = self._group, self._plan, list(self._records)
        told = {"number": self.number, "node": self._node, "phase": self.phase, "notes": list(self.notes)}
        told |= {"steps": self._steps, "step": self.posted}
        if group is None or plan is None:
            return told
        first = max(0, len(records) - _KEPT) if first is None else first
        # of a very long run only the warm-up and the latest steps, so that an event always costs the same
        some = records if len(records) < 1000 else records[:200] + records[-800:]
        timing = Timing(plan, group.devices, some, sum(group.placement.shares))
        return told | {
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
        """Used and total bytes of each rank's device, for all programs together. Looked up at most once a second."""
        if group.closed:
            return []
        when, used = self._memory
        if time.monotonic() - when > 1.0:
            used = [_memory(device) for device in group.devices]
            self._memory = time.monotonic(), used
        return used


class Watchers:
    """The pages that get events during a run."""

    def __init__(self) -> None:
        self._pages: dict[str, _Page] = {}

    def watch(self, client: str, interval: float) -> None:
        """Send events to the page ``client`` for the next :data:`LEASE` seconds, at most one every ``interval`` seconds."""
        self._pages.setdefault(client, _Page()).renew(interval)

    def dismiss(self, client: str | None) -> None:
        """Send no more events to the page ``client``."""
        self._pages.pop(client, None)

    def tell(self, progress: Progress, at_once: bool = False) -> None:
        """Send the news to every page whose next event is due."""
        for client, page in list(self._pages.items()):
            now = time.monotonic()
            if now > page.until:
                self.dismiss(client)
            elif at_once or now >= page.due:
                try:
                    page.due = now + page.interval
                    page.send(client, progress)
                except Exception:  # an event that fails must not cost a picture
                    log.exception("AsyncDiff: the panel gets no more events")
                    self.dismiss(client)


WATCHERS = Watchers()


class _Page:
    """One page that watches: until when, how often, when next, and from which record on."""

    def __init__(self) -> None:
        self.until = self.interval = self.due = 0.0
        self.number = self.first = 0

    def renew(self, interval: float) -> None:
        self.until, self.interval = time.monotonic() + LEASE, interval

    def send(self, client: str, progress: Progress) -> None:
        """Send the records that this page does not have yet."""
        if self.number != progress.number:
            self.number, self.first = progress.number, 0
        first, self.first = self.first, progress.recorded
        data, server = progress.snapshot(first), prompt_server()
        if server is not None:
            server.send_sync(EVENT, data, client)


def title(device: str) -> str:
    """The usual name of a device, such as ``RTX 4090``."""
    if on_cluster(device):
        return device
    name = accelerator.title(device)
    return name.upper() if name == torch.device(device).type else name


def visible_devices() -> Iterator[dict[str, Any]]:
    """The GPUs that ``auto`` stands for. Their use is not looked up, since that would take memory on each."""
    for device in accelerator.like_the_first(comfy.model_management.get_torch_device().type)[0]:
        yield {"device": device, "title": title(device), "total": accelerator.total_memory(device)}


def _memory(device: str) -> Sequence[int] | None:
    if on_cluster(device):
        return None
    if torch.device(device).type != "cpu":
        free, total = accelerator.memory(device)
    else:
        management, where = comfy.model_management, torch.device(device)
        free, total = management.get_free_memory(where), management.get_total_memory(where)
    return total - free, total


def _row(record: CallRecord) -> list[Any]:
    """A record as a list: rank, call, synchronous (as in bands, too), start, end, [start, end, ...] of its waits, mean drift."""
    drift = sum(record.drift.values()) / len(record.drift) if record.drift else None
    waits = [round(edge, 4) for span in record.waits for edge in span]
    together = int(record.synchronous or record.banded)
    return [record.rank, record.call, together, round(record.start, 4), round(record.end, 4), waits, drift]
