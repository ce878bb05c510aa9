"""Ranks as processes of this machine.

The pattern is that of vLLM's multi-process executor: a READY message once the weights are in, a death pipe that ends a child
with its parent, a watch on every process sentinel, one deadline per answer, terminate -> wait -> kill, idempotent shutdown.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from asyncdiff_nodes.engine import wire
from asyncdiff_nodes.engine.errors import AsyncDiffError, WorkerError
from asyncdiff_nodes.engine.rank.links import RankLocation

from .outbox import Outbox
from .rank_set import POLL, Message, RankSet
from .worker_processes import IdleWorkers, WorkerProcess, end

_REST = 5.0  # seconds that a rank has to forget its model


class LocalRanks(RankSet):
    """Worker processes with one message pipe each.

    The caller itself reads messages, as far as they have come, and writes them, as far as a pipe takes them; the rest is a
    thread's to write. So a rank that stops reading or writing in mid-message can never block the caller beyond its deadline, and
    no result wakes two threads.
    """

    def __init__(self, devices: Sequence[str], poll: Callable[[], None] | None = None, idle: IdleWorkers | None = None) -> None:
        """Take one process for each of ``devices``, of ``idle`` ones or a new one; see :class:`~.rank_set.RankSet`."""
        super().__init__(poll)
        self._locations = tuple(RankLocation(device, device) for device in devices)
        self._inbox: deque[Message] = deque()
        self._lock = threading.Lock()
        self._reading = threading.RLock()
        self._incoming: dict[Connection, tuple[int, Iterator[Any]]] = {}  # of those that can still say something
        self._sentinels: dict[int, int] = {}  # of those not known to be dead
        self._workers: list[WorkerProcess] = []
        self._outboxes: list[Outbox] = []
        try:
            for rank, device in enumerate(devices):
                worker = idle.take(device) if idle else None
                self._workers.append(worker or WorkerProcess.start(device, f"asyncdiff-rank-{rank}"))
            for rank, worker in enumerate(self._workers):
                self._outboxes.append(Outbox(worker.conn))
                self._incoming[worker.conn] = rank, wire.incoming(worker.conn, wait=False)
                self._sentinels[worker.process.sentinel] = rank
        except OSError as error:
            self.close(grace=0)
            raise WorkerError(
                f"rank {len(self._workers)} could not be started ({error}): see that there is room for {len(devices)} more "
                "processes in memory",
                len(self._workers),
            ) from error
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids, on this machine."""
        return [worker.process.pid for worker in self._workers]

    @property
    def closed(self) -> bool:
        """Whether it was closed, a rank failed, or one has died since anybody last listened."""
        return super().closed or bool(wait(list(self._sentinels), 0))

    def meet(self, deadline: float) -> tuple[tuple[RankLocation, ...], None]:
        """Return what is known from the start."""
        return self._locations, None

    def _post(self, rank: int, header: Any, tensors: Sequence[torch.Tensor]) -> bool:
        if self._outboxes[rank].post(header, tensors, POLL):
            return True
        self._read(0)  # it may be gone, or wait for somebody to hear it
        return False

    def _next(self) -> Message | None:
        if not self._inbox:
            self._read(POLL)
        return self._inbox.popleft() if self._inbox else None

    def _explain(self, rank: int, header: Any) -> WorkerError:
        if header[0] == "failure":
            time.sleep(0.2)
        else:
            self._workers[rank].process.join(timeout=1)
        # when one rank dies, its peers fail on their broken links: look for the one that began it
        dead = [r for r, worker in enumerate(self._workers) if worker.process.exitcode not in (None, 1)]
        self._read(0)
        last = [(r, words) for r, words, _ in ((rank, header, []), *self._inbox) if words[0] == "failure"]
        # a device's error may end a process that is still saying what it was
        if said := [(r, words) for r, words in last if r in dead] or (not dead and last):
            rank, (_, cause, trace, _) = min(said, key=lambda words: words[1][3])
            return WorkerError(f"rank {rank} failed ({cause})", rank, trace)
        if dead:
            rank = dead[0]
        process = self._workers[rank].process
        code = process.exitcode
        if code is not None and code < 0:
            how = f"was killed by signal {-code}"
        else:
            how = "closed its pipe" if code is None else f"exited with code {code}"
        return WorkerError(f"rank {rank} (process {process.pid}) {how}; all ranks were stopped", rank)

    def _read(self, timeout: float) -> None:
        """Put what the ranks have said into the inbox; waits for it, for at most ``timeout`` seconds."""
        with self._reading:
            if self._closing.is_set():
                return
            ready = wait([*self._incoming, *self._sentinels], timeout)
            spoken = [item for item in ready if item in self._incoming]
            for conn in spoken:
                rank, messages = self._incoming[conn]
                try:
                    if (message := next(messages)) is not None:
                        self._take(rank, *message)
                except Exception:  # end of file, or a message that makes no sense: no more will
                    del self._incoming[conn]
                    self._take(rank, ("died",), [])
            if not spoken:  # last words first, then the news of a death
                for sentinel in (item for item in ready if isinstance(item, int)):
                    self._take(self._sentinels.pop(sentinel), ("died",), [])

    def _take(self, rank: int, header: Any, tensors: list[torch.Tensor]) -> None:
        self._heard(rank, header)
        self._inbox.append((rank, header, tensors))

    def release(self) -> IdleWorkers:
        """Have all ranks forget their model; see :class:`~.rank_set.RankSet`."""
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
        with self._reading:
            for worker in self._workers:
                worker.conn.close()

    def _leave(self) -> None:
        """End the threads."""
        for outbox in self._outboxes:
            outbox.close()
