"""The ranks of one sampling: started, and replaced once if they fail."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from asyncdiff_nodes.engine import (
    AsyncDiffError,
    DeadlineError,
    GroupClosedError,
    OtherPathError,
    Placement,
    RepeatedBlockError,
    WorkerError,
    WorkerGroup,
)
from asyncdiff_nodes.host.workers import repeated
from asyncdiff_nodes.host.workers.found import avoid
from asyncdiff_nodes.host.workers.pool import POOL, GroupRequest, Places
from asyncdiff_nodes.host.workers.skeleton import fingerprint_of

log = logging.getLogger(__name__)

FAILURES = (WorkerError, DeadlineError)  # errors of ranks that failed

_TAKEN = "ComfyUI took the ranks' memory back before the first call; their weights were sent again"

_MOST = 4  # how often blocks are placed anew in a sampling, for calls that take other paths than those before

Result = TypeVar("Result")


class Ranks:
    """A group of ranks, and another one in its place if they fail.

    Args:
        request: the request to the pool, each time.
        replace: whether ranks that fail are replaced, once.
        note: called with a text for the user.

    Attributes:
        group: None before the first group is ready, and after the ranks were given up.
        slots: the place of each of the sampling's ControlNets in the group.
    """

    def __init__(self, request: GroupRequest, replace: bool, note: Callable[[str], None]) -> None:
        self.group: WorkerGroup | None = None
        self.slots: list[int] = []
        self._request, self._replace, self._note = request, replace, note
        self._begin: Callable[[WorkerGroup], None] | None = None
        self._have_computed = False
        self._placed_anew = 0
        self._failed: str | None = None  # how the group did that was replaced

    def prepare(self) -> None:
        """Get a group that is there already; else make room for one. Raises as :meth:`start`."""
        repeated.check(self._request)
        self.group = POOL.prepare(self._request)
        if self.group is not None:
            self.slots = POOL.slots(self.group, self._request.nets)

    def start(self, entry: str, places: Places, arguments: dict[str, Any]) -> None:
        """Get the first group, unless it is there, for a call with these ``arguments``; see :class:`.pool.GroupRequest`.

        Raises as :meth:`.pool.Pool.acquire`, and where such a group has failed repeatedly.
        """
        self._request = replace(self._request, entry=entry, places=places, arguments=arguments)
        self._try(lambda: None)

    def place_anew(self, arguments: dict[str, Any], error: OtherPathError) -> None:
        """Get a group whose blocks suit a call with these ``arguments``, which raised ``error`` on the present one.

        Raises:
            OtherPathError: ``error``, if that was done too often; and whatever :meth:`start` raises. The next call then has the
                blocks where they were.
        """
        if self._placed_anew == _MOST:
            raise error
        self._placed_anew += 1
        if isinstance(error, RepeatedBlockError):  # such as one that also embeds pictures to refer to
            avoid(fingerprint_of(self._request.patcher), error.block)
        log.info("AsyncDiff: placing blocks anew: %s", error)
        POOL.discard(self.group)
        before, self.group = self._request, None
        self._request = replace(before, arguments=arguments)
        try:
            self._enter()
        except BaseException:
            self._request = before
            raise

    def begin(self, first: Callable[[], None], begin: Callable[[WorkerGroup], None]) -> None:
        """Begin the sampling with ``first``; a group that replaces another one begins with ``begin``."""
        self._try(first)
        self._begin = begin

    def begin_anew(self, begin: Callable[[WorkerGroup], None]) -> None:
        """Begin the sampling in another way, from the current call on."""
        self._begin = begin
        self._try(self.resume)

    def resume(self) -> None:
        """Begin at the current call: nothing that was computed before is used."""
        self._begin(self.group)

    def compute(self, work: Callable[[], Result]) -> Result:
        """Return the result of ``work``, a call of the group; if its ranks fail, others do it.

        Raises:
            WorkerError, DeadlineError: the ranks failed and are not replaced.
            GroupClosedError: the host took their memory back after the first call.
        """
        result = self._try(work)
        self._have_computed = True
        return result

    def move(self, placement: Placement) -> None:
        """Move the blocks to where ``placement`` has them."""
        POOL.move(self.group, placement, self._request.patcher)

    def give_up(self) -> None:
        """Give the group back, and continue without ranks."""
        if self.group is not None:
            POOL.give_back(self.group)
            self.group = None
        POOL.bury()

    def close(self) -> None:
        """End the sampling, and free the memory of the devices for what comes next."""
        if self.group is None:
            return
        POOL.give_back(self.group)
        if not self.group.closed:
            repeated.succeeded(self._request)
            with contextlib.suppress(AsyncDiffError):  # the next run then starts other ranks
                self.group.tidy()

    def _try(self, work: Callable[[], Result]) -> Result:
        """Return the result of ``work``. If the ranks fail, others do it, once per sampling.

        Nothing of the first ranks' work is used from then on: each stream's next call is its first on the others, as if the
        sampling began there.
        """
        try:
            if self.group is None:
                self._enter()
            return work()
        except (*FAILURES, GroupClosedError) as error:
            taken = isinstance(error, GroupClosedError)
            log.warning("AsyncDiff: the ranks %s", "are gone" if taken else "failed", exc_info=error)
            # before the first call a ControlNet may need the memory once, to encode its picture; later it is needed for good
            if not self._replace or (taken and self._have_computed):
                repeated.remember(self._request, self._failed, error)
                raise
            self._replace, self._failed = False, repeated.kind(error)
            fewer = ""
            if repeated.lacked_memory(error):
                placement = self._request.limits.tried if self.group is None else self.group.placement
                self._request = self._request.with_fewer_weights(error.rank, placement)
                fewer = f", with fewer weights on {self._request.devices[error.rank]}"
            self._note(_TAKEN if taken else f"{brief(error)}; new worker processes have taken over{fewer}")
        try:
            self._enter()
            return work()
        except FAILURES as error:
            repeated.remember(self._request, self._failed, error)
            raise

    def _enter(self) -> None:
        """Get a group. If the run has begun already, have it begin at the current call."""
        if self.group is not None:  # it failed, or the host took its weights
            POOL.give_back(self.group)
        self.group = POOL.acquire(self._request)
        self.slots = POOL.slots(self.group, self._request.nets)
        if self._begin is not None:
            self.resume()


def brief(error: AsyncDiffError) -> str:
    """The first line of the error's message. The rest is a rank's traceback, which is in the log."""
    return str(error).partition("\n")[0]
