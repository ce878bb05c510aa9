"""Rendezvous of the two ends of a link: each reads in a store what the other one has set there.

Ranks of one machine have a store each, and what is set in one the parent hands on to the others, through the pipes that it has
to them anyway: that takes no file and no port. Those of a cluster share one that its first rank opens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

#: Host and port of a store; None where the parent hands on what ranks set.
Rendezvous = tuple[str, int] | None


def open_store(where: Rendezvous, timeout: float, send: Callable[..., None], receive: Callable[[], Any] | None) -> dist.Store:
    """Open the store of a group's ranks, as one of them sees it; to be kept for as long as there are links.

    Args:
        send, receive: as of :class:`PipeStore`.
    """
    if where is None:
        assert receive is not None, "the parent hands on what ranks set"
        return PipeStore(send, receive)
    return dist.TCPStore(*where, timeout=timedelta(seconds=timeout))


if TYPE_CHECKING or dist.is_available():  # noqa: SIM108  (a type checker understands this form only)
    _Store = dist.Store
else:  # some builds for Windows have no torch.distributed
    _Store = object


class PipeStore(_Store):
    """The store of one rank, for as long as whoever is at the other end of its pipe takes care of the others.

    Args:
        send: takes a message to the other stores.
        receive: waits for the next message and returns its header and tensors.
    """

    def __init__(self, send: Callable[..., None], receive: Callable[[], Any]) -> None:
        super().__init__()
        self._send, self._receive = send, receive
        self._values: dict[str, bytes] = {}
        self._thread = threading.get_ident()

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # PyTorch's stubs say str; it passes bytes
        """Set a value, here and in the other stores."""
        self._values[key] = value
        if threading.get_ident() == self._thread:  # NCCL's own threads note errors, at any time: the pipe is not theirs
            self._send(("meet", key, value))

    def take(self, key: str, value: bytes) -> None:
        """Take what another store has sent."""
        self._values[key] = value

    def get(self, key: str) -> bytes:
        """Wait for a value."""
        self.wait([key])
        return self._values[key]

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of these keys are there."""
        return all(key in self._values for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait for these keys; it is for the other end of the pipe to lose patience."""
        while not self.check(keys):
            (verb, *rest), _ = self._receive()
            if verb != "meet":
                raise EOFError  # the group is over before its links were there
            self.take(*rest)
