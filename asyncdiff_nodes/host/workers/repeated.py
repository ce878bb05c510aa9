"""Failures that repeat: what failed twice in a row, in the same way, is not tried again until something changes.

Otherwise a model that does not fit, or a link that hangs, would cost each prompt two starts of ranks before the host samples.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import comfy.model_management
import torch

from asyncdiff_nodes.engine import AsyncDiffError, DeadlineError, WorkerError
from asyncdiff_nodes.engine.devices import on_cluster

if TYPE_CHECKING:
    from .pool import GroupRequest

_MORE = 2**28  # bytes of memory: worth another try where there was too little


class RepeatedFailureError(AsyncDiffError, RuntimeError):
    """Ranks as these have failed twice in the same way."""


@dataclass(frozen=True)
class _Failure:
    """A failure that repeated itself: what the ranks said, and the memory that was free then, where they lacked it."""

    cause: str
    free: Sequence[float] | None


# of each model, by circumstances: what is not tried again; and how the last sampling failed, which may be the first of two
_failed: weakref.WeakKeyDictionary[Any, dict[Any, _Failure]] = weakref.WeakKeyDictionary()
_last: weakref.WeakKeyDictionary[Any, dict[Any, str | None]] = weakref.WeakKeyDictionary()


def check(request: GroupRequest) -> None:
    """Raise :class:`RepeatedFailureError` if ranks for this request have failed twice in the same way."""
    failure = _failed.get(request.patcher.model, {}).get(_circumstances(request))
    if failure is None or (failure.free is not None and _more_is_free(request.devices, failure.free)):
        return
    raise RepeatedFailureError(
        f"with this model, size and devices the ranks failed twice in the same way: {failure.cause}. They are not started again "
        "before one of these changes, memory becomes free, or you press Stop workers in the AsyncDiff panel"
    )


def remember(request: GroupRequest, first: str | None, second: AsyncDiffError) -> None:
    """Note how two groups for this request failed, if that was alike and their own doing.

    Args:
        first: the :func:`kind` of the first failure; None if there was none in this sampling.
    """
    last = _last.setdefault(request.patcher.model, {})
    first, last[_circumstances(request)] = first or last.get(_circumstances(request)), kind(second)
    if first is not None and first == kind(second):
        free = _free(request.devices) if "OutOfMemory" in first else None
        failure = _Failure(str(second).partition("\n")[0], free)
        _failed.setdefault(request.patcher.model, {})[_circumstances(request)] = failure


def succeeded(request: GroupRequest) -> None:
    """Note that ranks for this request have just finished a sampling."""
    _last.get(request.patcher.model, {}).pop(_circumstances(request), None)


def forget() -> None:
    """Have everything tried again."""
    _failed.clear()
    _last.clear()


def lacked_memory(error: AsyncDiffError) -> TypeGuard[WorkerError]:
    """Whether a rank ran out of memory on its device."""
    return "OutOfMemory" in (kind(error) or "")


def kind(error: AsyncDiffError) -> str | None:
    """How ranks failed: the class of a rank's exception, or a deadline; None where a process was ended from outside."""
    if isinstance(error, WorkerError):
        lines = (error.worker_traceback or "").strip().splitlines()
        return next((line.partition(":")[0] for line in reversed(lines) if line and not line[0].isspace()), None)
    return "deadline" if isinstance(error, DeadlineError) else None


def _circumstances(request: GroupRequest) -> Any:
    plan = request.plan
    return plan.segments, plan.stride, plan.branches, plan.bands, plan.cuts, tuple(request.devices), tuple(request.shape)


def _more_is_free(devices: Sequence[str], then: Sequence[float]) -> bool:
    return any(now > before + _MORE for now, before in zip(_free(devices), then, strict=True))


def _free(devices: Sequence[str]) -> list[float]:
    """Bytes that are free on each device of this machine."""
    return [0.0 if on_cluster(device) else comfy.model_management.get_free_memory(torch.device(device)) for device in devices]
