"""Entry of a rank, as a process of this machine.

Not in the engine, since that imports PyTorch: for as long as that takes, the parent is watched already.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from multiprocessing.connection import Connection


def main(conn: Connection, death: Connection) -> None:
    """Entry point of the process.

    Args:
        conn: duplex pipe for messages; see :mod:`.engine.wire`.
        death: reads end-of-file when the parent is gone, however it died.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal: the parent decides
    os.umask(0o077)  # what libraries write here is nobody else's
    threading.Thread(target=_exit_with_parent, args=(death,), daemon=True).start()
    gc.disable()  # until all is imported: what that makes is there to stay, and takes a tenth longer to be looked through
    from asyncdiff_nodes.engine.rank.message_loop import serve

    serve(conn)


def _exit_with_parent(death: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        death.recv_bytes()
    os._exit(1)
