"""Measured block times, kept on disk, and the decision whether a group's blocks should move to other ranks."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from asyncdiff_nodes.engine import BlockGraph, BlockTimes, Placement, Plan, WorkerGroup, accelerator, better, pause, slowest
from asyncdiff_nodes.engine.devices import on_cluster
from asyncdiff_nodes.engine.parent.course import TIMED
from asyncdiff_nodes.engine.telemetry import CallRecord

from . import user_files
from .skeleton import fingerprint_of

_FILE, _KEPT = "block_times", 200  # entries for the latest models and shapes
# what a move costs, estimated rather too high: rebuild the module tree, then patch and send weights
_MOVE_SECONDS, _BYTES_PER_SECOND = 1.0, 1e9
_PAUSES = 50  # the latest pauses, whose median counts
_SPARE_BYTES = 2**28  # must stay free on a device whose ranks get more weights


class Balance:
    """The speed of one sampling's model on its devices: what is known, what its ranks measure, and where blocks should be.

    Args:
        shape: [B, C, h, w], the shape of the latent.
        devices: one per rank of ``plan``.
        room: bytes of weights that each rank can hold.
    """

    def __init__(
        self, patcher: ModelPatcher, plan: Plan, shape: Sequence[int], devices: Sequence[str], room: Sequence[float]
    ) -> None:
        self.room = room
        architecture = hashlib.sha256(fingerprint_of(patcher).encode()).hexdigest()[:16]
        part = f" in {plan.branches} parts" if plan.branches > 1 else ""
        self._key = f"{architecture} {'x'.join(map(str, shape))}{part} {patcher.model_dtype()}"
        self._models = [_model_of(device) for device in devices]
        # ranks that share a device may be slowed down unequally
        uses = [devices[: rank + 1].count(device) for rank, device in enumerate(devices)]
        each = zip(self._models, devices, uses, strict=True)
        self._names = [f"{model} {device}" + (f" ({use})" if use > 1 else "") for model, device, use in each]
        self._times = BlockTimes.from_data(user_files.load(_FILE).get(self._key))
        self._records: list[CallRecord] = []
        self._waited_for: collections.deque[CallRecord] = collections.deque(maxlen=_PAUSES)
        self._plan = plan
        self._kept = True  # the file has everything that is known
        self._streams: set[str] = set()

    def estimate(self, graph: BlockGraph) -> tuple[list[float], list[float], float] | None:
        """Costs, speeds and pause for the planner, as far as they are known."""
        estimate = self._times.estimate(graph, self._names, self._models)
        return estimate and (*estimate, self._times.pause)

    def add(self, record: CallRecord) -> None:
        """Add the record of a call that a rank has finished."""
        if record.rank == self._plan.segments - 1:
            self._waited_for.append(record)
        if record.blocks:
            self._streams.add(record.stream)
            if not self._records or record.stream == self._records[0].stream:  # other streams may have another shape
                self._records.append(record)

    def learnt(self, plan: Plan) -> bool:
        """Whether the ranks have timed enough asynchronous calls of ``plan``; from then on these times count."""
        told = collections.Counter(record.rank for record in self._records if not record.synchronous)
        if any(told[rank] < TIMED for rank in range(plan.segments)):
            return False
        self._learn()
        return True

    def better(self, group: WorkerGroup, calls: int, running: bool) -> Placement | None:
        """Where the blocks of ``group`` should be; None where a move does not pay off.

        Args:
            calls: asynchronous calls of each stream within which a move must pay off.
            running: the run has begun, so that one more call of each stream is synchronous.
        """
        old, plan = group.placement, group.plan
        if (known := self.estimate(old.graph)) is None or (new := better(old, *known, self.room, group.bandwidth)) is None:
            return None
        costs, speeds, _ = known
        streams = max(1, len(self._streams))
        before, after = (slowest(placement, *known, group.bandwidth) for placement in (old, new))
        gain = (before - after) * streams * calls / plan.stride
        segments = range(plan.segments)
        come = sum(new.graph.blocks[i].weight_bytes for d in segments for i in set(new.owned(d)) - set(old.owned(d)))
        price = _MOVE_SECONDS + come / _BYTES_PER_SECOND
        if running:
            price += streams * (sum(costs[i] / speeds[d] for d in segments for i in new.owned(d)) - before)
        return new if gain > price and _fits(group, new) else None

    def finish(self) -> None:
        """Save what this sampling has measured, for later ones in this session and others. Never raises."""
        self._learn()
        if self._kept:
            return
        entries = user_files.load(_FILE)
        entries.pop(self._key, None)  # the latest last
        user_files.save(_FILE, entries | {self._key: self._times.to_data()}, _KEPT)

    def _learn(self) -> None:
        if self._records:
            self._times = self._times.updated(BlockTimes.of(self._records, self._names, pause(self._waited_for, self._plan)))
            self._records.clear()
            self._kept = False


def _fits(group: WorkerGroup, new: Placement) -> bool:
    """Whether every device has room for its new weights; nothing is unloaded just for a better cut."""
    growth: collections.Counter[str] = collections.Counter()
    for rank, device in enumerate(group.devices):
        segment = group.plan.segment_of_rank(rank)
        if not on_cluster(device):  # its free memory is not known
            growth[device] += max(0, new.weight_bytes(segment) - group.placement.weight_bytes(segment))
    free = comfy.model_management.get_free_memory
    return all(size + _SPARE_BYTES < free(torch.device(device)) for device, size in growth.items() if size)


def _model_of(device: str) -> str:
    if on_cluster(device):
        return device
    return accelerator.title(device)
