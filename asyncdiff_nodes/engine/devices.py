"""Device strings of the user, checked against this machine, or the cluster that they name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asyncdiff_nodes.extensions import cluster_of

from . import accelerator
from .errors import DeviceError


def on_cluster(name: str | torch.device) -> bool:
    """Whether this is the name of a device of a cluster, not of this machine."""
    return cluster_of(str(name)) is not None


def resolve_devices(names: Sequence[str | torch.device]) -> tuple[str, ...]:
    """Name one device per rank, by the name that it has from now on.

    Raises:
        DeviceError: as :func:`parse_devices`; or a cluster that cannot be reached, or not this way.
    """
    for name in () if isinstance(names, str) else names:
        if (cluster := cluster_of(str(name))) is not None:
            return cluster.resolve([str(each) for each in names])
    return tuple(str(device) for device in parse_devices(names))


def parse_devices(names: Sequence[str | torch.device]) -> list[torch.device]:
    """Look devices up by name, an index filled in where it is missing; the same device may be named more than once.

    Raises:
        DeviceError: not a device string, or no such device here.
    """
    if isinstance(names, str):
        raise DeviceError(f"devices must be a sequence such as ['cuda:0', 'cuda:1'], not {names!r}")
    return [_parse(name) for name in names]


def _parse(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"devices: {name!r} is not a device: use cpu, cuda:0, cuda:1, ...") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if lacking := accelerator.lacking(device.type):
        raise DeviceError(
            f"devices: {str(name)!r} cannot be used: PyTorch's module for {device.type} lacks {', '.join(lacking)}, which ranks "
            "need; name CUDA or XPU devices, or cpu"
        )
    count = accelerator.count(device.type)
    index = device.index or 0
    if index >= count:
        there = f"the last one is {device.type}:{count - 1}" if count else f"this machine has no usable {device.type} device"
        raise DeviceError(f"devices: {str(name)!r} does not exist: {there}; name only such as there are (cpu is one)")
    return torch.device(device.type, index)
