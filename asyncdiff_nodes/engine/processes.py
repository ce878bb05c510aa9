"""Ranks as processes of this machine.

The pattern is that of vLLM's multi-process executor: a READY message once the weights are in, a death pipe that ends a child
with its parent, a watch on every process sentinel, one deadline per answer, terminate -> wait -> kill, idempotent shutdown.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp

from asyncdiff_nodes import spawned

from . import wire
from .errors import WorkerError
from .ranks import POLL, Message, Ranks
from .transport import Place

_START_LOCK = threading.Lock()


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    """What spawn must not take from this process.

    The main module, which it would import again in the child: a worker needs nothing of it, and running it again would start
    a second server (a host's main.py), or start workers without end (a script without a ``__main__`` guard).

    The order of ``sys.path``: a host and its packs put folders in front, when the standard library is long imported. In the
    child it is not, and a ``logging.py`` in one of them would take its place: the standard library goes first.
    """
    standard = {os.path.dirname(os.__file__), sysconfig.get_config_var("DESTSHARED")}
    with _START_LOCK:
        main, path = sys.modules["__main__"], sys.path[:]
        hidden = {name: main.__dict__[name] for name in ("__file__", "__spec__") if name in main.__dict__}
        main.__dict__.pop("__file__", None)
        main.__spec__ = None
        sys.path.sort(key=lambda folder: folder not in standard)
        try:
            yield
        finally:
            main.__dict__.update(hidden)
            sys.path[:] = path


class Processes(Ranks):
    """Worker processes with one message pipe each.

    Messages are written and read by threads of their own, so that a rank that stops reading or writing in mid-message can
    never block the caller beyond its deadline.
    """

    def __init__(self, devices: Sequence[str], poll: Callable[[], None] | None = None) -> None:
        """Start one process for each of ``devices``; see :class:`~.ranks.Ranks`."""
        super().__init__(poll)
        self._places = tuple(Place(device, device) for device in devices)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._processes: list[Any] = []
        self._conns: list[Connection] = []
        self._deaths: list[Connection] = []
        self._outboxes: list[queue.Queue] = []
        context = mp.get_context("spawn")
        self._folder = ""
        try:
            self._folder = tempfile.mkdtemp(prefix="asyncdiff-")  # mode 0700; holds the rendezvous file
            for rank in range(len(devices)):
                conn, child_conn = wire.pipe(context)
                child_death, death = context.Pipe(duplex=False)
                self._conns.append(conn)
                self._deaths.append(death)
                process = context.Process(
                    target=spawned.main,
                    args=(child_conn, child_death, self._folder),
                    name=f"asyncdiff-rank-{rank}",
                    daemon=True,
                )
                with _spawning():
                    process.start()
                self._processes.append(process)
                child_conn.close()  # so that end-of-file is seen when the child is gone
                child_death.close()
            self._wake_read, self._wake = context.Pipe(duplex=False)
            threads = [threading.Thread(target=self._read, daemon=True, name="asyncdiff-read")]
            for conn in self._conns:
                outbox: queue.Queue = queue.Queue(maxsize=8)  # bounded: weights wait here on their way
                self._outboxes.append(outbox)
                threads.append(threading.Thread(target=_write, args=(conn, outbox), daemon=True, name="asyncdiff-write"))
            for thread in threads:
                thread.start()
            self._threads = threads
        except OSError as error:
            self.close(grace=0)
            raise WorkerError(
                f"rank {len(self._processes)} could not be started ({error}): see that there is room for {len(devices)} more "
                "processes in memory, and in the temporary folder",
                len(self._processes),
            ) from error
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Of this machine."""
        return [process.pid for process in self._processes]

    def meet(self, deadline: float) -> tuple[tuple[Place, ...], str]:
        """Known from the start."""
        return self._places, os.path.join(self._folder, "rendezvous")

    def _post(self, rank: int, header: Any, tensors: Sequence[torch.Tensor]) -> bool:
        try:
            self._outboxes[rank].put((header, tensors), timeout=POLL)
        except queue.Full:
            return False
        return True

    def _next(self) -> Message | None:
        try:
            return self._inbox.get(timeout=POLL)
        except queue.Empty:
            return None

    def _explain(self, rank: int, header: Any) -> WorkerError:
        if header[0] == "failure":
            # when one rank dies, its peers fail on their broken links: look for the one that began it
            time.sleep(0.2)
            dead = [r for r, p in enumerate(self._processes) if p.exitcode not in (None, 1)]
            if not dead:
                return WorkerError(f"rank {rank} failed ({header[1]})", rank, header[2])
            rank = dead[0]
        self._processes[rank].join(timeout=1)
        code = self._processes[rank].exitcode
        if code is not None and code < 0:
            how = f"was killed by signal {-code}"
        else:
            how = "closed its pipe" if code is None else f"exited with code {code}"
        return WorkerError(f"rank {rank} (process {self._processes[rank].pid}) {how}; all ranks were stopped", rank)

    def _read(self) -> None:
        """Thread: messages of all ranks into one queue, until a rank is gone or the group closes."""
        waiting: dict[Any, int] = {conn: rank for rank, conn in enumerate(self._conns)}
        sentinels = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        while not self._closing.is_set():
            ready = wait([*waiting, *sentinels, self._wake_read])
            conns = [item for item in ready if item in waiting]
            for conn in conns:
                rank = waiting[conn]
                try:
                    self._take(rank, *wire.receive(conn))
                except Exception:  # end of file, or a message that makes no sense: no more will
                    del waiting[conn]
                    self._take(rank, ("died",), [])
            if not conns:  # last words first, then the news of a death
                for item in ready:
                    if item in sentinels:
                        self._take(sentinels.pop(item), ("died",), [])

    def _take(self, rank: int, header: Any, tensors: list[torch.Tensor]) -> None:
        self._heard(rank, header)
        self._inbox.put((rank, header, tensors))

    def close(self, grace: float = 3.0) -> None:
        """Ask, then terminate, then kill."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        if grace > 0 and self._lost is None:  # those who wait for a rank that is gone do not listen
            for outbox in self._outboxes:
                with contextlib.suppress(queue.Full):
                    outbox.put_nowait((("close",), ()))
            _join(self._processes, grace)
        for death in self._deaths:
            death.close()
        for process in self._processes:
            process.terminate()
        _join(self._processes, 1.0)
        for process in self._processes:
            if process.is_alive():
                process.kill()
        _join(self._processes, 5.0)
        if hasattr(self, "_threads"):
            self._wake.close()
            for outbox in self._outboxes:
                with contextlib.suppress(queue.Full):
                    outbox.put_nowait(None)
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(timeout=5.0)
            self._wake_read.close()
        for conn in self._conns:
            conn.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _write(conn: Connection, outbox: queue.Queue) -> None:
    """Thread: queued messages into one rank's pipe."""
    while (message := outbox.get()) is not None:
        try:
            wire.send(conn, *message)
        except OSError:
            return  # the rank is gone: the reading thread says so


def _join(processes: Sequence[Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(timeout=max(0.0, end - time.monotonic()))
