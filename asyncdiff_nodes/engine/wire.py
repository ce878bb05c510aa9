"""Objects and tensors over a multiprocessing pipe.

A message is one pickled header followed by the raw bytes of its tensors, so that no tensor is ever pickled, copied into
shared memory or named in a file system. Only pipes that this package created and its own workers inherited may carry it.

Where a pipe is a socket, a message goes straight from memory to memory, in one piece: the connection's own methods copy it twice
more, in small pieces, which is several times slower, and a model's weights pass here.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import socket
import struct
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from .graph import TensorMeta

_POSIX = os.name == "posix"
_LENGTH = struct.Struct("!Q")  # of the header, before it
_AT_ONCE = 512  # pieces that one call of the system writes: all that we know of allow 1024
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


class Outgoing:
    """A message on its way.

    Args:
        header: picklable.
        tensors: dense, on the CPU; not to be changed before all is written.
    """

    def __init__(self, header: Any, tensors: Sequence[torch.Tensor] = ()) -> None:
        pickled = pickle.dumps((header, [TensorMeta.of(t) for t in tensors]), protocol=pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors  # the memory below is theirs
        first = _LENGTH.pack(len(pickled)) + pickled if _POSIX else pickled
        self._left = [memoryview(first), *(memory(tensor) for tensor in tensors if tensor.numel())]

    def write(self, conn: Connection) -> None:
        """Write what is left. Raises OSError when the other end is gone."""
        if not _POSIX:
            for piece in self._left:
                conn.send_bytes(piece)
            return
        while self._left:
            self._written(os.writev(conn.fileno(), self._left[:_AT_ONCE]))

    def write_what_fits(self, conn: Connection) -> bool:
        """Write as much as the pipe takes without waiting; returns whether that is all. Raises OSError as :meth:`write` does."""
        if not _POSIX:
            return False
        with socket.socket(fileno=os.dup(conn.fileno())) as own:
            while self._left:
                try:
                    self._written(own.sendmsg(self._left[:_AT_ONCE], [], socket.MSG_DONTWAIT))
                except BlockingIOError:
                    return False
        return True

    def _written(self, count: int) -> None:
        while self._left and count >= len(self._left[0]):
            count -= len(self._left.pop(0))
        if count:
            self._left[0] = self._left[0][count:]


def send(conn: Connection, header: Any, tensors: Sequence[torch.Tensor] = ()) -> None:
    """Send ``header`` and ``tensors``; see :class:`Outgoing`."""
    Outgoing(header, tensors).write(conn)


def receive(conn: Connection) -> tuple[Any, list[torch.Tensor]]:
    """Receive what :func:`send` sent. Raises EOFError or OSError when the other end is gone."""
    header, metas = pickle.loads(_header(conn))
    tensors = []
    for meta in metas:
        tensor = empty(meta)
        if tensor.numel():
            _read_into(conn, memory(tensor))
        tensors.append(tensor)
    return header, tensors


def _header(conn: Connection) -> bytes | bytearray:
    if not _POSIX:
        return conn.recv_bytes()
    length = bytearray(_LENGTH.size)
    _read_into(conn, memoryview(length))
    header = bytearray(*_LENGTH.unpack(length))
    _read_into(conn, memoryview(header))
    return header


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
