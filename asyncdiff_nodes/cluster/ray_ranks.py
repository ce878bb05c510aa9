"""Ranks as Ray actors: started, talked to, watched and ended through Ray.

One actor per rank, in one placement group. A message is a call of the actor, which returns the messages that the rank sent
meanwhile. Ray runs an actor's calls one after the other, in the order in which they were made, so this is the loop of a rank;
and an actor ends with the program that started it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from asyncdiff_nodes.engine.errors import WorkerError
from asyncdiff_nodes.engine.parent.rank_set import POLL, Message, RankSet
from asyncdiff_nodes.engine.rank.links import RankLocation
from asyncdiff_nodes.engine.telemetry import clock

from .device_names import connect, on_cpu
from .parcel import Parcel
from .rank_actor import RankActor

_AHEAD = 8  # messages to a rank that it has not answered: weights wait there on their way
_CLOCKS = 5  # times that a rank is asked for the time


class RayRanks(RankSet):
    """Ranks on the devices of a Ray cluster."""

    def __init__(self, devices: Sequence[str], poll: Callable[[], None] | None = None) -> None:
        """Have Ray start one actor for each of ``devices``, which are of one cluster; see :class:`~.rank_set.RankSet`."""
        super().__init__(poll)
        self._inbox: deque[Message] = deque()
        self._calls: list[deque[ray.ObjectRef[Any]]] = [deque() for _ in devices]  # not answered yet
        self._locations: tuple[RankLocation, ...] = ()
        self._pids: list[int] = []
        self._clocks: list[float] = []
        self._actors: list[Any] = []
        self._lock = threading.Lock()
        connect(devices[0])
        self._alike = len(set(devices)) == 1
        bundles = [{"CPU": 1} if on_cpu(device) else {"GPU": 1} for device in devices]
        # GPUs as near to each other as can be; of CPUs as many machines as can be, since each rank can use all of one
        self._room = ray.util.placement_group(bundles, strategy="SPREAD" if all(map(on_cpu, devices)) else "PACK")
        try:
            for index, bundle in enumerate(bundles):
                options = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0)}
                where = PlacementGroupSchedulingStrategy(self._room, placement_group_bundle_index=index)
                self._actors.append(ray.remote(RankActor).options(scheduling_strategy=where, **options).remote(sys.path))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids, each on the machine of its rank."""
        return self._pids

    def meet(self, deadline: float) -> tuple[tuple[RankLocation, ...], tuple[str, int]]:
        """Wait until Ray has started all ranks. Ranks of one machine are neighbours where devices are alike."""
        what = f"Ray to find room for {len(self._actors)} ranks and to start them"
        started = self._ask([actor.where.remote() for actor in self._actors], deadline, what)
        order = sorted(range(len(started)), key=lambda rank: started[rank][0].name) if self._alike else range(len(started))
        self._actors = [self._actors[rank] for rank in order]
        self._locations = tuple(started[rank][0] for rank in order)
        self._pids = [started[rank][1] for rank in order]
        self._clocks = [self._clock(actor, deadline) for actor in self._actors]
        (rendezvous,) = self._ask([self._actors[0].host_store.remote()], deadline, "rank 0 to open a store")
        return self._locations, rendezvous

    def _clock(self, actor: Any, deadline: float) -> float:
        """Measure seconds from the clock of an actor's machine to this one's: by the answer that took the shortest."""
        asked: list[tuple[float, float]] = []
        for _ in range(_CLOCKS):
            begin = clock()
            (there,) = self._ask([actor.clock.remote()], deadline, "the time of a rank")
            end = clock()
            asked.append((end - begin, (begin + end) / 2 - there))
        return min(asked)[1]

    def _ask(self, calls: list[ray.ObjectRef[Any]], deadline: float, what: str) -> list[Any]:
        """Wait for the answers to ``calls``, one per rank or of the first rank."""
        while len(ray.wait(calls, num_returns=len(calls), timeout=POLL)[0]) < len(calls):
            self._check(deadline, what)
        answers = []
        for rank, call in enumerate(calls):
            try:
                answers.append(ray.get(call))
            except RayError as error:
                self._fail(WorkerError(f"rank {rank} did not start: {error}", rank))
        return answers

    def _post(self, rank: int, header: Any, tensors: Sequence[torch.Tensor]) -> bool:
        if len(self._calls[rank]) >= _AHEAD:
            self._collect()
        if len(self._calls[rank]) >= _AHEAD:
            return False
        self._calls[rank].append(self._actors[rank].tell.remote(Parcel(header, tensors)))
        return True

    def _next(self) -> Message | None:
        if not self._inbox:
            self._collect()
        return self._inbox.popleft() if self._inbox else None

    def _collect(self) -> None:
        """Put the next answer of any rank into the inbox, if one comes in time."""
        oldest = {calls[0]: rank for rank, calls in enumerate(self._calls) if calls}
        if not oldest:
            time.sleep(POLL)
            return
        for call in ray.wait(list(oldest), timeout=POLL)[0]:
            rank = oldest[call]
            try:
                answers = ray.get(self._calls[rank].popleft())
            except RayError as error:
                answers = [Parcel(("died", error))]
            for answer in answers:
                header = answer.header
                if header[0] == "record":
                    header = (*header[:2], header[2].shifted(self._clocks[rank]))
                self._heard(rank, header)
                self._inbox.append((rank, header, answer.tensors))

    def _explain(self, rank: int, header: Any) -> WorkerError:
        if header[0] == "failure":
            # when one rank dies, its peers fail on their broken links: look for the one that began it
            calls = [actor.where.remote() for actor in self._actors]
            ready = ray.wait(calls, num_returns=len(calls), timeout=1.0)[0]
            gone = {call: error for call in ready if (error := _death(call)) is not None}
            if not gone:
                return WorkerError(f"rank {rank} failed ({header[1]})", rank, header[2])
            call, error = next(iter(gone.items()))
            rank = calls.index(call)
        else:
            error = header[1]
        name = self._locations[rank].name
        return WorkerError(f"rank {rank} (process {self._pids[rank]}, {name}) died; all ranks were stopped. {error}", rank)

    def close(self, grace: float = 3.0) -> None:
        """Kill the actors, which have nothing to save, and give their room back."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        if not ray.is_initialized():
            return  # the connection was ended before, and all that was started over it with it
        for actor in self._actors:
            ray.kill(actor)
        ray.util.remove_placement_group(self._room)
        last = [actor.where.remote() for actor in self._actors]
        ray.wait(last, num_returns=len(last), timeout=5.0)  # they fail when the actors are gone


def _death(call: ray.ObjectRef[Any]) -> RayActorError | None:
    try:
        ray.get(call)
    except RayActorError as error:
        return error
    return None
