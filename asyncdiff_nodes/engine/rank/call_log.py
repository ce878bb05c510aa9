"""What a rank notes of its calls as they run, and what becomes of it when a device has got so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from asyncdiff_nodes.engine.telemetry import CallRecord, Stopwatch

from .inbox import Inbox, drift


@dataclass
class LoggedCall:
    """One call, as far as it is known, the times as marks that are read when somebody asks.

    Attributes:
        record: its record, but for its times, and what is below.
        waits: where each began and ended.
        blocks: where each began and ended, if they were timed.
        inboxes: of its stream.
        norms: see :meth:`~.inbox.Inbox.norms`; of all blocks, on the CPU once ``noted`` is reached.
        counts: how many of them each block has, in this order.
    """

    record: CallRecord
    start: Any
    end: Any
    waits: Sequence[tuple[Any, Any]]
    blocks: Mapping[str, Any]
    inboxes: Mapping[str, Inbox]
    norms: torch.Tensor | None = None
    counts: dict[str, int] = field(default_factory=dict)
    noted: Any = None


class CallLog:
    """The calls of a rank that it has not told anybody of."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._calls: deque[LoggedCall] = deque()

    def add(self, call: LoggedCall) -> None:
        """Note a call, as the latest."""
        self._calls.append(call)

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()

    def note_drift(self) -> None:
        """Note how much the values of the last call differ from those before; apart from it, since nobody waits for that."""
        if not self._calls or self._calls[-1].noted is not None:
            return
        last = self._calls[-1]
        by_block = {name: norms for name, inbox in last.inboxes.items() if (norms := inbox.norms())}
        if by_block:
            last.norms = torch.stack([norm for norms in by_block.values() for norm in norms]).to("cpu", non_blocking=True)
            last.counts = {name: len(norms) for name, norms in by_block.items()}
        last.noted = self._watch.mark()

    def records(self, wait: bool = False) -> Iterator[CallRecord]:
        """Yield records of calls that the device has finished, each call once; with ``wait`` of all calls."""
        while self._calls and (wait or self._watch.reached(self._calls[0].noted)):
            yield self._record_of(self._calls.popleft())

    def _record_of(self, call: LoggedCall) -> CallRecord:
        seconds, between = self._watch.seconds, self._watch.between
        seconds(call.noted)
        waits = tuple((seconds(start), seconds(end)) for start, end in call.waits)
        waited = sum(end - start for start, end in waits)
        start, end = seconds(call.start), seconds(call.end)
        norms = iter(() if call.norms is None else call.norms.tolist())
        return replace(
            call.record,
            start=start,
            end=end,
            compute=end - start - waited,
            wait=waited,
            waits=waits,
            drift={name: drift(list(islice(norms, count))) for name, count in call.counts.items()},
            blocks={name: between(*marks) for name, marks in call.blocks.items()},
        )
