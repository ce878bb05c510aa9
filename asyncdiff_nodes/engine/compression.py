"""Fewer bytes for the values that cross between ranks in asynchronous calls, for links that are slow.

``half``: 16 bits for each element of a wider tensor. ``int8``: 8 bits for what changed since the last value that the receiver
has; the rounding error is in the next difference, so that errors do not add up (error feedback, arXiv 1901.09847). The first
value of a stream goes whole. In synchronous calls all do: these are exact.

Elements are scaled together in groups of :data:`GROUP`, each with a scale of its own, so that nothing overflows and an outlier
costs only its neighbours their precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from .tensors import TensorMeta, empty, flat

COMPRESSIONS = ("none", "half", "int8")
GROUP = 256  # elements with a common scale: 1.6 % more than int8 alone
_KINDS = {"half": (torch.float16, 1.0), "int8": (torch.int8, 127.0)}  # and the largest scaled element
_SCALE = torch.float32.itemsize


def compressed(meta: TensorMeta, how: str) -> TensorMeta:
    """Return the layout in which a tensor of layout ``meta`` crosses: its own where nothing is to be gained."""
    if how == "none" or not meta.dtype.is_floating_point:
        return meta
    size = -(-meta.numel // GROUP) * _SCALE + meta.numel * _KINDS[how][0].itemsize
    return TensorMeta((size,), (1,), torch.uint8) if size < meta.nbytes else meta


def pack(value: torch.Tensor, how: str) -> torch.Tensor:
    """Pack scales and scaled elements of a dense tensor, in memory order, into uint8 as :func:`compressed` says."""
    dtype, largest = _KINDS[how]
    count = value.numel()
    groups = pad(flat(value).float(), (0, -count % GROUP)).view(-1, GROUP)
    scales = groups.abs().amax(1, keepdim=True) / largest
    scaled = groups / scales.clamp_min(torch.finfo(scales.dtype).tiny)
    scaled = (scaled if dtype.is_floating_point else scaled.round()).to(dtype).flatten()[:count]
    return torch.cat([scales.flatten().view(torch.uint8), scaled.view(torch.uint8)])


def unpack(packed: torch.Tensor, meta: TensorMeta, how: str) -> torch.Tensor:
    """Unpack what :func:`pack` packed, in layout ``meta`` but in float32."""
    at = -(-meta.numel // GROUP) * _SCALE
    scales, scaled = packed[:at].view(torch.float32), packed[at:].view(_KINDS[how][0])
    groups = pad(scaled.float(), (0, -meta.numel % GROUP)).view(-1, GROUP) * scales[:, None]
    return groups.flatten()[: meta.numel].as_strided(meta.shape, meta.stride)


class Encoder:
    """The sender's end, for one tensor of one block's output in one stream."""

    def __init__(self) -> None:
        self._known: torch.Tensor | None = None  # what the receivers have

    def __call__(self, value: torch.Tensor, meta: TensorMeta, how: str) -> tuple[torch.Tensor, TensorMeta]:
        """Make what to send for ``value``, of layout ``meta``; returns its layout, too."""
        layout = compressed(meta, how)
        if layout == meta:
            return value, meta
        value = empty(meta, value.device).copy_(value)
        if how == "half":
            return pack(value, how), layout
        if self._known is None:
            self._known = value
            return value, meta
        packed = pack(flat(value).float() - flat(self._known).float(), how)
        self._known = _after(self._known, packed, meta)
        return packed, layout


class Decoder:
    """A receiver's end; see :class:`Encoder`."""

    def __init__(self) -> None:
        self._begun = False
        self._known: torch.Tensor | None = None

    def expect(self, meta: TensorMeta, how: str) -> tuple[TensorMeta, Callable[[torch.Tensor], torch.Tensor]]:
        """Say in which layout the next value, of layout ``meta``, comes, and what makes it of that, in order."""
        layout = compressed(meta, how)
        if layout == meta:
            return meta, lambda value: value
        if how == "half":
            return layout, lambda packed: unpack(packed, meta, how).to(meta.dtype)
        if not self._begun:
            self._begun = True
            return meta, self._first
        return layout, lambda packed: self._changed(packed, meta)

    def _first(self, value: torch.Tensor) -> torch.Tensor:
        self._known = value
        return value

    def _changed(self, packed: torch.Tensor, meta: TensorMeta) -> torch.Tensor:
        assert self._known is not None, "the first value came whole"
        self._known = _after(self._known, packed, meta)
        return self._known


def _after(known: torch.Tensor, packed: torch.Tensor, meta: TensorMeta) -> torch.Tensor:
    """Add a difference to ``known``; the same at both ends."""
    return (known.float() + unpack(packed, meta, "int8")).to(meta.dtype)
