"""Objects and tensors over a multiprocessing pipe.

A message is one pickled header followed by the raw bytes of its tensors, so that no tensor is ever pickled, copied into
shared memory or named in a file system. Only pipes that this package created and its own workers inherited may carry it.

Where a pipe is a socket, tensors go straight from memory to memory: the connection's own methods copy them twice more, in small
pieces, which is several times slower, and a model's weights pass here.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import socket
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from .graph import TensorMeta

_POSIX = os.name == "posix"
_BUFFER = 2**20  # bytes on their way in a pipe, if the system allows as many: fewer turns of writer and reader


def pipe(context: Any) -> tuple[Connection, Connection]:
    """A duplex pipe of this multiprocessing context."""
    ends = context.Pipe(duplex=True)
    if _POSIX:
        for end in ends:
            with socket.socket(fileno=os.dup(end.fileno())) as own:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    return ends


def empty(meta: TensorMeta, device: torch.device | str = "cpu") -> torch.Tensor:
    """An uninitialised tensor of this layout."""
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=device)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in memory order, without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def dense_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the CPU without gaps; itself where it already is."""
    tensor = tensor.detach().to("cpu")
    meta = TensorMeta.of(tensor)
    return tensor if tensor.stride() == meta.stride else empty(meta).copy_(tensor)


def send(conn: Connection, header: Any, tensors: Sequence[torch.Tensor] = ()) -> None:
    """Send ``header`` (picklable) and ``tensors`` (dense, on the CPU)."""
    conn.send_bytes(pickle.dumps((header, [TensorMeta.of(t) for t in tensors]), protocol=pickle.HIGHEST_PROTOCOL))
    for tensor in tensors:
        if tensor.numel():
            _write(conn, memory(tensor))


def receive(conn: Connection) -> tuple[Any, list[torch.Tensor]]:
    """Receive what :func:`send` sent. Raises EOFError or OSError when the other end is gone."""
    header, metas = pickle.loads(conn.recv_bytes())
    tensors = []
    for meta in metas:
        tensor = empty(meta)
        if tensor.numel():
            _read_into(conn, memory(tensor))
        tensors.append(tensor)
    return header, tensors


def _write(conn: Connection, memory: memoryview) -> None:
    if not _POSIX:
        conn.send_bytes(memory)
        return
    while memory:
        memory = memory[os.write(conn.fileno(), memory) :]


def _read_into(conn: Connection, memory: memoryview) -> None:
    if not _POSIX:
        conn.recv_bytes_into(memory)
        return
    while memory:
        count = os.readv(conn.fileno(), [memory])
        if not count:
            raise EOFError
        memory = memory[count:]


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a dense tensor on the CPU with at least one element; they are there for as long as the tensor is."""
    # ctypes rather than numpy: the engine needs torch and the standard library only, and numpy has no bfloat16
    nbytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")
