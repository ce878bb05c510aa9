"""Ranks as processes of this machine.

The pattern is that of vLLM's multi-process executor: a READY message once the weights are in, a death pipe that ends a child
with its parent, a watch on every process sentinel, one deadline per answer, terminate -> wait -> kill, idempotent shutdown.
"""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch

from . import wire
from .errors import AsyncDiffError, WorkerError
from .outbox import Outbox
from .ranks import POLL, Message, Ranks
from .spawning import CONTEXT, IdleWorkers, Worker, end
from .transport import Place

_REST = 5.0  # seconds that a rank has to forget its model


class Processes(Ranks):
    """Worker processes with one message pipe each.

    Messages are read by a thread, and written by others where a pipe is full, so that a rank that stops reading or writing in
    mid-message can never block the caller beyond its deadline.
    """

    def __init__(self, devices: Sequence[str], poll: Callable[[], None] | None = None, idle: IdleWorkers | None = None) -> None:
        """One process for each of ``devices``, of ``idle`` ones or a new one; see :class:`~.ranks.Ranks`."""
        super().__init__(poll)
        self._places = tuple(Place(device, device) for device in devices)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._outboxes: list[Outbox] = []
        self._reader: threading.Thread | None = None
        self._folder = ""
        try:
            self._folder = tempfile.mkdtemp(prefix="asyncdiff-")  # mode 0700; holds the rendezvous file
            for rank, device in enumerate(devices):
                worker = idle.take(device, self._folder) if idle else None
                self._workers.append(worker or Worker.start(device, f"asyncdiff-rank-{rank}", self._folder))
            self._wake_read, self._wake = CONTEXT.Pipe(duplex=False)
            for worker in self._workers:
                self._outboxes.append(Outbox(worker.conn))
            self._reader = threading.Thread(target=self._read, daemon=True, name="asyncdiff-read")
            self._reader.start()
        except OSError as error:
            self.close(grace=0)
            raise WorkerError(
                f"rank {len(self._workers)} could not be started ({error}): see that there is room for {len(devices)} more "
                "processes in memory, and in the temporary folder",
                len(self._workers),
            ) from error
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Of this machine."""
        return [worker.process.pid for worker in self._workers]

    def meet(self, deadline: float) -> tuple[tuple[Place, ...], str]:
        """Known from the start."""
        return self._places, os.path.join(self._folder, "rendezvous")

    def _post(self, rank: int, header: Any, tensors: Sequence[torch.Tensor]) -> bool:
        return self._outboxes[rank].post(header, tensors, POLL)

    def _next(self) -> Message | None:
        try:
            return self._inbox.get(timeout=POLL)
        except queue.Empty:
            return None

    def _explain(self, rank: int, header: Any) -> WorkerError:
        if header[0] == "failure":
            # when one rank dies, its peers fail on their broken links: look for the one that began it
            time.sleep(0.2)
            dead = [r for r, worker in enumerate(self._workers) if worker.process.exitcode not in (None, 1)]
            if not dead:
                return WorkerError(f"rank {rank} failed ({header[1]})", rank, header[2])
            rank = dead[0]
        process = self._workers[rank].process
        process.join(timeout=1)
        code = process.exitcode
        if code is not None and code < 0:
            how = f"was killed by signal {-code}"
        else:
            how = "closed its pipe" if code is None else f"exited with code {code}"
        return WorkerError(f"rank {rank} (process {process.pid}) {how}; all ranks were stopped", rank)

    def _read(self) -> None:
        """Thread: messages of all ranks into one queue, until a rank is gone or the group closes."""
        waiting: dict[Any, int] = {worker.conn: rank for rank, worker in enumerate(self._workers)}
        sentinels = {worker.process.sentinel: rank for rank, worker in enumerate(self._workers)}
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

    def release(self) -> IdleWorkers:
        """Have all ranks forget their model; see :class:`~.ranks.Ranks`."""
        deadline = time.monotonic() + _REST
        try:
            for rank in range(len(self._workers)):
                self.send(rank, ("rest",), deadline=deadline)
            resting: set[int] = set()
            while len(resting) < len(self._workers):
                rank, header, _ = self.next_message(deadline, "the ranks to forget their model")
                if header[0] == "resting":
                    resting.add(rank)
        except AsyncDiffError:  # new ones do as well
            self.close(grace=0)
            return IdleWorkers()
        except BaseException:
            self.close(grace=0)
            raise
        with self._lock:
            if self._closing.is_set():
                return IdleWorkers()
            self._closing.set()
        self._leave()
        return IdleWorkers(self._workers)

    def close(self, grace: float = 3.0) -> None:
        """Ask, then terminate, then kill."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        if grace > 0 and self._lost is None:  # those who wait for a rank that is gone do not listen
            for outbox in self._outboxes:
                outbox.post(("close",), (), 0)
        else:
            grace = 0.0
        end(self._workers, grace)
        self._leave()
        for worker in self._workers:
            worker.conn.close()

    def _leave(self) -> None:
        """End the threads, and remove the folder."""
        for outbox in self._outboxes:
            outbox.close()
        if self._reader is not None:
            self._wake.close()
            if self._reader is not threading.current_thread():
                self._reader.join(timeout=5.0)
            self._wake_read.close()
        shutil.rmtree(self._folder, ignore_errors=True)
