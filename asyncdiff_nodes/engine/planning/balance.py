"""Block times and better cuts: what was measured of a model on its devices, and what follows for the plan."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from asyncdiff_nodes.engine.telemetry import CallRecord

from .graph import Block, BlockGraph
from .placement import Placement, mac_costs, place
from .plan import Plan

# How much faster the slowest segment must get. Medians scatter by a few per cent, and the planner itself gives away
# up to partition.TIME_TOLERANCE for fewer bytes: less than this would move weights to and fro for nothing.
WORTH = 0.04
# The part of a device's measured time that must be of work known from another one, to tell their relative speed.
OVERLAP = 0.1


class BlockTimes:
    """Seconds of the blocks of one model, at one shape and dtype, on the devices where they were measured.

    Args:
        seconds: device -> block -> seconds. A device is any name that its user gives it; ranks of one name are taken for equal.
        pause: seconds between two calls of the rank whose result is waited for; see :func:`pause`. 0 if not known.
    """

    def __init__(self, seconds: Mapping[str, Mapping[str, float]] | None = None, pause: float = 0.0) -> None:
        self._seconds = {device: dict(blocks) for device, blocks in (seconds or {}).items() if blocks}
        self.pause = pause

    @classmethod
    def of(cls, records: Iterable[CallRecord], devices: Sequence[str], pause: float = 0.0) -> BlockTimes:
        """Take medians over the records of one group; of asynchronous calls where there are any, since then all devices are busy.

        Args:
            devices: names, one per rank.
        """
        measured: dict[tuple[str, str], dict[bool, list[float]]] = {}
        for record in records:
            for block, seconds in record.blocks.items():
                kinds = measured.setdefault((devices[record.rank], block), {})
                kinds.setdefault(record.synchronous, []).append(seconds)
        times: dict[str, dict[str, float]] = {}
        for (device, block), kinds in measured.items():
            median = statistics.median(kinds.get(False) or kinds[True])
            times.setdefault(device, {})[block] = max(median, 1e-9)  # a coarse clock may say nothing at all
        return cls(times, pause)

    @classmethod
    def from_data(cls, data: Any) -> BlockTimes:
        """Take what :meth:`to_data` returned; nothing where it is anything else."""
        if not isinstance(data, Mapping) or not isinstance(data.get("blocks"), Mapping):
            return cls()
        seconds, pause = data["blocks"], data.get("pause")
        if not all(map(_are_times, seconds.values())) or not isinstance(pause, float) or not 0 <= pause < math.inf:
            return cls()
        return cls(seconds, pause)

    def to_data(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {"blocks": self._seconds, "pause": self.pause}

    def updated(self, newer: BlockTimes) -> BlockTimes:
        """Replace what was measured again; the rest of such a device's is scaled as the replaced part changed."""
        merged = dict(self._seconds)
        for device, blocks in newer._seconds.items():
            old = merged.get(device, {})
            before, after = (sum(times[name] for name in old.keys() & blocks.keys()) for times in (old, blocks))
            change = after / before if before and after else 1.0
            merged[device] = {name: seconds * change for name, seconds in old.items()} | blocks
        return BlockTimes(merged, newer.pause or self.pause)

    def estimate(
        self, graph: BlockGraph, devices: Sequence[str], models: Sequence[str] | None = None
    ) -> tuple[list[float], list[float]] | None:
        """Estimate ``costs`` and ``speeds`` for :func:`~.placement.place`; None where nothing is known of these devices.

        Blocks that do the same work are taken to cost the same. How fast devices are relative to each other is told by work
        that was measured on both of them. Where there is none, devices of the same model are equally fast, and others as fast
        as MACs say; so is the cost of blocks like none that was measured.

        Args:
            devices: names, one per rank.
            models: what kind of device each of them is; of kinds of their own if None.

        Returns:
            Seconds of each block on one of the devices, and for each rank how many times faster than that its device is.
        """
        kinds = dict(zip(graph.names, map(_kind, graph.blocks), strict=True))
        macs = dict(zip(kinds.values(), mac_costs(graph), strict=True))
        model = dict(zip(devices, models or devices, strict=True))
        measured = {device: _by_kind(self._seconds.get(device, {}), kinds) for device in dict.fromkeys(devices)}
        waiting = {device: times for device, times in measured.items() if times}
        if not waiting:
            return None
        known: dict[Any, float] = {}  # kind -> seconds on the reference device
        slowness: dict[str, float] = {}  # device -> seconds where the reference device takes one
        while waiting:
            device = max(waiting, key=lambda name: _shared(waiting[name], known))
            times = waiting.pop(device)
            if not known:
                slowness[device] = 1.0
            elif _shared(times, known) >= OVERLAP:
                common = times.keys() & known.keys()
                slowness[device] = sum(times[kind] for kind in common) / sum(known[kind] for kind in common)
            else:
                alike = (slow for other, slow in slowness.items() if model[other] == model[device])
                slowness[device] = next(alike, _per_mac(times, macs) / _per_mac(known, macs))
            known = {kind: seconds / slowness[device] for kind, seconds in times.items()} | known
        per_mac = _per_mac(known, macs)
        costs = []
        for name, kind in kinds.items():
            own = [self._seconds[device][name] / slow for device, slow in slowness.items() if name in self._seconds[device]]
            costs.append(statistics.mean(own) if own else known.get(kind, macs[kind] * per_mac))
        return costs, [1 / slowness.get(device, 1.0) for device in devices]


def pause(records: Iterable[CallRecord], plan: Plan) -> float:
    """Median of the seconds between two asynchronous calls on the rank whose result is waited for; 0 if the records do not say.

    The result goes to the caller, who takes a step with it and makes the next call, while the other ranks compute.
    """
    last = sorted((record for record in records if record.rank == plan.segments - 1), key=lambda record: record.start)
    gaps = [after.start - before.end for before, after in itertools.pairwise(last) if not before.synchronous]
    return max(0.0, statistics.median(gaps)) if gaps else 0.0


def slowest(
    placement: Placement, costs: Sequence[float], speeds: Sequence[float], pause: float = 0.0, bandwidth: float = math.inf
) -> float:
    """Time of the slowest rank in an asynchronous call, or of what it receives, in the unit of ``costs`` and ``pause``.

    Glue and latency are left out.
    """
    plan, times = placement.plan, []
    for rank, speed in enumerate(speeds):
        segment = plan.segment_of_rank(rank)
        rest = pause if segment == plan.segments - 1 else 0.0
        times.append(sum(costs[i] for i in placement.owned(segment)) / speed + rest)
        times.append(placement.received_bytes(segment) / bandwidth)
    return max(times)


def better(
    placement: Placement,
    costs: Sequence[float],
    speeds: Sequence[float],
    pause: float = 0.0,
    room: Sequence[float] | None = None,
    bandwidth: float = math.inf,
) -> Placement | None:
    """Find the placement to move to; None where that does not pay (:data:`WORTH`), or where the user chose the cuts.

    Args:
        costs, speeds, pause, room, bandwidth: as for :func:`~.placement.place`; see :class:`BlockTimes`.
    """
    if placement.plan.cuts is not None:
        return None
    other = place(placement.graph, placement.plan, speeds, costs, pause, room, bandwidth)
    before, after = (slowest(each, costs, speeds, pause, bandwidth) for each in (placement, other))
    return other if after * (1 + WORTH) < before else None


def _kind(block: Block) -> tuple[Any, ...]:
    """Return what is equal for blocks that do the same work."""
    return block.macs, block.weight_bytes, block.outputs


def _by_kind(times: Mapping[str, float], kinds: Mapping[str, Any]) -> dict[Any, float]:
    by_kind: dict[Any, list[float]] = {}
    for name, seconds in times.items():
        if name in kinds:
            by_kind.setdefault(kinds[name], []).append(seconds)
    return {kind: statistics.mean(values) for kind, values in by_kind.items()}


def _shared(times: Mapping[Any, float], known: Mapping[Any, float]) -> float:
    """Part of ``times`` that is of known work."""
    return sum(seconds for kind, seconds in times.items() if kind in known) / sum(times.values())


def _per_mac(times: Mapping[Any, float], macs: Mapping[Any, float]) -> float:
    return sum(times.values()) / sum(macs[kind] for kind in times)


def _are_times(blocks: Any) -> bool:
    return isinstance(blocks, Mapping) and all(
        isinstance(seconds, float) and 0 < seconds < math.inf for seconds in blocks.values()
    )
