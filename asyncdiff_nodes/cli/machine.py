"""What a reader needs to know of this machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from asyncdiff_nodes.engine import accelerator


def cores() -> int:
    """Without hyper-threads, where that is known."""
    psutil = _psutil()
    return (psutil and psutil.cpu_count(logical=False)) or os.cpu_count() or 1


def memory() -> tuple[int, int] | None:
    """All bytes and free ones; None where psutil is missing."""
    psutil = _psutil()
    if psutil is None:
        return None
    found = psutil.virtual_memory()
    return found.total, found.available


def machine() -> dict[str, Any]:
    """What a number measured here is to be judged by."""
    found = memory()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round(found[0] / 2**30, 1) if found else None,
        "gpus": [accelerator.title(device) for device in accelerator.all_devices(accelerator.own_kind())],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _psutil() -> Any:
    """The package, None where it is missing: doctor goes without."""
    try:
        import psutil
    except ModuleNotFoundError:
        return None
    return psutil


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
