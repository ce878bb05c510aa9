"""A link between two ranks, tried out and measured with real processes."""

from __future__ import annotations

import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.multiprocessing as mp

from asyncdiff_nodes.engine import WorkerError, accelerator, wire
from asyncdiff_nodes.engine.planning.run_times import Link
from asyncdiff_nodes.engine.rank.links import RankLocation, may_be_direct
from asyncdiff_nodes.engine.rank.transport import Transport
from asyncdiff_nodes.engine.rendezvous import PipeStore
from asyncdiff_nodes.engine.tensors import TensorMeta

_REPEATS = 15
_SILENCE = 180.0  # seconds: to import, and to open a link that hangs, take less
_SIZES = (1, 4 * 2**20)  # elements of 4 bytes: nothing but latency, and as much as a few boundary tensors


@dataclass(frozen=True)
class LinkTrial:
    """A link as it was found.

    Attributes:
        latency: seconds for next to nothing.
        bandwidth: bytes per second.
        direct: whether it goes from device to device; else through the host's memory.
        refusal: why it is not direct where it could have been; "" otherwise.
    """

    latency: float
    bandwidth: float
    direct: bool
    refusal: str

    @property
    def link(self) -> Link:
        """What the engine's clock needs to know of it."""
        return Link(self.latency, self.bandwidth, self.direct)


def try_link(devices: Sequence[str], prepare: Callable[[], None] | None = None) -> LinkTrial:
    """Open a link between two ranks on ``devices`` and measure it: half of what a value takes there and back.

    Args:
        prepare: as of :class:`~asyncdiff_nodes.engine.RankOptions`.

    Raises:
        WorkerError: a rank has died of it.
    """
    context = mp.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    ends = context.Pipe()
    ranks = [
        context.Process(target=_run, args=(rank, tuple(devices), ends[rank], there, prepare), daemon=True, name="asyncdiff-link")
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for end in (there, *ends):
        end.close()
    try:
        (small, large), direct, refusal = _answer(here, ranks)
    except EOFError:
        for rank in ranks:
            rank.kill()
        raise WorkerError(f"the link between {' and '.join(devices)} could not be measured", rank=-1) from None
    finally:
        for rank in ranks:
            rank.join(10)
            rank.kill()
    nbytes = 4 * (_SIZES[1] - _SIZES[0])
    return LinkTrial(small, nbytes / max(large - small, 1e-9), direct, refusal)


def _answer(results: Connection, ranks: Sequence[BaseProcess]) -> Any:
    """Wait for the answer; EOFError if a rank dies or says nothing: the other one may then wait for ever, on its device."""
    waiting: dict[Any, BaseProcess] = {rank.sentinel: rank for rank in ranks}
    while ready := wait([results, *waiting], _SILENCE):
        if results in ready:
            return results.recv()
        ended = [waiting.pop(end) for end in ready]
        for rank in ended:
            rank.join()  # it has closed its end, and is about to be gone
        if any(rank.exitcode for rank in ended):
            break
    raise EOFError


def _run(*args: Any) -> None:
    """Be one of the two; ends the process, since links with a dead peer would hang in their destructors."""
    try:
        _ping(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@torch.inference_mode()
def _ping(
    rank: int, devices: tuple[str, ...], other: Connection, results: Connection, prepare: Callable[[], None] | None
) -> None:
    torch.set_num_threads(1)
    device = torch.device(devices[rank])
    accelerator.before_direct_links(one_machine=True)
    accelerator.enter(device)
    if prepare is not None:
        prepare()
    store = PipeStore(partial(wire.send, other), partial(wire.receive, other))
    locations = [RankLocation(name, name) for name in devices]
    transport = Transport(rank, locations, store, timeout=60)
    transport.open([(0, 1), (1, 0)])
    found = []
    for size in _SIZES:
        meta, times = TensorMeta((size,), (1,), torch.float32), []
        value = torch.zeros(size, device=device)
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            transport.begin_call(synchronous=True)
            back = transport.receive(1 - rank, meta)
            if rank == 0:
                transport.send([1], value, meta)
            value = back.wait()
            float(value[-1])  # until it is really there
            if rank == 1:
                transport.send([0], value, meta)
            times.append((time.perf_counter() - begin) / 2)
        found.append(statistics.median(times))
    if rank == 0:
        refusal = next(iter(transport.refusals.values()), "")
        results.send((found, may_be_direct(*locations) and not refusal, refusal))
    transport.flush()
