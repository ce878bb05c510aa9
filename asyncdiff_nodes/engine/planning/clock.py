"""Time that a run takes on given devices and links: a discrete-event model of the engine, without tensors or processes.

It follows the same schedule (:func:`~.schedule.call_at`, :func:`~.schedule.calls_ahead`) by the rules of
:mod:`asyncdiff_nodes.engine.rank`:

* A rank takes its messages in order, and begins with the next one when it is done, however late.
* It goes through the model's blocks in execution order. Its own take their time. At another's, whose value it reads, it waits: in
  a synchronous call for this call's value, in an asynchronous one until no more than the newest is still on its way.
* A value leaves as soon as it is made and does not hold its rank up; but no rank begins a call before what it sent in the call
  before the last is through.
* In a synchronous call it does so for one micro-batch after the other; the last segment's result is there after the last of them.
* A call in bands is begun by all ranks together, takes each of them the same time, and carries no value.
* A link carries one value at a time, in the order in which they were made, and none before its receiver has begun the call; a
  direct one none of an asynchronous call before both have computed it.
* The caller waits for the result of its call alone, and not at all for one that came with a batch.

Each rank, each link and the caller is a process of an :class:`~.events.EventLoop`; see :mod:`.run_players`.
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncdiff_nodes.engine.errors import PlanError

from .placement import Placement
from .plan import Plan
from .run_players import RunPlayer
from .run_times import Costs, Timeline, check_numbers


def simulate(placement: Placement, plan: Plan, calls: int, costs: Costs, speeds: Sequence[float] | None = None) -> Timeline:
    """Play a run of ``calls`` calls of one stream through, whose timesteps are known and whose inputs can be foreseen.

    Of one branch, and so of all that are alike: costs are those of its part of the batch.

    Args:
        placement: of the group's blocks.
        plan: of the run; as for ``WorkerGroup.begin``, it may differ from the placement's in warm-up, cool-down, time shift and
            micro-batches, and be smaller in stride and forecast. Micro-batches are taken to cost their part of the whole.
        speeds: of each of the branch's devices, relative to the one that ``costs`` are for; all 1 if None.

    Raises:
        PlanError: no call, or costs or speeds of another number of blocks or ranks.

    Four blocks of 1, 2, 3 and 4 seconds, cut in the middle. The first call takes the sum; later ones as long as the second
    segment does, which never waits for the first one:

    >>> from asyncdiff_nodes.engine.planning.graph import Block, BlockGraph
    >>> from asyncdiff_nodes.engine.planning.placement import place
    >>> blocks = tuple(Block(f"b{i}", (), None, macs=1, weight_bytes=0) for i in range(4))
    >>> chain = BlockGraph(blocks, frozenset({(0, 1), (1, 2), (2, 3)}), 0, 0)
    >>> placement = place(chain, Plan(segments=2, warmup=1, forecast=0, cuts=("b0", "b2")))
    >>> [call.result for call in simulate(placement, placement.plan, 4, Costs((1, 2, 3, 4))).calls]
    [10.0, 17.0, 24.0, 31.0]
    """
    ranks = placement.plan.branch_size
    if calls < 1:
        raise PlanError(f"calls={calls}: a run has at least one")
    check_numbers("blocks", costs.blocks, len(placement), zero=True)
    speeds = [1.0] * ranks if speeds is None else list(speeds)
    check_numbers("speeds", speeds, ranks)
    return RunPlayer(placement, plan, calls, costs, speeds).timeline()


def step_seconds(placement: Placement, costs: Costs, speeds: Sequence[float] | None = None) -> float:
    """Seconds per asynchronous step of a run without end; see :func:`simulate`."""
    plan = placement.plan
    begin = plan.warmup + -(plan.warmup - 1) % plan.stride  # where the first batch does
    # a rank that is a little slower than the others holds them up when it has fallen a whole call behind, and no sooner
    settled = begin + 120 * plan.stride
    end = settled + 8 * plan.stride
    return simulate(placement, plan, end + 1 + plan.cooldown, costs, speeds).pace(settled, end)
