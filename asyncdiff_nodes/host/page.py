"""The state of this pack in plain data, for the panel in the page."""

from __future__ import annotations

from typing import Any

from asyncdiff_nodes import __version__

from . import live
from .pool import POOL
from .report import last_run


def state() -> dict[str, Any]:
    """The run that goes on or was last, its report, the workers that are alive, and the devices of ``auto``."""
    record = last_run()
    return {
        "version": __version__,
        "run": live.current.snapshot() if live.current else None,
        "report": record.text() if record else None,
        "workers": POOL.summary(),
        "devices": list(live.visible_devices()),
    }
