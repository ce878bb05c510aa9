"""What Ray carries between the parent and a rank."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch

from asyncdiff_nodes.engine.tensors import TensorMeta, empty, memory


class Parcel:
    """A header (picklable) and tensors (dense, on the CPU), whose memory Ray takes as it is, in any dtype."""

    def __init__(self, header: Any, tensors: Sequence[torch.Tensor] = ()) -> None:
        self.header, self.tensors = header, list(tensors)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        buffers = [pickle.PickleBuffer(memory(tensor)) for tensor in self.tensors if tensor.numel()]
        return _unpacked, (self.header, [TensorMeta.of(tensor) for tensor in self.tensors], buffers)


def _unpacked(header: Any, metas: Sequence[TensorMeta], buffers: Sequence[Any]) -> Parcel:
    """Tensors of their own: the buffers are Ray's, shared and read-only."""
    tensors = [empty(meta) for meta in metas]
    for tensor, buffer in zip((tensor for tensor in tensors if tensor.numel()), buffers, strict=True):
        memory(tensor)[:] = memoryview(buffer).cast("B")
    return Parcel(header, tensors)
