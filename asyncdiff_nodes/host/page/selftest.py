"""The self-test for the page, in a process of its own: what it does to the devices cannot harm the host."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

_PACK = Path(__file__).resolve().parents[3]
# not -m: the Python that comes with ComfyUI for Windows looks for modules in its own folders only
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from asyncdiff_nodes.cli import main; sys.exit(main(sys.argv[2:]))"
_one = asyncio.Lock()


class BusyError(RuntimeError):
    """The devices are in use."""


async def run() -> str:
    """Run the self-test on all devices; returns what it prints.

    Raises:
        BusyError: a picture is sampled, or a self-test runs already.
    """
    from asyncdiff_nodes.host.workers.pool import POOL

    if _one.locked():
        raise BusyError("A self-test is running already.")
    async with _one:
        if await asyncio.to_thread(POOL.release_idle) is None:  # idle workers have memory of the devices
            raise BusyError("The workers are sampling: cancel the run first.")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _PROGRAM, str(_PACK), "selftest", "--json", ""),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            printed, _ = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        return printed.decode(errors="replace")
