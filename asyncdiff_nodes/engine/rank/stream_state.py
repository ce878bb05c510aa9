"""What a rank keeps of one stream, and of the call of it that is running."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from asyncdiff_nodes.engine.bands import Bands
from asyncdiff_nodes.engine.compression import Decoder, Encoder
from asyncdiff_nodes.engine.messages import CallMessage, Layout

from .inbox import Arrival, Inbox
from .share import Share


class StreamState:
    """State of one stream in one run.

    Attributes:
        layouts: of the outputs of all blocks, for the whole batch.
        bands: as in :class:`~.messages.Opening`.
        encoders, decoders: of what crosses, by block and number of the tensor in its output.
        inboxes: by block of another segment that this rank reads.
    """

    def __init__(self, share: Share) -> None:
        self.layouts: dict[str, Layout] = {}
        self.bands: Bands | None = None
        self.encoders: defaultdict[tuple[str, int], Encoder] = defaultdict(Encoder)
        self.decoders: defaultdict[tuple[str, int], Decoder] = defaultdict(Decoder)
        # what a segment works ahead for is read as many batches later as there are segments between
        self.inboxes = {name: Inbox(share.segment - sender) for name, sender in share.sources.items()}

    def settle(self, leave: int = 0) -> None:
        """Wait until at most ``leave`` values of each block are still on their way."""
        for inbox in self.inboxes.values():
            inbox.settle(leave)


@dataclass
class Pass:
    """One pass through the model: a call, or a micro-batch of it.

    Attributes:
        layouts: of the outputs of all blocks, for this part of the batch.
        arrivals: block of another segment -> waits for this part of its value; empty where it is the whole, which inboxes have.
        states: hidden states that its first block took, where their changes cross.
    """

    stream: StreamState
    message: CallMessage
    layouts: Mapping[str, Layout]
    arrivals: dict[str, Arrival] = field(default_factory=dict)
    states: torch.Tensor | None = None


def layouts_of_part(layouts: Mapping[str, Layout], items: int, batch: int) -> dict[str, Layout]:
    """Make the layouts for ``items`` of the ``batch`` items.

    >>> from asyncdiff_nodes.engine.tensors import TensorMeta
    >>> whole = {"block": ((TensorMeta((4, 8), (8, 1), torch.float16),), 0)}
    >>> layouts_of_part(whole, items=1, batch=2)["block"][0][0].shape
    (2, 8)
    """
    return {name: (tuple(meta.part(items, batch) for meta in metas), structure) for name, (metas, structure) in layouts.items()}
