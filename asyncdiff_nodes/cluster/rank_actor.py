"""The actor in which a rank runs."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

import ray
import torch
import torch.distributed as dist

from asyncdiff_nodes.engine.rank.links import RankLocation
from asyncdiff_nodes.engine.rank.message_loop import Rank, last_words
from asyncdiff_nodes.engine.telemetry import clock

from .parcel import Parcel


class RankActor:
    """One rank, message by message.

    Args:
        path: where the parent looks for modules. The rank does so, too, after its own, as a process of one machine would.
    """

    def __init__(self, path: Sequence[str]) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]
        self._rank: Rank | None = None
        self._said: list[Parcel] = []
        self._store: Any = None

    def where(self) -> tuple[RankLocation, int]:
        """Return where the rank is, and its process id."""
        host = ray.util.get_node_ip_address()
        gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        # Ray shows an actor its own GPU only, so that it is torch's first one
        name, device = (f"cuda:{gpus[0]}", "cuda:0") if gpus else ("cpu", "cpu")
        return RankLocation(f"{host} {name}", device, host), os.getpid()

    def clock(self) -> float:
        """Seconds on this machine's clock."""
        return clock()

    def host_store(self) -> tuple[str, int]:
        """Open the store in which the ranks find each other, on this machine's address alone; returns host and port."""
        host = ray.util.get_node_ip_address()
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            use_libuv=False,  # which takes no listener with PyTorch 2.6
        )
        return host, port

    def tell(self, message: Parcel) -> Sequence[Parcel]:
        """Do what the message says, the first of which is the rank's :class:`~.boot.Boot`; returns what the rank answers."""
        self._said = []
        try:
            if self._rank is None:
                self._rank = Rank(message.header, self._say)
            else:
                self._rank.handle(message.header, message.tensors)
        except BaseException as error:
            self._say(last_words(error))
        return self._said

    def _say(self, header: Any, tensors: Sequence[torch.Tensor] = ()) -> None:
        self._said.append(Parcel(header, tensors))
