"""Every error the engine raises, as one small tree. Each message names the input, its value and the cure."""

from __future__ import annotations


class AsyncDiffError(Exception):
    """Base of all errors of this package."""


class PlanError(AsyncDiffError, ValueError):
    """A plan that cannot be carried out: unknown cut, cuts out of order, more segments than blocks, W < 1, ..."""


class DeviceError(AsyncDiffError, ValueError):
    """The wrong number of devices, or a device that this machine does not have."""


class UnsupportedModelError(AsyncDiffError, TypeError):
    """A model that cannot be split without changing what it computes, or that cannot be rebuilt in a worker process."""


class OtherPathError(UnsupportedModelError):
    """A call that takes another path through the model than it was split for; it can be split for that one."""


class RepeatedBlockError(OtherPathError):
    """A call that runs a block more than once, for which the model can be split otherwise.

    Attributes:
        block: its name.
    """

    def __init__(self, family: str, block: str) -> None:
        super().__init__(f"family {family}: block {block} runs more than once per call")
        self.block = block


class ScheduleError(AsyncDiffError, RuntimeError):
    """A call that does not fit the announced schedule, or stride > 1 without one."""


class InputChangedError(AsyncDiffError, ValueError):
    """The shape, dtype or structure of an input changed within one denoising run."""


class GroupClosedError(AsyncDiffError, RuntimeError):
    """A call to a worker group that was closed or that has failed before."""


class WeightsUnloadedError(GroupClosedError):
    """A call to a worker group some of whose ranks have no weights now: see :meth:`.WorkerGroup.reload`."""


class WorkerError(AsyncDiffError, RuntimeError):
    """A rank failed; the whole group was shut down.

    Attributes:
        rank: the rank that failed.
        worker_traceback: the traceback inside the worker process, or None if it died without one.
    """

    def __init__(self, message: str, rank: int, worker_traceback: str | None = None) -> None:
        if worker_traceback:
            message = f"{message}\n\nTraceback of rank {rank}:\n{worker_traceback}"
        super().__init__(message)
        self.rank = rank
        self.worker_traceback = worker_traceback


class DeadlineError(AsyncDiffError, TimeoutError):
    """The ranks did not answer within the deadline; the whole group was shut down."""
