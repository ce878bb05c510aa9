"""What depends on the kind of a device: streams, events, pinned memory, memory figures, names, and direct links.

No other module names a kind, or asks PyTorch's module for one. Everything goes through ``torch.get_device_module``: CUDA (GPUs of
NVIDIA, and of AMD through ROCm), Intel's XPU, and any other kind whose module has what is needed here. The CPU needs none of it:
work on it is done when a call returns.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .tensors import TensorMeta

_NEEDED = ("Event", "current_stream", "device_count", "empty_cache", "mem_get_info", "set_device", "synchronize")
_MEMORY_SHARE = 0.25  # of the largest device's memory: with less than that, a device is no help
_BFLOAT16 = 8  # the first major compute capability of NVIDIA's that computes with it


class Event(Protocol):
    """A point in a stream's order of work."""

    def query(self) -> bool:
        """Whether the stream has come to it."""

    def synchronize(self) -> None:
        """Wait until it has."""

    def elapsed_time(self, end: Event) -> float:
        """Count the milliseconds from this event to ``end``; both must have been reached."""


@dataclass(frozen=True)
class LeftOut:
    """A device that ``auto`` does not stand for, its usual name, and why."""

    device: str
    title: str
    why: str


def lacking(kind: str) -> list[str]:
    """Name what ranks need and PyTorch's module for this kind of device does not have; all of it where there is no module."""
    try:
        module = torch.get_device_module(kind)
    except RuntimeError:
        return list(_NEEDED)
    return [name for name in _NEEDED if not hasattr(module, name)]


def count(kind: str) -> int:
    """Count the devices of this kind; 0 where PyTorch cannot use any."""
    try:
        return int(torch.get_device_module(kind).device_count())
    except (RuntimeError, AttributeError, AssertionError):
        return 0


def own_kind() -> str | None:
    """Name the kind of this machine's accelerators; None where there is none that ranks can use."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None or lacking(found.type) else found.type


def all_devices(kind: str | None) -> list[str]:
    """Name all devices of this kind; none where ranks cannot use them, as with CPUs, which have no numbers."""
    return [] if kind is None or lacking(kind) else [f"{kind}:{index}" for index in range(count(kind))]


def like_the_first(kind: str) -> tuple[list[str], list[LeftOut]]:
    """Divide the devices of this kind into those that can work with the first one, and those that would hold it up.

    The host chooses dtypes for the first one. Left out are integrated GPUs, devices with much less memory than the largest, and
    NVIDIA's without bfloat16 beside a first one that has it.
    """
    names = all_devices(kind)
    most = max(map(total_memory, names), default=0)
    kept, left_out = [], []
    for name in names:
        if name != names[0] and (why := _holds_up(name, names[0], most)):
            left_out.append(LeftOut(name, title(name), why))
        else:
            kept.append(name)
    return kept, left_out


def _holds_up(name: str, first: str, most: int) -> str:
    """Say why a device is no help to the first one; "" where it is."""
    if getattr(_properties(name), "is_integrated", False):
        return "it is integrated into the processor"
    if (memory := total_memory(name)) < _MEMORY_SHARE * most:
        return f"it has {memory / 2**30:.1f} GiB of memory, the largest one {most / 2**30:.1f} GiB"
    own, other = _capability(name), _capability(first)
    if own and other and own < _BFLOAT16 <= other:
        return f"it cannot compute in bfloat16 (compute capability {own}.x), which {first} can"
    return ""


def _capability(device: str) -> int | None:
    """NVIDIA's major compute capability; None for others, whose numbers mean something else."""
    if torch.device(device).type != "cuda" or torch.version.hip is not None:
        return None
    return int(torch.cuda.get_device_capability(device)[0])


def _properties(device: str) -> Any:
    module = _module(torch.device(device))
    return module.get_device_properties(device) if hasattr(module, "get_device_properties") else None


def title(device: str) -> str:
    """Return a device's usual name, such as ``RTX 4090``; its kind where it has none."""
    name = getattr(_properties(device), "name", None) if torch.device(device).type != "cpu" else None
    return name.removeprefix("NVIDIA ").removeprefix("GeForce ") if name else torch.device(device).type


def total_memory(device: str) -> int:
    """Return a device's memory in bytes."""
    total = getattr(_properties(device), "total_memory", None)
    return memory(device)[1] if total is None else int(total)


def memory(device: str) -> tuple[int, int]:
    """Return free and total bytes of a device. To ask takes some of it, for a context of this process."""
    free, total = _module(torch.device(device)).mem_get_info(device)
    return int(free), int(total)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


# -- what a process does on its device -----------------------------------------------------------------------------------


def enter(device: torch.device) -> None:
    """Make ``device`` the calling thread's: else what it does would open a context on the first one."""
    if device.type != "cpu":
        _module(device).set_device(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that this process gave it."""
    if device.type != "cpu":
        _module(device).synchronize(device)


def synchronize_stream(device: torch.device) -> None:
    """Wait until the device has done all that this thread gave it."""
    if device.type != "cpu":
        _module(device).current_stream(device).synchronize()


def event(device: torch.device, timing: bool = False) -> Event:
    """Record an event in what this thread gives the device, which is not a CPU.

    Args:
        timing: whether times between events will be asked for.
    """
    module = _module(device)
    made: Any = module.Event(enable_timing=timing)
    made.record(module.current_stream(device))
    recorded: Event = made
    return recorded


def empty_cache(device: torch.device) -> None:
    """Give back what PyTorch keeps of the device's memory: other processes cannot have it otherwise."""
    if device.type != "cpu":
        _module(device).empty_cache()


def staging(meta: TensorMeta) -> torch.Tensor:
    """Allocate host memory that a device copies from and to while the host does something else."""
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, pin_memory=True)


# -- links between devices -----------------------------------------------------------------------------------------------


def links_directly(kind: str) -> bool:
    """Whether two devices of this kind exchange values without the host: by NCCL, or AMD's RCCL of the same interface."""
    return kind == "cuda" and dist.is_nccl_available()


def before_direct_links(one_machine: bool) -> None:
    """Prepare this process's environment for direct links, before it uses a device.

    ``CUDA_LAUNCH_BLOCKING``, which helps to find errors, has the host wait for each transfer: two ranks that send to each other
    would wait for ever. An error of a device is to reach this rank's own code, which says what it was, and not NCCL's watchdog,
    which aborts the process; calls have a deadline of their own.
    """
    os.environ.pop("CUDA_LAUNCH_BLOCKING", None)
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    if one_machine:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")  # its bootstrap listener, too, stays on loopback; "=": no other lo...


def direct_link(store: dist.Store, side: int, timeout: float) -> Any:
    """Open a process group of two devices; ``side`` 0 sends, 1 receives.

    Args:
        timeout: seconds until a transfer whose other end says nothing fails.
    """
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout)
    return dist.ProcessGroupNCCL(store, side, 2, options)


def abandon(link: Any) -> None:
    """End a direct link that does not work: what waits on the device for its other end waits no longer."""
    link.abort()
