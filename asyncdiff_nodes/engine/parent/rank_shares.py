"""Shares of ranks under a placement: blocks, links to other ranks, weights."""

from __future__ import annotations

from collections.abc import Iterator

from asyncdiff_nodes.engine.planning.placement import Placement
from asyncdiff_nodes.engine.rank.share import Share


def shares_of(placement: Placement) -> Iterator[Share]:
    """Yield the share of each rank, in their order."""
    return (_share(placement, rank) for rank in range(placement.plan.world_size))


def ranks_with(placement: Placement, weight: str) -> set[int]:
    """Find the ranks that compute with a weight, by its name; all of them for glue."""
    plan, parts = placement.plan, weight.split(".")
    if plan.bands > 1:
        return set(range(plan.world_size))
    prefixes = {".".join(parts[:i]) for i in range(1, len(parts))}
    segments = set(range(plan.segments))
    index = next((i for i, name in enumerate(placement.graph.names) if name in prefixes), None)
    if index is not None:
        segments = {d for d in segments if index in placement.owned(d)}
    return {rank for rank in range(plan.world_size) if plan.segment_of_rank(rank) in segments}


def _share(placement: Placement, rank: int) -> Share:
    plan, names = placement.plan, placement.graph.names
    segment = plan.segment_of_rank(rank)
    sinks: dict[str, tuple[int, ...]] = {}
    if rank % plan.branch_size < plan.segments:  # replicas of the last segment keep nothing, so nobody reads their values
        for other in range(plan.branch_size):
            for producer in placement.incoming(plan.segment_of_rank(other)):
                if placement.segments[producer] == segment:
                    sinks[names[producer]] = (*sinks.get(names[producer], ()), other)
    return Share(
        rank=rank,
        first=rank - rank % plan.branch_size,
        segment=segment,
        blocks=names,
        owned=frozenset(names[i] for i in placement.owned(segment)),
        sources={names[p]: placement.segments[p] for p in placement.incoming(segment)},
        sinks=sinks,
        hidden=placement.hidden,
        bands=plan.bands,
    )
