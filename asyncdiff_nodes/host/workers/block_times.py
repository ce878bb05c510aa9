"""Measured balance: how long each block took, kept on disk; and whether a group's blocks should change their ranks."""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from asyncdiff_nodes.engine import BlockGraph, BlockTimes, Placement, Plan, WorkerGroup, better, pause, slowest
from asyncdiff_nodes.engine.devices import on_cluster
from asyncdiff_nodes.engine.parent.calls import TIMED
from asyncdiff_nodes.engine.telemetry import CallRecord

from .skeleton import fingerprint_of

log = logging.getLogger(__name__)

_KEPT = 200  # models and shapes in the file, the latest ones
# what a move takes, guessed so that it rarely disappoints: rebuilding the module tree, and patching and sending weights
_MOVE_SECONDS, _BYTES_PER_SECOND = 1.0, 1e9
_PAUSES = 50  # of which the median is taken
_SPARE_BYTES = 2**28  # that a rank must have left after it grew


class Balance:
    """Of one sampling: what is known of its model on its devices, what its ranks add to that, and what follows.

    Args:
        shape: [B, C, h, w] of the latent.
        devices: one per rank of ``plan``.
        room: bytes of weights that each of them can hold.
    """

    def __init__(
        self, patcher: ModelPatcher, plan: Plan, shape: Sequence[int], devices: Sequence[str], room: Sequence[float]
    ) -> None:
        self.room = room
        architecture = hashlib.sha256(fingerprint_of(patcher).encode()).hexdigest()[:16]
        part = f" in {plan.branches} parts" if plan.branches > 1 else ""
        self._key = f"{architecture} {'x'.join(map(str, shape))}{part} {patcher.model_dtype()}"
        self._models = [_model_of(device) for device in devices]
        # ranks that share a device may be slowed differently by it
        uses = [devices[: rank + 1].count(device) for rank, device in enumerate(devices)]
        each = zip(self._models, devices, uses, strict=True)
        self._names = [f"{model} {device}" + (f" ({use})" if use > 1 else "") for model, device, use in each]
        self._times = BlockTimes.from_data(_load().get(self._key))
        self._records: list[CallRecord] = []
        self._waited_for: collections.deque[CallRecord] = collections.deque(maxlen=_PAUSES)
        self._plan = plan
        self._kept = True  # what is known is what the file has
        self._streams: set[str] = set()

    def estimate(self, graph: BlockGraph) -> tuple[list[float], list[float], float] | None:
        """Costs, speeds and pause for the planner, as far as they are known."""
        found = self._times.estimate(graph, self._names, self._models)
        return found and (*found, self._times.pause)

    def add(self, record: CallRecord) -> None:
        """A rank has finished a call."""
        if record.rank == self._plan.segments - 1:
            self._waited_for.append(record)
        if record.blocks:
            self._streams.add(record.stream)
            if not self._records or record.stream == self._records[0].stream:  # others may be of another shape
                self._records.append(record)

    def learnt(self, plan: Plan) -> bool:
        """Whether the ranks have told by now how fast they are in asynchronous calls of ``plan``; from then on it counts."""
        told = collections.Counter(record.rank for record in self._records if not record.synchronous)
        if any(told[rank] < TIMED for rank in range(plan.segments)):
            return False
        self._learn()
        return True

    def better(self, group: WorkerGroup, calls: int, running: bool) -> Placement | None:
        """Where the blocks of ``group`` should be; None where that does not pay.

        Args:
            calls: asynchronous ones of each stream within which it must.
            running: the run has begun, so that one more call of each stream is synchronous.
        """
        old, plan = group.placement, group.plan
        if (found := self.estimate(old.graph)) is None or (new := better(old, *found, self.room, group.bandwidth)) is None:
            return None
        costs, speeds, _ = found
        streams = max(1, len(self._streams))
        before, after = (slowest(placement, *found, group.bandwidth) for placement in (old, new))
        gain = (before - after) * streams * calls / plan.stride
        segments = range(plan.segments)
        come = sum(new.graph.blocks[i].weight_bytes for d in segments for i in set(new.owned(d)) - set(old.owned(d)))
        price = _MOVE_SECONDS + come / _BYTES_PER_SECOND
        if running:
            price += streams * (sum(costs[i] / speeds[d] for d in segments for i in new.owned(d)) - before)
        return new if gain > price and _fits(group, new) else None

    def finish(self) -> None:
        """The sampling is over: keep what was learnt for those to come, in this session and others. Never raises."""
        self._learn()
        if self._kept:
            return
        entries = _load()
        entries.pop(self._key, None)  # the latest last
        entries[self._key] = self._times.to_data()
        try:
            _save(dict(list(entries.items())[-_KEPT:]))
        except OSError as error:
            log.warning("AsyncDiff: block times are not kept: %s", error)

    def _learn(self) -> None:
        if self._records:
            self._times = self._times.updated(BlockTimes.of(self._records, self._names, pause(self._waited_for, self._plan)))
            self._records.clear()
            self._kept = False


def _fits(group: WorkerGroup, new: Placement) -> bool:
    """Whether every device has room for the weights that come to it; for a better cut alone nothing is unloaded."""
    growth: collections.Counter[str] = collections.Counter()
    for rank, device in enumerate(group.devices):
        segment = group.plan.segment_of_rank(rank)
        if not on_cluster(device):  # how much is free there is not known
            growth[device] += max(0, new.weight_bytes(segment) - group.placement.weight_bytes(segment))
    free = comfy.model_management.get_free_memory
    return all(size + _SPARE_BYTES < free(torch.device(device)) for device, size in growth.items() if size)


def _model_of(device: str) -> str:
    if on_cluster(device):
        return device
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else torch.device(device).type


def _path() -> Path:
    return Path(folder_paths.get_user_directory(), "__asyncdiff", "block_times.json")  # "__": never served to pages


def _load() -> dict[str, Any]:
    """Model, shape and dtype -> data of :class:`~asyncdiff_nodes.engine.BlockTimes`; empty where there is no such file."""
    try:
        entries = json.loads(_path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("AsyncDiff: the block times in %s are not readable and measured anew: %s", _path(), error)
        return {}
    return entries if isinstance(entries, dict) else {}


def _save(entries: dict[str, Any]) -> None:
    """At once or not at all: a host that is killed meanwhile leaves the old file."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(entries, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
