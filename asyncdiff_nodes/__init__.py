"""ComfyUI-AsyncDiff: all of an artist's GPUs denoise one image together (AsyncDiff, arXiv 2406.06911).

The engine knows no model and no cluster. This file, which Python runs before any other of the package, tells it of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import extensions

if TYPE_CHECKING:
    from .engine import Family

__version__ = "0.1.0"


def _families() -> Mapping[str, Family]:
    from .models import FAMILIES  # only now: a rank's process is to be watched before it imports PyTorch

    return FAMILIES


def _ray() -> extensions.Cluster:
    from . import cluster

    return cluster


extensions.register_families(_families)
extensions.register_cluster("ray:", _ray)
