"""Point-to-point transport between ranks: one directed link per pair of ranks that an edge crosses.

Each link is a process group of two with its own stream of messages, so that values arrive in the order in which their
producer sends them, and opposite directions never wait for each other (on NCCL they would share a stream otherwise).
NCCL serves ranks on two different CUDA devices, where it works (see :mod:`.links`); gloo everything else, bound to the address of
the rank's machine (loopback, where all ranks are on one), CUDA tensors staged through pinned memory.

A transfer of NCCL's is a kernel that waits on the GPU for its counterpart on the other one, and until that is there, whatever
synchronises the device waits as well: the first launch of a kernel, which has to be loaded ("Lazy Loading" in NVIDIA's CUDA
programming guide), or memory that is freed. A rank that is stopped so before it has launched what the other one's transfers wait
for would stop both. Hence no such kernel is ever older than work that its counterpart needs: in a synchronous call a receive is
posted when its value is read, those of earlier blocks before it; in an asynchronous one all transfers are posted at its end.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from asyncdiff_nodes.engine import accelerator
from asyncdiff_nodes.engine.tensors import TensorMeta, empty, flat

from .links import Link, RankLocation, may_be_direct, open_link
from .staging import Stager

_PROBE = 2**23  # bytes that links between machines are measured with


class Incoming:
    """A value that is on its way."""

    def __init__(self, work: Any, value: torch.Tensor, device: torch.device) -> None:
        self._work, self._value, self._device = work, value, device

    def wait(self) -> torch.Tensor:
        """Wait for the value, on this rank's device, until it is there (NCCL: once this stream may read it)."""
        self._work.wait()
        return self._value.to(self._device, non_blocking=True)


class _Later:
    """A transfer of NCCL's that is posted when it is time to.

    Args:
        verb: of the link: its ``send`` or ``recv``.
        tensor: on the GPU.
        peer: the other end's number in the link.
        queue: of those that are not posted yet, in the order of the blocks; this one is put at its end.
    """

    def __init__(self, verb: Callable[..., Any], tensor: torch.Tensor, peer: int, queue: deque[_Later]) -> None:
        self._verb, self._tensor, self._peer, self._queue = verb, tensor, peer, queue
        self._work: Any = None
        queue.append(self)

    def wait(self) -> None:
        """Have this stream wait for it; posts it, and those before it, if that is still to be done."""
        while self._work is None:
            self._queue.popleft().post()
        self._work.wait()

    def post(self) -> None:
        """Hand it to NCCL."""
        self._work = self._verb([flat(self._tensor)], self._peer, 0)


class Transport:
    """All links of one rank.

    Args:
        rank, locations: which of these locations is this rank's.
        store: in which the ranks find each other; see :mod:`.rendezvous`.
        timeout: seconds until a link whose other end says nothing fails.
        staged: pairs of devices, by name, whose links go through the host's memory.

    Attributes:
        bytes_sent: payload bytes handed to the links so far, counted at each send.
        bandwidth: bytes per second of the slowest link from another machine to this rank; infinite if there is none.
        refusals: why links go through the host's memory that could have been direct, by sender and receiver.
    """

    def __init__(
        self,
        rank: int,
        locations: Sequence[RankLocation],
        store: dist.Store,
        timeout: float,
        staged: Collection[frozenset[str]] = (),
    ) -> None:
        self.bytes_sent, self.bandwidth = 0, math.inf
        self.refusals: dict[tuple[int, int], str] = {}
        self._staged = staged
        self._rank, self._locations, self._store, self._timeout = rank, locations, store, timeout
        self._device = torch.device(locations[rank].device)
        self._links: dict[tuple[int, int], Link] = {}
        # sends of this call and of the one before, with their buffers
        self._sending: list[tuple[Any, torch.Tensor]] = []
        self._sent: list[tuple[Any, torch.Tensor]] = []
        self._synchronous = True
        self._later: deque[_Later] = deque()
        self._stager = Stager(self._device)

    def open(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Open this rank's links among ``pairs`` (sender, receiver), but for those that it has.

        Every rank of the group must do so, with the same ``pairs``. Links that are no longer of use stay open, silent.
        """
        rank, locations = self._rank, self._locations
        # in one global order and each confirmed at once, so that no two ranks open different links and wait for each other
        for sender, receiver in sorted(pairs):
            if rank not in (sender, receiver) or (sender, receiver) in self._links:
                continue
            ends = locations[sender], locations[receiver]
            store = dist.PrefixStore(f"{sender}->{receiver}", self._store)
            direct = may_be_direct(*ends, self._staged) and (receiver, sender) not in self.refusals
            link = open_link(store, *ends, rank == sender, direct, self._timeout)
            self._links[sender, receiver] = link
            if link.refusal:
                self.refusals[sender, receiver] = link.refusal
            if ends[0].host != ends[1].host:
                self._measure(link.group, rank == sender, self._device if link.direct else torch.device("cpu"))

    def _measure(self, link: Any, sends: bool, device: torch.device) -> None:
        """Note the bandwidth of a new link, if this is its receiver: of the second try, since the first one also warms it up."""
        probe = torch.empty(_PROBE, dtype=torch.uint8, device=device)
        for _ in range(2):
            begin = time.perf_counter()
            (link.send([probe], 1, 0) if sends else link.recv([probe], 0, 0)).wait()
            int(probe[-1])  # until it is really there
            seconds = time.perf_counter() - begin
        if not sends:
            self.bandwidth = min(self.bandwidth, _PROBE / max(seconds, 1e-9))

    def begin_call(self, synchronous: bool) -> None:
        """Begin a call, in which values are read that are sent in it, if it is synchronous.

        Frees the buffers of the call before the last: whoever reads its values took them to begin the last one.
        """
        self._stager.check()
        self._synchronous = synchronous
        for work, _ in self._sent:
            work.wait()
        self._sent, self._sending = self._sending, []

    def end_call(self) -> None:
        """Post what was left for later: all that this rank computes in the call is under way."""
        while self._later:
            self._later.popleft().post()

    def send(self, receivers: Sequence[int], value: torch.Tensor, meta: TensorMeta) -> None:
        """Start sending ``value`` in layout ``meta`` to each. Its memory may be changed as soon as this returns."""
        links = [self._links[self._rank, receiver] for receiver in receivers]
        self.bytes_sent += meta.nbytes * len(links)
        unstaged = [link for link in links if link.direct or self._device.type == "cpu"]
        if len(unstaged) < len(links):
            self._stager.send([link.group for link in links if link not in unstaged], value, meta)
        copy = empty(meta, self._device).copy_(value) if unstaged else value  # one for all
        for link in unstaged:
            later = link.direct and not self._synchronous
            work = _Later(link.group.send, copy, 1, self._later) if later else link.group.send([flat(copy)], 1, 0)
            self._sending.append((work, copy))

    def receive(self, sender: int, meta: TensorMeta) -> Incoming:
        """Expect the next value that ``sender`` sends to this rank; to be called for a call's values in the blocks' order."""
        link = self._links[sender, self._rank]
        if link.direct or self._device.type == "cpu":
            value = empty(meta, self._device)
            work = _Later(link.group.recv, value, 0, self._later) if link.direct else link.group.recv([flat(value)], 0, 0)
        else:
            value = accelerator.staging(meta)
            work = link.group.recv([flat(value)], 0, 0)
        return Incoming(work, value, self._device)

    def settle(self) -> None:
        """Wait until all that was sent in this call has left, and free it. The other ranks must receive it by themselves."""
        for work, _ in self._sending:
            work.wait()
        self._sending = []

    def flush(self) -> None:
        """Wait until all that was sent has arrived, and forget it. The other ranks must receive it."""
        self._stager.flush()
        for work, _ in (*self._sent, *self._sending):
            work.wait()
        self._sent, self._sending = [], []
        if any(link.direct for link in self._links.values()):  # whose works make a stream wait
            accelerator.synchronize(self._device)

    def close(self) -> None:
        """Close all links, once what was sent has arrived. Those of the other ranks must be closed, too."""
        self.flush()
        self._links.clear()
