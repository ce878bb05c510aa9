"""Placement of a plan: which segment has which block, and what follows from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from asyncdiff_nodes.engine.compression import compressed
from asyncdiff_nodes.engine.errors import PlanError

from .arcs import Arcs
from .graph import BlockGraph
from .lookahead import NoiseLevels
from .partition import best_starts
from .plan import Plan


class Placement(Mapping[str, int]):
    """Block name -> the segment that others read it of, in execution order, and what follows from it for one block graph.

    The same in every branch; the graph, and so all bytes, are of one branch's part of the batch.

    Attributes:
        hidden: the hidden states that every segment makes afresh, if what they are made of comes before the first cut: what
            crosses in asynchronous calls is then how blocks changed them, and a reader adds that to its own. Else None.
        speeds: of each segment's device, relative to the fastest one.
    """

    def __init__(
        self,
        graph: BlockGraph,
        plan: Plan,
        starts: Sequence[int],
        costs: Sequence[float] | None = None,
        speeds: Sequence[float] | None = None,
    ) -> None:
        self.graph = graph
        self.plan = plan
        self.starts = tuple(starts)
        self.costs = tuple(costs or mac_costs(graph))
        self.speeds = tuple(speeds or [1.0] * plan.segments)
        afresh = plan.forecast and graph.hidden and max(graph.hidden.made_of, default=-1) < starts[0]
        self.hidden = graph.hidden if afresh else None
        # blocks before the first cut wrap round to the last segment, unless the first one works ahead and needs its own
        wrap = 0 if plan.forecast else plan.segments - 1
        self.segments = tuple(
            max((d for d, start in enumerate(self.starts) if start <= i), default=wrap) for i in range(len(graph.blocks))
        )
        self._owned = tuple(map(self._blocks_of, range(plan.segments)))

    def __getitem__(self, name: str) -> int:
        return self.segments[self.graph.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.graph.names)

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def cuts(self) -> tuple[str, ...]:
        """The block that each segment begins with."""
        return tuple(self.graph.names[start] for start in self.starts)

    @property
    def pipelines(self) -> bool:
        """Whether micro-batches can follow each other: not where others wait for first blocks of the last segment."""
        return self.plan.segments > 1 and (bool(self.plan.forecast) or self.starts[0] == 0)

    @property
    def wrapped(self) -> bool:
        """Whether the last segment computes the first blocks or hidden states, too: the result depends on this call's input."""
        return 0 in self.owned(self.plan.segments - 1) or self.hidden is not None

    def owned(self, segment: int) -> tuple[int, ...]:
        """Indices of the blocks that ``segment`` computes, in execution order.

        Working ahead, each segment that reads blocks before the first cut computes these itself, on the input of its own call.
        """
        return self._owned[segment]

    def _blocks_of(self, segment: int) -> tuple[int, ...]:
        own = {i for i, owner in enumerate(self.segments) if owner == segment}
        if self.plan.forecast and segment > 0:
            own |= self.graph.made_of(p for p, c in self.graph.edges if p < self.starts[0] and c in own)
            own |= self.hidden.made_of if self.hidden else set()
        return tuple(sorted(own))

    def span(self, segment: int) -> tuple[str, str]:
        """First and last block of ``segment`` in the order of the circle, without what it computes again."""
        names, own = self.graph.names, {i for i, owner in enumerate(self.segments) if owner == segment}
        first = next((i for i in own if (i - 1) % len(names) not in own), 0)  # a single segment has no edges
        last = next((i for i in own if (i + 1) % len(names) not in own), -1)
        return names[first], names[last]

    def incoming(self, segment: int) -> tuple[int, ...]:
        """Producers elsewhere whose outputs ``segment`` reads, in execution order."""
        own = set(self.owned(segment))
        return tuple(sorted({p for p, c in self.graph.edges if c in own and p not in own}))

    @property
    def shares(self) -> tuple[float, ...]:
        """Fraction of the model's cost in each segment: MACs, or what was given for them. A block may be in two of them."""
        return tuple(sum(self.costs[i] for i in self.owned(d)) / sum(self.costs) for d in range(self.plan.segments))

    def cost(self, steps: int, levels: NoiseLevels | None = None, plan: Plan | None = None) -> float:
        """Reckon a run of ``steps`` calls with these noise levels, in evaluations of the unrouted model on the fastest device.

        Communication is left out. Batches are taken to divide evenly, over branches and into micro-batches, and pictures into
        bands, and their parts to cost so much less.

        Args:
            plan: of the run, if not the placement's own; see ``WorkerGroup.begin``.
        """
        plan = (plan or self.plan).at(levels)
        synchronous = min(plan.warmup + plan.cooldown, steps)
        batches = math.ceil((steps - synchronous) / plan.stride)
        parts = plan.microbatches if self.pipelines else 1
        first, again = self._times()
        slowest = max(map(sum, zip(first, again, strict=True)))
        together = (sum(first) + (parts - 1) * slowest) / parts if plan.bands == 1 else sum(first) / plan.bands
        if plan.segments == 1:
            slowest /= plan.bands
        return (synchronous * together + batches * slowest + self._lag(batches, first, again)) / plan.branches

    def _times(self) -> tuple[list[float], list[float]]:
        """Sum up the blocks that each segment alone computes, and those that it computes again; in the unit of :meth:`cost`."""
        whole, first = sum(self.costs), [0.0] * self.plan.segments
        for cost, segment in zip(self.costs, self.segments, strict=True):
            first[segment] += cost / whole / self.speeds[segment]
        every = (share / speed for share, speed in zip(self.shares, self.speeds, strict=True))
        return first, [max(0.0, time - own) for time, own in zip(every, first, strict=True)]

    def within(self, speedup: float, plan: Plan, steps: int, levels: NoiseLevels | None = None) -> Plan:
        """Give ``plan`` the longest warm-up that makes a run of ``steps`` calls at least ``speedup`` times as fast as unrouted.

        By :meth:`cost`: what is really gained is less where links are slow or costs and speeds mislead.

        Raises:
            PlanError: no warm-up is short enough; the message says what can be had.
        """
        best = None
        for warmup in range(1, steps + 1, plan.stride):
            tried = replace(plan, warmup=warmup)
            gain = steps / self.cost(steps, levels, tried)
            if gain < speedup:
                break
            best = tried
        if best is None:
            raise PlanError(
                f"speedup={speedup:g} is out of reach: {steps} steps with {plan.segments} segments and stride "
                f"{plan.stride} are at most {gain:.2f} times as fast; take more devices, another stride, or ask for less"
            )
        return best

    def _lag(self, batches: int, first: Sequence[float], again: Sequence[float]) -> float:
        """Reckon how long after the warm-up the slowest rank is done with what it works ahead for the first of ``batches``.

        Args:
            first, again: see :meth:`_times`; what is computed again waits for nobody.
        """
        if not self.plan.forecast:
            return 0.0
        last = self.plan.segments - 1
        done: list[float] = []
        for d, part in enumerate(first):
            done.append(max(again[d], done[-1] if done else 0.0) + part)
        for ranks in range(last, 0, -1)[:batches]:
            before = 0.0
            for d in range(ranks):
                before = done[d] = max(done[d] + again[d], before) + first[d]
        return max(done) - done[last]

    def weight_bytes(self, segment: int) -> int:
        """Bytes of the weights that one rank of ``segment`` holds, those that every rank holds included."""
        if self.plan.bands > 1:
            return self.graph.glue_bytes + sum(block.weight_bytes for block in self.graph.blocks)
        return self.graph.glue_bytes + sum(self.graph.blocks[i].weight_bytes for i in self.owned(segment))

    def received_bytes(self, segment: int) -> int:
        """Bytes that one rank of ``segment`` receives per asynchronous call; without compression, per computing call."""
        return sum(self.crossing_bytes(i) for i in self.incoming(segment))

    def kept_bytes(self, segment: int) -> int:
        """Bytes that values of other segments take on a rank's device at most, beside what the model needs for a call.

        Four times what it receives: the two latest values, the next one on its way, and what stands in for it. Twice what it
        sends: of this call and of the one before. Of a transformer, the hidden states that its own blocks' changes are taken
        from, and what stands in for those that no block reads here, once per layout; other networks keep early values anyway.
        """
        blocks, own = self.graph.blocks, set(self.owned(segment))
        incoming = set(self.incoming(segment))
        read = {i for other in range(self.plan.segments) if other != segment for i in self.incoming(other) if i in own}
        kept = 4 * sum(blocks[i].output_bytes for i in incoming) + 2 * sum(blocks[i].output_bytes for i in read)
        if self.hidden is not None:
            carriers = {self.graph.find(name): index for name, index in self.hidden.carriers.items()}
            kept += max(blocks[i].outputs[index].nbytes for i, index in carriers.items())
            kept += sum(meta.nbytes for meta in {m for i in carriers.keys() - own - incoming for m in blocks[i].outputs})
        return kept

    def crossing_bytes(self, block: int) -> int:
        """Bytes in which the output of a block reaches one rank in an asynchronous call."""
        return sum(compressed(meta, self.plan.compression).nbytes for meta in self.graph.blocks[block].outputs)

    @property
    def bytes_per_call(self) -> int:
        """Bytes that all ranks of a branch together send per asynchronous call (which serves ``stride`` steps)."""
        return sum(self.received_bytes(self.plan.segment_of_rank(rank)) for rank in range(self.plan.branch_size))


def mac_costs(graph: BlockGraph) -> list[float]:
    """Cost of each block in MACs, at least one, so that a norm cannot be split off for free."""
    return [max(1, block.macs) for block in graph.blocks]


def place(
    graph: BlockGraph,
    plan: Plan,
    speeds: Sequence[float] | None = None,
    costs: Sequence[float] | None = None,
    pause: float = 0.0,
    room: Sequence[float] | None = None,
    bandwidth: float = math.inf,
) -> Placement:
    """Turn ``plan`` into a placement of the blocks of ``graph``.

    Args:
        speeds: relative speed of each device, in rank order; equal if ``None``. Where the plan names its cuts, only what it costs
            depends on them.
        costs: cost of each block, such as seconds from :func:`~.profile.block_seconds`; MACs if ``None``.
        pause: for how long, in the unit of ``costs``, the last segment is idle between two calls, while the caller works: it is
            given so much less to do than the others, which are not waited for.
        room: bytes of weights that each device can hold, which shares are then made to fit, if that is possible at all.
        bandwidth: bytes between two devices per unit of ``costs``. What a segment receives should take no longer than the slowest
            segment: then it hides behind computing.

    Raises:
        PlanError: unknown cut, cuts out of order, more segments than blocks, or wrong speeds, costs, room or bandwidth.
    """
    if plan.segments > len(graph.blocks):
        raise PlanError(f"segments={plan.segments}, but this model has only {len(graph.blocks)} blocks: choose fewer segments")
    costs = mac_costs(graph) if costs is None else list(costs)
    if len(costs) != len(graph.blocks) or not all(0 < cost < float("inf") for cost in costs):
        raise PlanError(f"costs: give {len(graph.blocks)} positive numbers, one per block, not {costs}")
    if speeds is None:
        speeds = [1.0] * plan.world_size
    if len(speeds) != plan.world_size or not all(0 < s < float("inf") for s in speeds):
        raise PlanError(f"speeds={list(speeds)}: give {plan.world_size} positive numbers, one per device")
    # replicas of the last segment, and branches, work side by side: the slowest, or smallest, counts
    per_segment = _least(speeds, plan)
    relative = [speed / max(speeds) for speed in per_segment]
    if plan.cuts is not None:
        starts = [graph.find(cut) for cut in plan.cuts]
        if any(a >= b for a, b in itertools.pairwise(starts)):
            raise PlanError(
                f"cuts out of order: {', '.join(plan.cuts)} begin at blocks {starts}; name them in execution order, each once"
            )
        return Placement(graph, plan, starts, costs, relative)
    if room is not None and len(room) != plan.world_size:
        raise PlanError(f"room={list(room)}: give {plan.world_size} numbers of bytes, one per device")
    if not bandwidth > 0:
        raise PlanError(f"bandwidth={bandwidth}: give a positive number of bytes per unit of costs")
    rooms = _least(room or [math.inf] * plan.world_size, plan)
    if plan.segments == 1:
        return Placement(graph, plan, (0,), costs, relative)
    ahead = bool(plan.forecast)
    busy = [*costs[:-1], costs[-1] + pause * per_segment[-1]]  # the last block is the last segment's, whatever the cuts
    fresh = ahead and plan.fresh_skips
    searches = (
        best_starts(Arcs(graph, busy, ahead, each, 1 / bandwidth), per_segment, plan.stride, fresh) for each in (rooms, None)
    )
    return Placement(graph, plan, next(starts for starts in searches if starts), costs, relative)


def _least(values: Sequence[float], plan: Plan) -> list[float]:
    """Find for each segment the least of its ranks' values."""
    return [min(v for rank, v in enumerate(values) if plan.segment_of_rank(rank) == d) for d in range(plan.segments)]
