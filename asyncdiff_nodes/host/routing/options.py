"""What the artist chose, checked against this machine and turned into a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from asyncdiff_nodes.engine import AsyncDiffError, DeviceError, Plan, PlanError
from asyncdiff_nodes.engine.compression import COMPRESSIONS
from asyncdiff_nodes.engine.devices import on_cluster, resolve_devices
from asyncdiff_nodes.host.page.settings import setting
from asyncdiff_nodes.host.values import number, shown, whole

CHOICES = {
    "preset": ("Exact", "Balanced", "Fast", "Turbo", "Custom"),
    "control_nets": ("shared", "fresh"),
    "on_failure": ("restart", "finish"),
    "compression": COMPRESSIONS,
    "verify": ("auto", "off", "first", "always"),
}
ALWAYS = 1_000_000  # a warm-up longer than any run: every step is synchronous


class OneDeviceError(AsyncDiffError, ValueError):
    """There is no second device to share the work with."""


@dataclass(frozen=True)
class Options:
    """The widgets of the *AsyncDiff Options* node.

    Attributes:
        preset: ``Exact`` (every step synchronous), ``Balanced``, ``Fast``, ``Turbo``, or ``Custom``, which uses the fields from
            ``segments`` to ``branches``.
        devices: ``auto`` for those of the settings (by default every CUDA device), a list such as ``cuda:0, cuda:2``, or
            ``ray:auto`` for all GPUs of this machine's Ray cluster; see :mod:`asyncdiff_nodes.cluster`.
        cuts: block names where the segments begin, separated by commas; empty for automatic ones.
        segments: number of segments, 0 for as many as the devices allow.
        stride, warmup, time_shift, forecast, cooldown: see :class:`~asyncdiff_nodes.engine.Plan`.
        speedup: of the whole run; the warm-up is then as long as that allows, whatever ``warmup`` says. 0 for none in particular.
        branches: see :class:`~asyncdiff_nodes.engine.Plan`; 0 for as many as are of use.
        control_nets: ``shared``: the ranks compute ControlNets with the network, and as stale; ``fresh``: the host does, before
            each call.
        on_failure: when a rank dies or hangs. ``restart``: others take over at the step that it was in, once per sampling;
            ``finish``, and after that: the host goes on by itself.
        compression: see :class:`~asyncdiff_nodes.engine.Plan`.
        verify: which calls the host computes as well, to compare; see :class:`~.audit.Audit`. ``auto`` for what the settings say.
    """

    preset: str = "Balanced"
    devices: str = "auto"
    cuts: str = ""
    segments: int = 0
    stride: int = 1
    warmup: int = 3
    time_shift: bool = False
    forecast: bool = True
    cooldown: int = 1
    speedup: float = 0.0
    branches: int = 0
    control_nets: str = "shared"
    on_failure: str = "restart"
    compression: str = "none"
    verify: str = "auto"

    def resolve(self, items: int = 1, branching: bool = True) -> tuple[Plan, tuple[str, ...]]:
        """The plan, and one device per rank.

        Args:
            items: of the batch of each call of the network.
            branching: whether there may be branches if the user did not say so.

        Raises:
            OneDeviceError: fewer than two devices.
            PlanError, DeviceError: a value that is of another type or out of range, or a device that this machine does not have.
        """
        return self._checked()._resolve(items, branching)

    def _checked(self) -> Options:
        """The same with plain numbers, once every widget has a value of its kind."""
        return Options(**{each.name: _plain(each.name, each.type, getattr(self, each.name)) for each in fields(self)})

    def _resolve(self, items: int, branching: bool) -> tuple[Plan, tuple[str, ...]]:
        """As :meth:`resolve`, of options that are checked."""
        custom = {name: getattr(self, name) for name in ("stride", "warmup", "time_shift", "cooldown")}
        if self.preset == "Custom":
            if self.speedup and not 1 <= self.speedup < math.inf:
                raise PlanError(f"speedup={self.speedup:g} is out of range: choose 1 or more, or 0 for none in particular")
            if self.segments < 0:
                raise PlanError(f"segments={self.segments} is out of range: choose 2 or more, or 0 for automatic")
            if self.branches < 0:
                raise PlanError(f"branches={self.branches} is out of range: choose 1 or more, or 0 for as many as are of use")
            Plan(**custom)  # what it refuses is out of range with any devices
        devices = self._devices()
        count = len(devices)
        knobs: dict[str, Any] = {"cuts": tuple(_words(self.cuts)) or None, "compression": self.compression}
        branches = self._branches(count, 2 if branching and items % 2 == 0 else 1)
        each = count // branches
        if self.preset == "Custom":
            segments = self.segments or each - self.stride + 1
            if self.segments == 1 and branches == 1:
                raise PlanError(
                    f"segments=1 with branches={self.branches}: one segment needs 2 or more branches: choose 2 or more of either "
                    "of them, or segments=0 for automatic"
                )
            least = 2 if self.stride > 1 or branches == 1 else 1
            if not self.segments and segments < least:
                needed = branches * (least + self.stride - 1)
                raise PlanError(
                    f"stride={self.stride} with branches={branches} needs {needed} devices or more, and there are {count}: lower "
                    "one of them"
                )
            knobs |= custom | {"forecast": int(self.forecast)}
        else:
            preset = "Fast" if self.preset == "Turbo" and each < 3 else self.preset  # stride 2 takes three devices
            stride = 2 if preset == "Turbo" else 1
            segments, knobs["stride"] = each - stride + 1, stride
            knobs |= {"warmup": {"Exact": ALWAYS, "Fast": 2}.get(preset, 3), "cooldown": 1, "fresh_skips": preset != "Fast"}
        if self.preset != "Exact" and items > branches:
            knobs["microbatches"] = 2
        plan = Plan(segments=segments, branches=branches, **knobs)
        if plan.world_size > count:
            raise PlanError(
                f"segments={plan.segments} with stride={plan.stride} and branches={plan.branches} needs {plan.world_size} "
                f"devices (branches * (segments + stride - 1)), and there are {count}, {', '.join(devices)}: lower one of them"
            )
        return plan, devices[: plan.world_size]

    def _branches(self, count: int, useful: int) -> int:
        """How many there will be on ``count`` devices, if there is work for as many as are ``useful``."""
        if self.preset == "Custom" and self.branches:
            return self.branches
        # who says what the segments are, or wants the host's picture bit by bit, means the whole batch
        given = self.cuts or (self.preset == "Custom" and self.segments) or self.preset == "Exact"
        if given or count % useful:
            return 1
        # of four devices, three segments with stride 2 are the fastest
        return 1 if self.preset == "Turbo" and count // useful == 2 else useful

    def _devices(self) -> tuple[str, ...]:
        names, given = _words(self.devices), f"devices={self.devices!r}"
        if names in ([], ["auto"]):
            stored = setting("Devices")
            names, given = _words(stored), f"Settings, AsyncDiff, Devices: {stored!r}"
        if names in ([], ["auto"]):
            names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
            if len(names) < 2:
                found = "this machine has only one visible GPU" if names else "this machine has no CUDA device"
                raise OneDeviceError(
                    f"{found}. If it has more, start ComfyUI so that it sees them (on Windows: --cuda-device all "
                    "--disable-pinned-memory), or name them in AsyncDiff Options, devices"
                )
        if remote := next((name for name in names if name.startswith("ray://")), None):
            # what a program connects to may have it run anything: not for a workflow, or a request, to choose
            raise DeviceError(
                f"{given}: ComfyUI takes no address from a workflow or the settings: start it with RAY_ADDRESS={remote} in its "
                "environment, and name ray:auto here"
            )
        devices = resolve_devices(names)
        if len(devices) < 2:
            one = "finds only one device there" if any(map(on_cluster, names)) else "names only one device"
            raise OneDeviceError(f"{given} {one}: name two or more, or 'auto'")
        return devices


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\s,;]+", text.strip()) if word]


def _plain(name: str, kind: str, value: Any) -> Any:
    """``value`` of the widget ``name``, as its plain type ``kind``."""
    take, cure = _KINDS[kind]
    found, cure = take(value), _CURES.get(name, cure)
    if found is None or found not in CHOICES.get(name, (found,)):
        raise (DeviceError if name == "devices" else PlanError)(f"{name}={shown(value)}: {cure}")
    return found


def _is_bool(value: Any) -> bool:
    """Whether this is True or False, or NumPy's."""
    return isinstance(value, bool | np.bool_)


# by the type of a field: its value as that type, or None
_KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "str": (lambda value: value if isinstance(value, str) else None, "choose a text"),
    "int": (lambda value: None if _is_bool(value) else whole(value), "choose a whole number"),
    "bool": (lambda value: bool(value) if _is_bool(value) else None, "choose True or False"),
    "float": (lambda value: None if _is_bool(value) else number(value), "choose a number"),
}
_CURES = {
    "devices": "name those to use, such as cuda:0, cuda:1, or choose auto",
    "cuts": "name the blocks, separated by commas, or none",
    **{name: f"choose one of {', '.join(choices)}" for name, choices in CHOICES.items()},
}
