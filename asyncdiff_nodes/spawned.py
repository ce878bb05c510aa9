"""Where a rank begins, as a process of this machine.

Not in the engine, since that imports PyTorch: for as long as that takes, the parent is watched already.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import threading
from multiprocessing.connection import Connection


def main(conn: Connection, death: Connection, folder: str) -> None:
    """Entry point of the process.

    Args:
        conn: duplex pipe for messages; see :mod:`.engine.wire`.
        death: reads end-of-file when the parent is gone, however it died.
        folder: the group's temporary folder, which the parent removes if it can.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal: the parent decides
    os.umask(0o077)
    folders = [folder]
    threading.Thread(target=_exit_with_parent, args=(death, folders), daemon=True).start()
    gc.disable()  # until all is imported: what that makes is there to stay, and takes a tenth longer to be looked through
    from .engine.worker import serve

    serve(conn, folders)


def _exit_with_parent(death: Connection, folders: list[str]) -> None:
    with contextlib.suppress(EOFError, OSError):
        death.recv_bytes()
    shutil.rmtree(folders[0], ignore_errors=True)
    os._exit(1)
