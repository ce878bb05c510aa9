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
import select
import socket
import struct
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from asyncdiff_nodes.engine.planning.graph import TensorMeta

_POSIX = os.name == "posix"
_LENGTH = struct.Struct("!Q")  # of the header, before it
_AT_ONCE = 512  # pieces that one call of the system writes: all that we know of allow 1024
_BUFFER = 2**20  # bytes on their way in a pipe, if the system allows as many: fewer turns of writer and reader


def pipe(context: Any) -> tuple[Connection, Connection]:
    """A duplex pipe of this multiprocessing context: the end of the parent, which nothing keeps waiting, and that of a rank."""
    ends = context.Pipe(duplex=True)
    if _POSIX:
        os.set_blocking(ends[0].fileno(), False)
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
    tensor = _as_in_memory(tensor)
    if tensor.is_cpu and tensor.is_contiguous():
        return tensor
    tensor = tensor.detach().to("cpu")
    meta = TensorMeta.of(tensor)
    return tensor if tensor.stride() == meta.stride else empty(meta).copy_(tensor)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A dense copy on the CPU.

    Where the tensor is dense and there, this thread alone makes it: to wake others takes longer, the more so where ranks use all
    cores.
    """
    tensor = _as_in_memory(tensor.detach())
    copy = empty(TensorMeta.of(tensor))
    if tensor.is_cpu and tensor.stride() == copy.stride() and tensor.numel():
        memory(copy)[:] = memory(tensor)
        return copy
    return copy.copy_(tensor)


def _as_in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Itself, but where PyTorch conjugates or negates only as it reads: then a tensor whose memory holds the values."""
    return tensor.resolve_conj().resolve_neg()


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
        while not self.write_what_fits(conn):
            room = select.poll()
            room.register(conn.fileno(), select.POLLOUT)
            room.poll()

    def write_what_fits(self, conn: Connection) -> bool:
        """Write as much as the pipe takes; returns whether that is all, for which a rank's end waits. Raises as :meth:`write`."""
        if not _POSIX:
            return False
        try:
            while self._left:
                self._written(os.writev(conn.fileno(), self._left[:_AT_ONCE]))
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
    """Wait for what :func:`send` sent. Raises EOFError or OSError when the other end is gone."""
    return next(incoming(conn, wait=True))


def incoming(conn: Connection, wait: bool) -> Iterator[tuple[Any, list[torch.Tensor]] | None]:
    """The messages that come, one after the other.

    Args:
        wait: for the rest of a message; otherwise None is in its place, again and again, until that is there.

    Raises:
        EOFError, OSError: the other end is gone.
    """
    while True:
        header, metas = pickle.loads((yield from _header(conn, wait)))
        tensors = [empty(meta) for meta in metas]
        for tensor in tensors:
            if tensor.numel():
                yield from _fill(conn, memory(tensor), wait)
        yield header, tensors


def _header(conn: Connection, wait: bool) -> Generator[None, None, bytes | bytearray]:
    if not _POSIX:
        yield from _piece(conn, wait)
        return conn.recv_bytes()
    length = bytearray(_LENGTH.size)
    yield from _fill(conn, memoryview(length), wait)
    header = bytearray(*_LENGTH.unpack(length))
    yield from _fill(conn, memoryview(header), wait)
    return header


def _fill(conn: Connection, memory: memoryview, wait: bool) -> Iterator[None]:
    if not _POSIX:
        yield from _piece(conn, wait)
        conn.recv_bytes_into(memory)
        return
    while memory:
        try:
            count = os.readv(conn.fileno(), [memory])
        except BlockingIOError:
            yield None
            continue
        if not count:
            raise EOFError
        memory = memory[count:]


def _piece(conn: Connection, wait: bool) -> Iterator[None]:
    """Until one has begun to come, where the connection's own methods read; those wait anyway."""
    while not wait and not conn.poll():
        yield None


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a dense tensor on the CPU with at least one element; they are there for as long as the tensor is."""
    # ctypes rather than numpy: the engine needs torch and the standard library only, and numpy has no bfloat16
    nbytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")
