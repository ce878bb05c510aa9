"""Messages to one rank: the caller never waits for a rank that does not read."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from asyncdiff_nodes.engine.wire import Outgoing

_ROOM = 8  # messages: weights wait here on their way


class Outbox:
    """Writes messages at once as far as the pipe takes them, which is all of a call's; the rest is a thread's to write."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._waiting: deque[Outgoing | None] = deque()  # the first of them is being written
        self._gone = False  # the rank: who reads from it says how
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, daemon=True, name="asyncdiff-write")
        self._thread.start()

    def post(self, header: Any, tensors: Sequence[torch.Tensor], timeout: float) -> bool:
        """Send a message; returns whether there was room for it within ``timeout`` seconds. There is none if the rank is gone."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._waiting) < _ROOM and not self._gone, timeout):
                return False
            message = Outgoing(header, tensors)
            try:
                if self._waiting or not message.write_what_fits(self._conn):
                    self._waiting.append(message)
                    self._changed.notify_all()
            except OSError:
                self._gone = True
            return not self._gone

    def close(self) -> None:
        """End the thread, once it has written all or the rank is gone."""
        with self._changed:
            self._waiting.append(None)
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    def _write(self) -> None:
        while (message := self._first()) is not None:
            try:
                message.write(self._conn)
            except OSError:
                self._gone = True
                return
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()

    def _first(self) -> Outgoing | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            return self._waiting[0]
