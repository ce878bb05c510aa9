"""Worker processes of this machine: started, ended, and kept in between for another group."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing as mp

from asyncdiff_nodes import spawned
from asyncdiff_nodes.engine import wire

CONTEXT = mp.get_context("spawn")
_START_LOCK = threading.Lock()


@dataclass(frozen=True)
class WorkerProcess:
    """A process that is a rank, or was one and can be one again.

    Attributes:
        device: that it was started for, and may hold a context of.
        conn: carries messages both ways; see :mod:`.wire`.
        death: closed, it ends the process, as does the parent's end.
    """

    device: str
    process: Any
    conn: Connection
    death: Connection

    @classmethod
    def start(cls, device: str, name: str) -> WorkerProcess:
        """Start a new process.

        Raises:
            OSError: no room for it.
        """
        conn, child_conn = wire.pipe(CONTEXT)
        child_death, death = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=spawned.main, args=(child_conn, child_death), name=name, daemon=True)
        try:
            with spawning():
                process.start()
        except BaseException:
            conn.close()
            death.close()
            raise
        finally:
            child_conn.close()  # so that end-of-file is seen when the child is gone
            child_death.close()
        return cls(device, process, conn, death)


def end(workers: Sequence[WorkerProcess], grace: float) -> None:
    """Wait for processes that were asked to end, for ``grace`` seconds, then terminate, then kill."""
    processes = [worker.process for worker in workers]
    _join(processes, grace)
    for worker in workers:
        worker.death.close()
    for process in processes:
        process.terminate()
    _join(processes, 1.0)
    for process in processes:
        if process.is_alive():
            process.kill()
    _join(processes, 5.0)


def _join(processes: Sequence[Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(timeout=max(0.0, deadline - time.monotonic()))


class IdleWorkers:
    """Processes that a group has released: they have their imports and their device's context, but no model.

    They end with :meth:`close`, or when this object is forgotten, but for those that were taken.
    """

    def __init__(self, workers: Sequence[WorkerProcess] = ()) -> None:
        self._workers = list(workers)
        weakref.finalize(self, _end_idle, self._workers)

    def take(self, device: str) -> WorkerProcess | None:
        """Take one that was started for ``device`` and is alive; None if there is none."""
        for worker in self._workers:
            if worker.device == device and worker.process.is_alive():
                self._workers.remove(worker)
                return worker
        return None

    def absorb(self, other: IdleWorkers) -> None:
        """Take all that ``other`` has."""
        self._workers += other._workers
        other._workers.clear()

    def close(self) -> None:
        """End those that are left. Safe to call again."""
        _end_idle(self._workers)


def _end_idle(workers: list[WorkerProcess]) -> None:
    end(workers, 0.0)
    for worker in workers:
        worker.conn.close()
    workers.clear()


@contextlib.contextmanager
def spawning() -> Iterator[None]:
    """Keep from spawn, while it lasts, what it must not take from this process.

    The main module, which it would import again in the child: a worker needs nothing of it, and running it again would start
    a second server (a host's main.py), or start workers without end (a script without a ``__main__`` guard).

    The order of ``sys.path``: a host and its packs put folders in front, when the standard library is long imported. In the
    child it is not, and a ``logging.py`` in one of them would take its place: the standard library goes first.
    """
    standard = {os.path.dirname(os.__file__), sysconfig.get_config_var("DESTSHARED")}
    with _START_LOCK:
        main, path = sys.modules["__main__"], sys.path[:]
        hidden: dict[str, Any] = {name: main.__dict__[name] for name in ("__file__", "__spec__") if name in main.__dict__}
        main.__dict__.pop("__file__", None)
        main.__spec__ = None
        sys.path.sort(key=lambda folder: folder not in standard)
        try:
            yield
        finally:
            main.__dict__.update(hidden)
            sys.path[:] = path
