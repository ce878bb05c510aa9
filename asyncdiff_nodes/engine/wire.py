"""Objects and tensors over a multiprocessing pipe.

A message is one pickled header followed by the raw bytes of its tensors, so that no tensor is ever pickled, copied into
shared memory or named in a file system. Only pipes that this package created and its own workers inherited may carry it.

Where a pipe is a socket, a message goes straight from memory to memory, in one piece: the connection's own methods copy it twice
more, in small pieces, which is several times slower, and a model's weights pass here.
"""

from __future__ import annotations

import os
import pickle
import select
import socket
import struct
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from .tensors import TensorMeta, empty, memory

_POSIX = os.name == "posix"
_LENGTH = struct.Struct("!Q")  # of the header, before it
_AT_ONCE = 512  # pieces that one call of the system writes: all that we know of allow 1024
_BUFFER = 2**20  # bytes on their way in a pipe, if the system allows as many: fewer turns of writer and reader


def pipe(context: Any) -> tuple[Connection, Connection]:
    """Open a duplex pipe of this context: the end of the parent, which nothing keeps waiting, and that of a rank."""
    ends: tuple[Connection, Connection] = context.Pipe(duplex=True)
    if _POSIX:
        os.set_blocking(ends[0].fileno(), False)
        for end in ends:
            with socket.socket(fileno=os.dup(end.fileno())) as own:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    return ends


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
    message = next(incoming(conn, wait=True))
    assert message is not None, "there is none before all of it has come"
    return message


def incoming(conn: Connection, wait: bool) -> Iterator[tuple[Any, list[torch.Tensor]] | None]:
    """Yield the messages that come, one after the other.

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
    """Wait until a piece has begun to come, where the connection's own methods read; those wait anyway."""
    while not wait and not conn.poll():
        yield None
