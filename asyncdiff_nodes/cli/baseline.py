"""The unrouted model in a process of its own: what a plan is measured against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from asyncdiff_nodes.engine import accelerator, block_seconds, family_of, meta_copy, trace

from .served import Served
from .zoo import Model


class Baseline:
    """One copy of ``model`` with random weights on ``device``; runs its forward on demand.

    Args:
        inputs: number of branches -> ``(args, kwargs)`` of one call with their part of the batch, on the CPU.
        repeats: calls that the profile is the median of.
    """

    def __init__(
        self, model: Model, dtype: torch.dtype, device: str, threads: int, inputs: Mapping[int, Any], repeats: int
    ) -> None:
        self._process = Served("the unrouted model", _serve, model, dtype, device, threads, inputs, repeats)

    def profile(self) -> dict[int, tuple[list[float], float]]:
        """Number of branches -> seconds of each block and of the whole call, measured before the first call.

        Ask once, first: it says that the process is ready.
        """
        return self._process.receive()

    def start(self) -> None:
        """Start one call with the whole batch."""
        self._process.send("run")

    def wait(self) -> float:
        """Seconds of the call that was started last."""
        return self._process.receive()

    def close(self) -> None:
        """End the process."""
        self._process.close()


@torch.inference_mode()
def _serve(
    conn: Connection, model: Model, dtype: torch.dtype, device: str, threads: int, inputs: dict[int, Any], repeats: int
) -> None:
    torch.set_num_threads(threads)
    accelerator.enter(torch.device(device))
    unet = model.with_random_weights(dtype, device)
    inputs = torch.utils._pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, inputs)

    marks = []

    def mark(*_: Any) -> None:
        accelerator.synchronize(torch.device(device))
        marks.append(time.perf_counter())

    hooks = unet.register_forward_pre_hook(mark), unet.register_forward_hook(mark)
    profiles, skeleton = {}, meta_copy(unet)
    family = family_of(skeleton, *inputs[1])
    for branches, (args, kwargs) in inputs.items():
        graph = trace(skeleton, family, args, kwargs)
        marks.clear()
        blocks = block_seconds(unet, graph, args, kwargs, repeats)
        whole = [end - begin for begin, end in zip(marks[2::2], marks[3::2], strict=True)]  # the first call pays for memory
        profiles[branches] = blocks, statistics.median(whole)
    for hook in hooks:
        hook.remove()
    conn.send(profiles)
    args, kwargs = inputs[1]
    try:
        while conn.recv():
            begin = time.perf_counter()
            unet(*args, **kwargs)
            accelerator.synchronize(torch.device(device))
            conn.send(time.perf_counter() - begin)
    except EOFError:
        return
