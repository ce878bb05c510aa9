"""Where a model is cut, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asyncdiff_nodes.engine import Placement, slowest

from .tables import MIB


def describe(placement: Placement, speeds: Sequence[float] | None = None) -> dict[str, Any]:
    """A placement as plain data; bytes for fp16 weights and activations if the graph was traced so."""
    graph, plan = placement.graph, placement.plan
    speeds = speeds or [1.0] * plan.world_size
    shares, whole = placement.shares, sum(placement.costs)
    segments = []
    for segment in range(plan.segments):
        blocks = [graph.blocks[i] for i in placement.owned(segment)]
        received = placement.incoming(segment)
        sent = sum(
            placement.crossing_bytes(i)
            for rank in range(plan.branch_size)
            for i in placement.incoming(plan.segment_of_rank(rank))
            if placement.segments[i] == segment
        )
        segments.append(
            {
                "segment": segment,
                "ranks": [rank for rank in range(plan.world_size) if plan.segment_of_rank(rank) == segment],
                "blocks": [block.name for block in blocks],
                "ranges": _ranges(graph.names, placement.owned(segment)),
                "gmac": sum(block.macs for block in blocks) / 1e9,
                "share": shares[segment],
                "weight_mib": sum(block.weight_bytes for block in blocks) / MIB,
                "mib_in": placement.received_bytes(segment) / MIB,
                "mib_out": sent / MIB,
                "tensors_in": len(received),
            }
        )
    return {
        "segments_count": plan.segments,
        "stride": plan.stride,
        "branches": plan.branches,
        "devices": plan.world_size,
        "cuts": list(placement.cuts),
        "wrapped": placement.wrapped,
        "gmac": plan.branches * graph.macs / 1e9,
        "max_share": max(shares),
        "mib_per_call": plan.branches * placement.bytes_per_call / MIB,
        # against the whole model on the fastest of the devices
        "predicted_speedup": plan.branches * plan.stride * whole / (slowest(placement, placement.costs, speeds) * max(speeds)),
        "segments": segments,
    }


def _ranges(names: Sequence[str], owned: Sequence[int]) -> list[str]:
    """First and last block of each contiguous run; a wrapped segment has two."""
    starts = [i for i in owned if i - 1 not in owned]
    ends = [i for i in owned if i + 1 not in owned]
    return [names[a] if a == b else f"{names[a]} ... {names[b]}" for a, b in zip(starts, ends, strict=True)]
