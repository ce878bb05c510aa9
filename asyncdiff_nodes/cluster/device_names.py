"""Names of a cluster's devices: from what the user gives to one per rank, by what Ray says of the cluster."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import ray

from asyncdiff_nodes.engine.devices import on_cluster
from asyncdiff_nodes.engine.errors import DeviceError

_NAME = re.compile(r"(ray:auto|ray://[^\s/]+:\d+)(/cpu)?")
_LIKE = "use ray:auto or ray://HOST:PORT, with /cpu after it for a core instead of a GPU"

_connected: str | None = None  # the address that this program was connected to here


def address_of(name: str) -> str:
    """Return the address of the cluster, as ``ray.init`` takes it."""
    return name.removesuffix("/cpu").replace("ray:auto", "auto")


def on_cpu(name: str) -> bool:
    """Whether this is a core, not a GPU."""
    return name.endswith("/cpu")


def resolve(names: Sequence[str]) -> tuple[str, ...]:
    """Name one device per rank; connects to the cluster.

    Args:
        names: as in :mod:`asyncdiff_nodes.cluster`, at least one of them of a cluster.

    Raises:
        DeviceError: not such a name, names of several clusters or of this machine among them, a cluster that cannot be reached,
            or that has too few devices.
    """
    given = f"devices: {', '.join(names)}"
    for name in filter(on_cluster, names):
        if not _NAME.fullmatch(name):
            raise DeviceError(f"devices: {name!r} is no device of a Ray cluster: {_LIKE}")
    if not all(map(on_cluster, names)) or len(set(map(address_of, names))) > 1:
        raise DeviceError(f"{given} are not of one cluster: name devices of this machine only, or of one Ray cluster")
    connect(names[0])
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node.get("CPU", 0)) for node in nodes]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    there = f"this cluster has {gpus} GPUs, and {sum(cores)} CPU cores on {len(nodes)} machines"
    if len(names) == 1:
        names = [names[0]] * (sum(map(bool, cores)) if on_cpu(names[0]) else gpus)
    cpus = sum(map(on_cpu, names))
    if cpus > sum(cores) or len(names) - cpus > gpus or not names:
        raise DeviceError(f"{given}: {there}" + ("" if gpus else "; name cores with /cpu, such as ray:auto/cpu"))
    return tuple(names)


def connect(name: str) -> None:
    """Connect this program to the cluster of this device, unless it is.

    A program has one connection; it ends with the program, or by ``ray.shutdown()``.

    Raises:
        DeviceError: there is none, or the program is connected to another one.
    """
    global _connected
    address = address_of(name)
    if ray.is_initialized():
        if address not in ("auto", _connected):
            raise DeviceError(f"devices: {name}: this program is connected to another Ray cluster; end that by ray.shutdown()")
        return
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        raise DeviceError(
            f"devices: {name}: no Ray cluster can be reached there ({error}). Start one by `ray start --head` on one machine and "
            "`ray start --address=...` on the others; see docs/ray.md"
        ) from error
    _connected = address
