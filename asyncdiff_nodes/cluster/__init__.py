"""Ranks on several machines, placed by Ray (extra ``ray``). docs/ray.md says how to set it up.

A device of a cluster is named by the cluster's address: ``ray:auto`` for the one that this machine belongs to, or
``ray://HOST:PORT`` for one that is reached through Ray Client. That is one of its GPUs; with ``/cpu`` after it, one of its CPU
cores. A list of one such name stands for all that the cluster has: its GPUs, or a core on each of its machines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from asyncdiff_nodes.engine.errors import DeviceError

if TYPE_CHECKING:
    from asyncdiff_nodes.engine.parent.rank_set import RankSet


def resolve(names: Sequence[str]) -> tuple[str, ...]:
    """Connect to the cluster and return one name per rank; see :class:`~asyncdiff_nodes.extensions.Cluster`.

    Raises:
        DeviceError: Ray is not installed; or as :func:`.device_names.resolve`.
    """
    try:
        from . import device_names  # which imports Ray
    except ModuleNotFoundError as error:
        raise DeviceError(f'devices: {", ".join(names)} needs Ray ({error}): pip install "comfyui-asyncdiff[ray]"') from error
    return device_names.resolve(names)


def start(devices: Sequence[str], poll: Callable[[], None] | None) -> RankSet:
    """Have Ray start one rank for each of ``devices``; see :class:`~asyncdiff_nodes.extensions.Cluster`."""
    from .ray_ranks import RayRanks

    return RayRanks(devices, poll)
