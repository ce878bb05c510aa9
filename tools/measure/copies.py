"""Processes that compute a network by themselves, one thread each: what bands are measured beside."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from asyncdiff_nodes.cli.served import Served
from asyncdiff_nodes.engine import block_seconds, family_of, meta_copy, trace
from true_width import Network, Size, euler


class Copy:
    """A process with one copy of ``network``, whose weights are those of every other one.

    Args:
        share: a file to meet in, and which of how many copies this is, for those that compute each call together as diffusers
            does (Ulysses); none for one that computes alone.
    """

    def __init__(self, network: Network, share: tuple[str, int, int] | None = None) -> None:
        self._process = Served("a copy", _serve, network, share)

    def start(self, what: str, *args: Any) -> None:
        """Have it do what one of the methods of a computing process says."""
        self._process.send((what, args))

    def wait(self) -> Any:
        """What that returns."""
        return self._process.receive()

    def ask(self, what: str, *args: Any) -> Any:
        """Both."""
        self.start(what, *args)
        return self.wait()

    def close(self) -> None:
        """End the process."""
        self._process.close()


def together(copies: Sequence[Copy], what: str, *args: Any) -> float:
    """Have all of them do it at once: seconds until the last is done."""
    for copy in copies:
        copy.start(what, *args)
    return max([copy.wait() for copy in copies])


@contextmanager
def copies_of(network: Network, count: int, ulysses: bool = False) -> Iterator[list[Copy]]:
    """Keep so many copies, which compute each call by themselves, or together by diffusers."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        shares = [(str(Path(folder) / "met"), rank, count) if ulysses else None for rank in range(count)]
        yield [stack.enter_context(closing(Copy(network, share))) for share in shares]


@torch.inference_mode()
def _serve(conn: Connection, network: Network, share: tuple[str, int, int] | None) -> None:
    torch.set_num_threads(1)
    computing = _Computing(network)
    if share is not None:
        computing.join(*share)
    try:
        while True:
            what, args = conn.recv()
            conn.send(getattr(computing, what)(*args))
    except EOFError:
        os._exit(0)  # at once: those that compute together would wait for each other


class _Computing:
    """What such a process does; :class:`Copy` asks for it by the names of these methods."""

    def __init__(self, network: Network) -> None:
        self._network, self._module = network, network.module()
        self._inputs: dict[Size, Any] = {}
        self._runs: dict[int, tuple[Iterator[torch.Tensor], list[torch.Tensor]]] = {}
        self._output = torch.empty(0)

    def join(self, file: str, rank: int, ranks: int) -> None:
        """Compute each call together with the other copies, as diffusers does it."""
        from diffusers import ContextParallelConfig

        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
        # diffusers asks for an accelerator, and then for nothing that a CPU has not
        torch.accelerator.device_count = lambda: ranks
        torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cpu")
        self._module.set_attention_backend("native")
        self._module.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))

    def call(self, size: Size, all_keys: bool = False) -> float:
        """Seconds of one call; with ``all_keys`` of half a network, whose tokens attend to as many keys as those of a band."""
        x, fixed = self._given(size)
        if not all_keys:
            return self._timed(x, fixed, 1.0)
        with _AllKeys():
            return self._timed(x, fixed, 1.0)

    def output(self) -> Any:
        """The result of the last call."""
        return self._output.numpy()

    def begin(self, size: Size, steps: int) -> None:
        """Begin a run of so many steps, beside others."""
        x, fixed = self._given(size)

        def compute(x: torch.Tensor, time: float) -> torch.Tensor:
            self._timed(x, fixed, time)
            return self._output

        self._runs[steps] = euler(compute, x, steps), []

    def step(self, steps: int) -> float:
        """Seconds of the next step of the run of so many."""
        run, latents = self._runs[steps]
        begin = time.perf_counter()
        latents[:] = [next(run)]
        return time.perf_counter() - begin

    def latent(self, steps: int) -> Any:
        """That of a run, as far as it has come."""
        return self._runs[steps][1][0].numpy()

    def blocks(self, size: Size) -> list[float]:
        """Seconds of each block in a call."""
        kwargs = self._network.arguments(*self._given(size), 1.0)
        skeleton = meta_copy(self._module)
        return block_seconds(self._module, trace(skeleton, family_of(skeleton, (), kwargs), (), kwargs), (), kwargs, repeats=1)

    def _given(self, size: Size) -> Any:
        if size not in self._inputs:
            self._inputs[size] = self._network.inputs(size)
        return self._inputs[size]

    def _timed(self, x: torch.Tensor, fixed: dict[str, Any], at: float) -> float:
        kwargs = self._network.arguments(x, fixed, at)
        begin = time.perf_counter()
        self._output = self._module(**kwargs)[0]
        return time.perf_counter() - begin


class _AllKeys(TorchFunctionMode):
    """Has every token attend to its own half twice, as one of a band attends to both halves."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            if given["key"].shape[-2] == given["query"].shape[-2]:
                given |= {name: torch.cat([given[name]] * 2, -2) for name in names[1:]}
            return func(**given)
        return func(*args, **(kwargs or {}))
