"""What ranks that compute one call in bands give each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from asyncdiff_nodes.engine.telemetry import Stopwatch
from asyncdiff_nodes.engine.tensors import TensorMeta

from .share import Share
from .transport import Incoming, Transport


class RankExchange:
    """Exchanges parts of tensors with the other ranks of the branch; see :class:`~asyncdiff_nodes.engine.bands.Exchange`.

    Attributes:
        waits: marks of when each wait of the running call began and ended; whoever begins a call empties it.
    """

    def __init__(self, share: Share, transport: Transport, watch: Stopwatch) -> None:
        self.rank, self.ranks = share.rank - share.first, share.bands
        self.waits: list[tuple[Any, Any]] = []
        self._first, self._transport, self._watch = share.first, transport, watch

    def trade(self, outgoing: Sequence[Sequence[torch.Tensor]], dim: int, lengths: Sequence[int]) -> list[list[torch.Tensor]]:
        """Give each rank its own, and return what came."""
        self._transport.settle()
        others = [other for other in range(self.ranks) if other != self.rank]
        for row in outgoing:
            alike: dict[int, list[int]] = {}  # what is for all of them is copied once
            for other in others:
                alike.setdefault(id(row[other]), []).append(other)
            for receivers in alike.values():
                self._send(row[receivers[0]], *receivers)
        coming = [{other: self._receive(row[other], dim, lengths[other], other) for other in others} for row in outgoing]
        start, came = self._watch.mark(), []
        for row, incoming in zip(outgoing, coming, strict=True):
            came.append([row[rank] if rank == self.rank else incoming[rank].wait() for rank in range(self.ranks)])
        self.waits.append((start, self._watch.mark()))
        return came

    def neighbours(self, band: torch.Tensor, dim: int, above: int, below: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the rows next to this rank's band."""
        self._transport.settle()
        before, after, rows = self.rank > 0, self.rank < self.ranks - 1, band.shape[dim]
        if above and after:
            self._send(band.narrow(dim, rows - above, above), self.rank + 1)
        if below and before:
            self._send(band.narrow(dim, 0, below), self.rank - 1)
        first = self._receive(band, dim, above, self.rank - 1) if above and before else None
        last = self._receive(band, dim, below, self.rank + 1) if below and after else None
        start = self._watch.mark()
        found = (None if first is None else first.wait(), None if last is None else last.wait())
        self.waits.append((start, self._watch.mark()))
        return found

    def _send(self, value: torch.Tensor, *others: int) -> None:
        self._transport.send([self._first + other for other in others], value, _dense(value.shape, value.dtype))

    def _receive(self, like: torch.Tensor, dim: int, length: int, other: int) -> Incoming:
        shape = [*like.shape]
        shape[dim] = length
        return self._transport.receive(self._first + other, _dense(shape, like.dtype))


def _dense(shape: Sequence[int], dtype: torch.dtype) -> TensorMeta:
    """Return the contiguous layout, which both ends agree on, whatever that of the tensors is."""
    return TensorMeta.of(torch.empty(shape, dtype=dtype, device="meta"))
