"""One model at one size: plans measured with real processes, or projected from the measured seconds of every block.

Cuts balance these block times. Rounds alternate between one unrouted copy alone, two
unrouted copies at once (how much the machine's devices slow each other down: its scaling), and a burst of asynchronous calls of
the group or a whole run, so that a noisy machine disturbs all three alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from asyncdiff_nodes.engine import Plan, RankOptions, WorkerGroup, family_of, place, trace
from asyncdiff_nodes.engine.inputs import Inputs
from asyncdiff_nodes.engine.planning.clock import simulate, step_seconds
from asyncdiff_nodes.engine.planning.run_times import Costs, Link

from .baseline import Baseline
from .tables import MIB
from .zoo import PUBLISHED_SPEEDUPS, Model

BURST = 3  # asynchronous computing calls per round


@dataclass(frozen=True)
class Setting:
    """What all measurements of one command share.

    Attributes:
        batch: of a call.
        devices: of this machine; plans that need more are projected.
        threads: per CPU rank, and of an unrouted copy beside them.
        link, round_trip: as in :class:`~asyncdiff_nodes.engine.planning.run_times.Costs`, measured.
    """

    batch: int
    dtype: torch.dtype
    devices: tuple[str, ...]
    threads: int
    link: Link
    round_trip: float

    def has_devices_for(self, plan: Plan) -> bool:
        """Whether ``plan`` can be measured here."""
        return plan.world_size <= len(self.devices)


class Bench:
    """The unrouted copies of a model at one size, and what is measured beside them.

    Args:
        inputs: ``(args, kwargs)`` of a call.
        costs: number of branches -> of a call of the model with their part of the batch; those for 1 as measured in ``copies``,
            all at once.
    """

    def __init__(self, setting: Setting, model: Model, inputs: Any, copies: list[Baseline], costs: Mapping[int, Costs]) -> None:
        self._setting, self._model, self._inputs, self._copies, self._costs = setting, model, inputs, copies, costs
        skeleton = model.skeleton(setting.dtype)
        self._family = family_of(skeleton, *inputs)
        self._graphs = {n: trace(skeleton, self._family, *self._family.parts(*inputs, n)[0]) for n in costs}

    def projected(self, plan: Plan) -> dict[str, Any]:
        """An asynchronous step on devices each of which is like the one that the blocks were measured on."""
        costs = self._costs[plan.branches]
        placement = place(self._graphs[plan.branches], plan, costs=costs.blocks, pause=costs.round_trip)
        step, ideal = step_seconds(placement, costs), plan.branches * plan.stride / max(placement.shares)
        return {
            **self._facts(plan, placement, plan.branches * placement.bytes_per_call),
            "projected": True,
            **_speeds(self._costs[1].unrouted, step, step, ideal),
        }

    def steps(self, plan: Plan, steps: int) -> dict[str, Any]:
        """Asynchronous steps, in bursts; what the rest of this machine does, it does to the unrouted copies, too."""
        bursts, alone, both, gaps = [], [], [], []
        with self._group(plan) as group:
            self._prime(group, steps)
            group.begin(_schedule(steps))
            done = plan.warmup
            for k in range(done):
                self._call(group, k, steps)
            while done < steps:
                length = min(BURST * plan.stride, steps - done)
                group.stats()  # waits until every rank is done: no burst profits from a slower rank's rest
                begin = time.perf_counter()
                for k in range(done, done + length):
                    self._call(group, k, steps)
                records = group.stats().records
                # a shorter last burst would count its ranks' rest in full: leave it out
                if length == BURST * plan.stride or not bursts:
                    bursts.append((time.perf_counter() - begin) / length)
                    gaps += _gaps([r for r in records if r.rank == plan.segments - 1 and r.call >= done])
                    alone.append(_timed(self._copies[:1]))
                    both.append(_timed(self._copies))
                done += length
            stats, placement = group.stats(), group.placement
        unrouted, together, step = statistics.median(alone), statistics.median(both), statistics.median(bursts)
        # every rank profits or suffers from its neighbours as the two copies do
        ideal = unrouted / together * plan.branches * plan.stride / max(placement.shares)
        costs = self._scaled(plan, together)
        costs = replace(costs, round_trip=statistics.median(gaps) if gaps else costs.round_trip)
        waited = [record for record in stats.records if not record.synchronous]
        return {
            **self._facts(plan, placement, stats.bytes_per_call),
            "projected": False,
            **_speeds(unrouted, step, step_seconds(placement, costs), ideal),
            "scaling": 2 * unrouted / together,
            "wait_share": sum(r.wait for r in waited) / sum(r.end - r.start for r in waited),
            "step_s_all": bursts,
            "unrouted_s_all": alone,
            "together_s_all": both,
        }

    def run(self, plan: Plan, steps: int, rounds: int = 3) -> dict[str, Any]:
        """Whole runs of a started group, from the first call to the last result."""
        runs, alone, both = [], [], []
        with self._group(plan) as group:
            self._prime(group, steps)
            for _ in range(rounds):
                group.begin(_schedule(steps))
                begin = time.perf_counter()
                for k in range(steps):
                    self._call(group, k, steps)
                runs.append(time.perf_counter() - begin)
                group.stats()
                for _ in range(BURST):
                    alone.append(_timed(self._copies[:1]))
                    both.append(_timed(self._copies))
            stats, placement = group.stats(), group.placement
        seconds, unrouted, together = statistics.median(runs), statistics.median(alone), statistics.median(both)
        # nobody computes beside a synchronous call
        synchronous = plan.warmup + plan.cooldown
        allowed = synchronous + (placement.cost(steps) - synchronous) * together / unrouted
        by_clock = self._run_seconds(plan, placement, steps, unrouted, together)
        return {
            **self._facts(plan, placement, stats.bytes_per_call),
            "projected": False,
            "steps": steps,
            **_speeds(unrouted, seconds / steps, by_clock / steps, steps / allowed),
            "scaling": 2 * unrouted / together,
            "run_s_all": runs,
            "unrouted_s_all": alone,
            "together_s_all": both,
        }

    def _run_seconds(self, plan: Plan, placement: Any, steps: int, unrouted: float, together: float) -> float:
        """A whole run by the clock: as fast as alone in synchronous calls, as with a neighbour in the others."""
        slow = simulate(placement, plan, steps, self._scaled(plan, together)).calls
        fast = simulate(placement, plan, steps, self._scaled(plan, unrouted)).calls
        begin, end = plan.warmup - 1, steps - plan.cooldown - 1
        return fast[begin].result + (slow[end].result - slow[begin].result) + (fast[-1].result - fast[end].result)

    def _facts(self, plan: Plan, placement: Any, nbytes: float) -> dict[str, Any]:
        ranks = range(plan.world_size)
        macs = place(self._graphs[plan.branches], plan)
        return {
            "plan": f"{plan.segments},{plan.stride},{plan.warmup}",
            "segments": plan.segments,
            "stride": plan.stride,
            "warmup": plan.warmup,
            "branches": plan.branches,
            "fresh_skips": plan.fresh_skips,
            "devices": plan.world_size,
            "cuts": list(placement.cuts),
            "max_share": max(placement.shares),  # of measured block time
            "predicted_speedup": plan.branches * plan.stride / max(macs.shares),
            "mib_per_call": nbytes / MIB,
            "weights_mib": [placement.weight_bytes(plan.segment_of_rank(rank)) / MIB for rank in ranks],
            "published": None
            if plan.branches > 1
            else PUBLISHED_SPEEDUPS.get(self._model.name, {}).get((plan.segments, plan.stride)),
        }

    def _scaled(self, plan: Plan, whole: float) -> Costs:
        """Those for ``plan`` where a call of the whole model takes ``whole``."""
        costs, factor = self._costs[plan.branches], whole / self._costs[1].unrouted
        return replace(costs, blocks=[seconds * factor for seconds in costs.blocks], glue=costs.glue * factor)

    def _group(self, plan: Plan) -> WorkerGroup:
        costs = self._costs[plan.branches]
        return WorkerGroup(
            self._model.skeleton(self._setting.dtype),
            plan,
            self._setting.devices[: plan.world_size],
            example_inputs=self._inputs,
            weights=self._model.random_weights(self._setting.dtype),
            estimate=lambda _: (costs.blocks, [1.0] * plan.world_size, costs.round_trip),
            ranks=RankOptions(threads_per_rank=self._setting.threads, call_timeout=1800),
        )

    def _prime(self, group: WorkerGroup, steps: int) -> None:
        """One call of each kind: the first ones pay for the trace and for memory."""
        group.begin(_schedule(steps))
        for index in range(min(steps, group.plan.warmup + 1)):
            self._call(group, index, steps)

    def _call(self, group: WorkerGroup, index: int, steps: int) -> None:
        """With inputs that can be foreseen, as those of a sampler: nobody works ahead on others."""
        given = Inputs.take(*self._inputs, self._family.timestep)
        leaves = list(given.leaves)
        for sample in given.samples(self._family.sample):
            leaves[sample] = leaves[sample] * (1 - index / steps)
        args, kwargs = replace(given, leaves=leaves, timestep=given.timestep_like(_schedule(steps)[index])).arguments()
        group(*args, **kwargs)


def _schedule(steps: int) -> list[int]:
    return [round(999 * (1 - i / steps)) for i in range(steps)]


def _speeds(unrouted: float, step: float, by_clock: float, ideal: float) -> dict[str, float]:
    """Seconds per step without the plan, with it, and as the clock has it; ``ideal`` is a speed-up."""
    return {
        "unrouted_s": unrouted,
        "step_s": step,
        "speedup": unrouted / step,
        "ideal": ideal,
        "share_of_ideal": unrouted / step / ideal,
        "projected_speedup": unrouted / by_clock,
    }


def _gaps(records: Sequence[Any]) -> list[float]:
    return [after.start - before.end for before, after in pairwise(records)]


def _timed(copies: list[Baseline]) -> float:
    for copy in copies:
        copy.start()
    return max([copy.wait() for copy in copies])
