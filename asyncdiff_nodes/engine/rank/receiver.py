"""What other ranks send in a call: expected when it begins, waited for when a block reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch

from asyncdiff_nodes.engine.batch import concatenated
from asyncdiff_nodes.engine.messages import CallMessage
from asyncdiff_nodes.engine.telemetry import Stopwatch

from .inbox import Arrival, Value
from .share import Share
from .stream_state import Pass, StreamState, layouts_of_part
from .transport import Incoming, Transport


class Receiver:
    """Expects the values that this rank's blocks read of others.

    Attributes:
        waits: marks of when each wait of the running call began and ended.
    """

    def __init__(self, share: Share, transport: Transport, watch: Stopwatch) -> None:
        self.waits: list[tuple[Any, Any]] = []
        self._share, self._transport, self._watch = share, transport, watch
        self._carriers = share.hidden.carriers if share.hidden else {}

    def expect(self, stream: StreamState, message: CallMessage, items: Sequence[int]) -> list[Pass]:
        """Have the inboxes expect the values of a call, which has parts of so many ``items``.

        A rank that reads block ``a`` of another, in a call with two items: as a whole, its inbox for ``a`` expects one value. In
        two micro-batches, each pass waits for its own part of it, and the inbox expects what both make up, for later calls.

        Returns:
            One pass through the model for each part.
        """
        self.waits = []
        if len(items) == 1:
            (running,) = passes = [Pass(stream, message, stream.layouts)]
            arrivals = {name: self._arrival(name, sender, running) for name, sender in self._sent_in(message)}
        else:
            batch = sum(items)
            passes = [Pass(stream, message, layouts_of_part(stream.layouts, count, batch)) for count in items]
            for part in passes:  # on each link in the order in which they are sent
                part.arrivals = {name: cache(self._arrival(name, sender, part)) for name, sender in self._sent_in(message)}
            arrivals = {name: partial(joined, [part.arrivals[name] for part in passes]) for name, _ in self._sent_in(message)}
        for name, sender in self._sent_in(message):
            stream.inboxes[name].expect(message.targets[sender], arrivals[name], message.changes_cross and name in self._carriers)
        return passes

    def _sent_in(self, message: CallMessage) -> Iterator[tuple[str, int]]:
        """Yield the blocks whose values are sent in this call, and the ranks that send them."""
        sources = {} if message.banded else self._share.sources
        return ((name, sender) for name, sender in sources.items() if sender < len(message.targets))

    def _arrival(self, name: str, sender: int, part: Pass) -> Arrival:
        """Begin to receive the tensors of one value."""
        coming: list[Incoming] = []
        decoders: list[Callable[[torch.Tensor], torch.Tensor]] = []
        for number, meta in enumerate(part.layouts[name][0]):
            layout, decode = part.stream.decoders[name, number].expect(meta, part.message.compression)
            coming.append(self._transport.receive(self._share.first + sender, layout))
            decoders.append(decode)
        return partial(self._wait, coming, decoders)

    def _wait(self, coming: Sequence[Incoming], decoders: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> Value:
        start = self._watch.mark()
        tensors = [tensor.wait() for tensor in coming]
        self.waits.append((start, self._watch.mark()))
        return tuple(decode(tensor) for decode, tensor in zip(decoders, tensors, strict=True))


def joined(arrivals: Sequence[Arrival]) -> Value:
    """Wait for all parts of a value, and put them together.

    >>> joined([lambda: (torch.tensor([1]),), lambda: (torch.tensor([2]),)])
    (tensor([1, 2]),)
    """
    return tuple(concatenated([arrival() for arrival in arrivals]))
