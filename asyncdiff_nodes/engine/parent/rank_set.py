"""The ranks of a group, as their parent sees them, wherever they run: start, talk, watch, end."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from asyncdiff_nodes.engine.errors import DeadlineError, GroupClosedError, WorkerError
from asyncdiff_nodes.engine.rank.links import RankLocation
from asyncdiff_nodes.engine.rendezvous import Rendezvous

from .worker_processes import IdleWorkers

POLL = 0.05  # seconds between looks at the deadline, the interrupt and the ranks

Message = tuple[int, Any, list[torch.Tensor]]  # rank, header, tensors


class RankSet(ABC):
    """A set of worker processes, each of which runs a :class:`~.message_loop.Rank`.

    Nothing blocks the caller beyond its deadline. Where they run, and what carries the messages, is for subclasses to say; of
    these messages, ``("failure", cause, traceback, when)`` and ``("died", ...)`` say that a rank is gone.
    """

    def __init__(self, poll: Callable[[], None] | None) -> None:
        """``poll`` is called while waiting and may raise, to interrupt."""
        self._poll = poll
        self._looked = time.monotonic()  # at the deadline and the interrupt
        self._closing = threading.Event()
        self._lost: tuple[int, Any] | None = None  # the first rank that failed, and its last words
        self._failure = ""  # text: an error holds the frames that it went through, and these the group

    @property
    @abstractmethod
    def pids(self) -> list[int]:
        """Process ids, by rank, on the machine of each."""

    @abstractmethod
    def meet(self, deadline: float) -> tuple[tuple[RankLocation, ...], Rendezvous]:
        """Say where each rank is, and where they find each other; waits until that is known.

        Args:
            deadline: on the monotonic clock.
        """

    @abstractmethod
    def close(self, grace: float = 3.0) -> None:
        """End all processes, politely for ``grace`` seconds. Safe to call again, from any thread."""

    def release(self) -> IdleWorkers:
        """End the group, but for processes that can be ranks of another one, which forget all that they have."""
        self.close()
        return IdleWorkers()

    @abstractmethod
    def _post(self, rank: int, header: Any, tensors: Sequence[torch.Tensor]) -> bool:
        """Send a message, unless ``rank`` has so many before it that there is no room within :data:`POLL`."""

    @abstractmethod
    def _next(self) -> Message | None:
        """Take the next message of any rank; None where there is none within :data:`POLL`."""

    @abstractmethod
    def _explain(self, rank: int, header: Any) -> WorkerError:
        """Say which rank began it, and how, if ``rank`` said ``header`` last."""

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called or a rank failed."""
        return self._closing.is_set() or self._lost is not None

    def send(self, rank: int, header: Any, tensors: Sequence[torch.Tensor] = (), *, deadline: float) -> None:
        """Queue a message for ``rank``; waits while its queue is full.

        Args:
            deadline: on the monotonic clock.
        """
        self._check_open()
        while not self._post(rank, header, tensors):
            self._check(deadline, f"rank {rank} to take a message")

    def next_message(self, deadline: float, what: str) -> Message:
        """Wait for the next message of any rank.

        Args:
            deadline: on the monotonic clock.
            what: what is waited for, for the error message.

        Raises:
            WorkerError: a rank failed or died. The group is closed.
            DeadlineError: none came in time. The group is closed.
        """
        while True:
            self.look(deadline, what)
            message = self._next()
            if message is None:
                self._check(deadline, what)
                continue
            rank, header, _ = message
            if header[0] not in ("failure", "died"):
                return message
            self._fail(self._explain(rank, header))

    def look(self, deadline: float, what: str) -> None:
        """Look at the deadline, the interrupt and the ranks, unless that was done within :data:`POLL`.

        Args, Raises: as of :meth:`next_message`.
        """
        if time.monotonic() - self._looked > POLL:
            self._check(deadline, what)

    def _check_open(self) -> None:
        if self._failure:
            raise GroupClosedError(f"this worker group has failed before ({self._failure}): start a new one")
        if self._closing.is_set():
            raise GroupClosedError("this worker group is closed: start a new one")

    def _check(self, deadline: float, what: str) -> None:
        self._looked = time.monotonic()
        self._check_open()
        if self._lost is not None:  # a sender sees it here: nobody empties the queue of a rank that is gone
            self._fail(self._explain(*self._lost))
        if self._poll is not None:
            self._poll()
        if time.monotonic() > deadline:
            self._fail(
                DeadlineError(f"waited too long for {what}; all ranks were stopped. Raise the timeout if they were only slow")
            )

    def _fail(self, error: Exception) -> None:
        self._failure = str(error).partition("\n")[0]
        self.close(grace=0)
        raise error

    def _heard(self, rank: int, header: Any) -> None:
        """Note it if these were the last words of the first rank that failed."""
        if header[0] in ("failure", "died") and self._lost is None:
            self._lost = rank, header
