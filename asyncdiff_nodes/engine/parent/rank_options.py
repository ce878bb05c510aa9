"""Options for the ranks of a group: how they are started, and waited for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from asyncdiff_nodes.engine.errors import DeviceError

from .worker_processes import IdleWorkers


@dataclass(frozen=True)
class RankOptions:
    """Options for the ranks of a :class:`~.group.WorkerGroup`: how they are started, and waited for.

    Attributes:
        threads_per_rank: intra-op threads of a rank; ``None`` shares the parent's threads among the ranks.
        prepare: picklable; called in every rank before the model's classes are imported.
        compile: arguments of ``torch.compile`` for the blocks of each rank, which are then compiled in its first calls, each for
            itself; without CUDA graphs, whose outputs the next call overwrites. Results then differ by rounding.
        start_timeout, call_timeout: seconds until all ranks must be ready, and until a call must be answered.
        staged: pairs of devices, by name, that exchange values through the host's memory even if they could do so directly.
        idle: processes that other groups released; those for the group's devices are taken.
        poll: called again and again while waiting; what it raises interrupts the call, after which ``begin`` starts afresh.

    Raises:
        DeviceError: not a number of threads.
    """

    threads_per_rank: int | None = None
    prepare: Callable[[], None] | None = None
    compile: Mapping[str, Any] | None = None
    start_timeout: float = 300.0
    call_timeout: float = 300.0
    staged: Collection[frozenset[str]] = ()
    idle: IdleWorkers | None = None
    poll: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        threads = self.threads_per_rank
        whole = isinstance(threads, int) and not isinstance(threads, bool)
        if threads is not None and (not whole or threads < 1):
            raise DeviceError(f"threads_per_rank={threads!r}: give a whole number of 1 or more, or None")
