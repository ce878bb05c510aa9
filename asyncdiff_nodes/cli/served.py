"""A process that computes on demand, asked and answered through a pipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch.multiprocessing as mp

from asyncdiff_nodes.engine import WorkerError


class Served:
    """A new process that runs ``serve(connection, *args)`` until the other end of its connection is closed.

    Args:
        name: what it computes, in words, for error messages.
    """

    def __init__(self, name: str, serve: Callable[..., None], *args: Any) -> None:
        context = mp.get_context("spawn")
        self._name = name
        self._conn, child = context.Pipe()
        self._process = context.Process(target=serve, args=(child, *args), daemon=True, name="asyncdiff-measured")
        self._process.start()
        child.close()

    def send(self, what: Any) -> None:
        """Ask for something. Raises :class:`WorkerError` if the process has ended."""
        try:
            self._conn.send(what)
        except OSError:
            self._died()

    def receive(self) -> Any:
        """Wait for its next answer. Raises :class:`WorkerError` if the process has ended."""
        try:
            return self._conn.recv()
        except (EOFError, OSError):
            self._died()

    def _died(self) -> NoReturn:
        self._process.join(5)
        raise WorkerError(f"the process of {self._name} ended with code {self._process.exitcode}", rank=-1) from None

    def close(self) -> None:
        """End the process."""
        self._conn.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
