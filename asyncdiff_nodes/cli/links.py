"""What talking costs on this machine, measured with real processes: ranks with each other, and the caller with its ranks."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp

from asyncdiff_nodes.engine import Plan, RankOptions, WorkerError, WorkerGroup, accelerator, wire
from asyncdiff_nodes.engine.planning.run_times import Link
from asyncdiff_nodes.engine.rank.links import RankLocation
from asyncdiff_nodes.engine.rank.transport import Transport
from asyncdiff_nodes.engine.rendezvous import PipeStore
from asyncdiff_nodes.engine.tensors import TensorMeta

from .zoo import find_model

_REPEATS = 15
_SIZES = (1, 4 * 2**20)  # elements of 4 bytes: nothing but latency, and as much as a few boundary tensors


def measure_link(devices: Sequence[str]) -> Link:
    """Measure the link between two ranks on ``devices``: half of what a value takes there and back."""
    context = mp.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    ends = context.Pipe()
    ranks = [
        context.Process(target=_ping, args=(rank, tuple(devices), ends[rank], there), daemon=True, name="asyncdiff-link")
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for end in (there, *ends):
        end.close()
    try:
        small, large = here.recv()
    except EOFError:
        raise WorkerError(f"the link between {' and '.join(devices)} could not be measured", rank=-1) from None
    finally:
        for rank in ranks:
            rank.join(10)
            rank.kill()
    nbytes = 4 * (_SIZES[1] - _SIZES[0])
    return Link(latency=small, bandwidth=nbytes / max(large - small, 1e-9))


@torch.inference_mode()
def _ping(rank: int, devices: tuple[str, ...], other: Connection, results: Connection) -> None:
    torch.set_num_threads(1)
    device = torch.device(devices[rank])
    accelerator.before_direct_links(one_machine=True)
    accelerator.enter(device)
    store = PipeStore(partial(wire.send, other), partial(wire.receive, other))
    transport = Transport(rank, [RankLocation(name, name) for name in devices], store, timeout=60)
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
                transport.send(1, value, meta)
            value = back.wait()
            float(value[-1])  # until it is really there
            if rank == 1:
                transport.send(0, value, meta)
            times.append((time.perf_counter() - begin) / 2)
        found.append(statistics.median(times))
    if rank == 0:
        results.send(found)
    transport.flush()
    os._exit(0)  # not by return: links with a dead peer would hang in their destructors


def measure_round_trip(devices: Sequence[str]) -> float:
    """Seconds from a result, on its rank, to the start of the next call: of a small model in two ranks on ``devices``.

    The latent [2, 12, 40, 40] is a little larger than that of SD at 512 px, with CFG.
    """
    model, calls = find_model("demo"), 40
    skeleton = model.skeleton(torch.float32)
    plan = Plan(forecast=0)
    weights, ranks = model.random_weights(torch.float32), RankOptions(threads_per_rank=1)
    with WorkerGroup(skeleton, plan, devices, weights=weights, ranks=ranks) as group:
        args, kwargs = group.family.example_inputs(skeleton, 40, 2)
        args, kwargs = torch.utils._pytree.tree_map(_zeros, (args, kwargs))
        for _ in range(calls):
            group(*args, **kwargs)
        last = [record for record in group.stats().records if record.rank == 1]
    return statistics.median(after.start - before.end for before, after in pairwise(last[calls // 4 :]))


def _zeros(leaf: object) -> object:
    return torch.zeros(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
