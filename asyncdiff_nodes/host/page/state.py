"""The state of this pack in plain data, for the panel in the page."""

from __future__ import annotations

from typing import Any

from asyncdiff_nodes import __version__
from asyncdiff_nodes.host.workers.pool import POOL

from . import progress
from .report import last_run


def state() -> dict[str, Any]:
    """The current or last run, its report, the live workers, and the devices of ``auto``."""
    record = last_run()
    return {
        "version": __version__,
        "run": progress.current.snapshot() if progress.current else None,
        "report": record.text() if record else None,
        "workers": POOL.summary(),
        "devices": list(progress.visible_devices()),
    }
