"""Links between two ranks: opened, tried out, and led through the host's memory where a direct one does not work."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from asyncdiff_nodes.engine import accelerator

LOOPBACK = "127.0.0.1"
TRIAL_SECONDS = 20.0  # a direct link that has not carried its first values by then never will
_TRIAL_VALUES = 2**20  # 8 MiB: more than what some broken links carry well
_POLL = 0.005  # seconds
_HELLO = 1406  # what a link between hosts carries first


@dataclass(frozen=True)
class RankLocation:
    """Location of a rank.

    Attributes:
        name: of its device, the same for all processes of the group; ranks that share a name share a device.
        device: the same, as torch calls it in the rank's process.
        host: address of its machine, which its links are bound to.
    """

    name: str
    device: str
    host: str = LOOPBACK


@dataclass(frozen=True)
class Link:
    """A link of two ranks, open at both ends.

    Attributes:
        group: a process group of two; 0 sends, 1 receives.
        direct: whether it goes from device to device; else from host to host.
        refusal: why it is not direct, where it could have been; "" otherwise.
    """

    group: Any
    direct: bool
    refusal: str = ""


def may_be_direct(a: RankLocation, b: RankLocation, staged: Collection[frozenset[str]] = ()) -> bool:
    """Whether the devices at these locations can exchange values without the host, and are not among the pairs ``staged``."""
    (kind, other) = (torch.device(location.device).type for location in (a, b))
    names = frozenset((a.name, b.name))
    return kind == other and len(names) == 2 and accelerator.links_directly(kind) and names not in staged


def open_link(store: dist.Store, sender: RankLocation, receiver: RankLocation, sends: bool, direct: bool, timeout: float) -> Link:
    """Open a link, as both its ends must do at the same time.

    A direct one is used only if both ends say that it has carried values from one to the other: where the system's settings
    forbid such transfers, they hang or bring other values.

    Args:
        store: of this link alone.
        sends: whether this is the sender's end.
        direct: whether to try a direct one first.
        timeout: seconds until a transfer whose other end says nothing fails.

    Raises:
        RuntimeError: the two ends do not find each other.
    """
    side, here = int(not sends), sender if sends else receiver
    refusal = ""
    if direct:
        _exchanged(store, "here", side, "")  # both wait from now on
        group, failure = _tried(dist.PrefixStore("direct", store), side, torch.device(here.device), timeout)
        refusal = _exchanged(store, "failure", side, failure) or failure
        if not refusal:
            return Link(group, True)
        if group is not None:
            accelerator.abandon(group)
    group = _host_link(dist.PrefixStore("host", store), side, here.host, timeout)
    name = f"{sender.name} to {receiver.name}"
    hello = torch.full((1,), _HELLO if sends else 0)
    (group.send([hello], 1, 0) if sends else group.recv([hello], 0, 0)).wait()
    if int(hello) != _HELLO:
        raise RuntimeError(f"the link from {name} carries foreign data")
    return Link(group, False, refusal)


def _exchanged(store: dist.Store, key: str, side: int, value: str) -> str:
    """Tell the other end something, and wait for what it says."""
    store.set(f"{key}{side}", value)
    return bytes(store.get(f"{key}{1 - side}")).decode()


def _tried(store: dist.Store, side: int, device: torch.device, timeout: float) -> tuple[Any, str]:
    """Open a direct link and send values over it; returns it, if it was opened, and what went wrong."""
    group, pattern = None, torch.arange(_TRIAL_VALUES)
    try:
        group = accelerator.direct_link(store, side, timeout)
        values = pattern.to(device) if side == 0 else torch.zeros_like(pattern, device=device)
        (group.send([values], 1, 0) if side == 0 else group.recv([values], 0, 0)).wait()
        done, deadline = accelerator.event(device), time.monotonic() + TRIAL_SECONDS
        while not done.query():
            if time.monotonic() > deadline:
                return group, f"nothing arrived within {TRIAL_SECONDS:.0f} s"
            time.sleep(_POLL)
        return group, "" if torch.equal(values.cpu(), pattern) else "other values arrived than were sent"
    except torch.OutOfMemoryError:  # no fault of the link
        raise
    except RuntimeError as error:  # the backend's own, all of which are
        return group, (str(error).splitlines() or [type(error).__name__])[0]


def _host_link(store: dist.Store, side: int, host: str, timeout: float) -> Any:
    """Make a process group of two of gloo, bound to ``host``."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # PyTorch's stubs lack it
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._threads = 1
    options._timeout = timedelta(seconds=timeout)
    return dist.ProcessGroupGloo(store, side, 2, options)
