"""Groups in processes that groups of other tests have released: importing PyTorch takes these longer than most tests do."""

import contextlib

from asyncdiff_nodes.engine import IdleWorkers, Plan, RankOptions, WorkerGroup

IDLE = IdleWorkers()


def started(module, plan, *, poll=None, compile=None, **options) -> WorkerGroup:
    """A group on the CPU, one thread per rank."""
    ranks = RankOptions(threads_per_rank=1, idle=IDLE, poll=poll, compile=compile)
    return WorkerGroup(module, plan, ["cpu"] * plan.world_size, ranks=ranks, **options)


def released(group: WorkerGroup) -> None:
    """End the group; others may have its processes."""
    IDLE.absorb(group.release())


@contextlib.contextmanager
def running(module, plan: Plan, **options):
    """A group as :func:`started`, for a while."""
    group = started(module, plan, **options)
    try:
        yield group
    finally:
        released(group)
