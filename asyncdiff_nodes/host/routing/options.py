"""The artist's options, checked against this machine and turned into a plan."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import comfy.model_management
import numpy as np
import torch

from asyncdiff_nodes.engine import AsyncDiffError, DeviceError, Plan, PlanError, accelerator
from asyncdiff_nodes.engine.devices import on_cluster, resolve_devices
from asyncdiff_nodes.host.choices import CHOICES, CUSTOM, PRESETS, STALE_COSTS, OptionValues
from asyncdiff_nodes.host.page.settings import setting
from asyncdiff_nodes.host.values import number, shown, whole

log = logging.getLogger(__name__)

_TURBO_DEVICES = 3  # with fewer, no device is left for a second step per round


class OneDeviceError(AsyncDiffError, ValueError):
    """There is no second device to share the work with."""


@dataclass(frozen=True)
class Options(OptionValues):
    """The options as this machine reads them."""

    def resolve(self, items: int = 1, branching: bool = True, banding: bool = False) -> tuple[Plan, tuple[str, ...]]:
        """The plan, and one device per rank.

        Args:
            items: number of batch items in each call of the network.
            branching: whether there may be branches where the user did not set their number.
            banding: whether calls may be in bands where the user did not set their number.

        Raises:
            OneDeviceError: fewer than two devices.
            PlanError, DeviceError: a value is of another type or out of range, or this machine lacks a device.
        """
        return self._checked()._resolve(items, branching, banding)

    def _checked(self) -> Options:
        """The same options with plain numbers. Raises where a widget has a value of another type."""
        return Options(**{each.name: _plain(each.name, each.type, getattr(self, each.name)) for each in fields(self)})

    def _resolve(self, items: int, branching: bool, banding: bool) -> tuple[Plan, tuple[str, ...]]:
        """Do as :meth:`resolve`, for options that are checked."""
        if self.preset == CUSTOM:
            self._check_range()
        devices = self._devices()
        branches = self._branches(len(devices), 2 if branching and items % 2 == 0 else 1)
        segments, knobs = (self._custom if self.preset == CUSTOM else self._by_preset)(len(devices), branches)
        knobs |= {"cuts": tuple(_words(self.cuts)) or None, "compression": self.compression}
        if self.preset != "Exact" and items > branches and segments > 1:
            knobs["microbatches"] = 2
        if banding and self.bands != 1 and self.preset in STALE_COSTS and segments + knobs["stride"] > 2:
            knobs["bands"] = segments + knobs["stride"] - 1
        plan = Plan(segments=segments, branches=branches, **knobs)
        if plan.world_size > len(devices):
            raise PlanError(
                f"segments={plan.segments} with stride={plan.stride} and branches={plan.branches} needs {plan.world_size} "
                f"devices (branches * (segments + stride - 1)), but there are {len(devices)} ({', '.join(devices)}): lower one "
                "of these numbers"
            )
        return plan, devices[: plan.world_size]

    def _by_preset(self, count: int, branches: int) -> tuple[int, dict[str, Any]]:
        """Number of segments on ``count`` devices, and the other values of the plan, by the preset."""
        each = count // branches
        preset = PRESETS["Fast" if self.preset == "Turbo" and each < _TURBO_DEVICES else self.preset]
        return each - preset.stride + 1, asdict(preset)

    def _custom(self, count: int, branches: int) -> tuple[int, dict[str, Any]]:
        """The same, by the widgets."""
        if self.bands > 1:
            return self._in_bands(count, branches)
        segments = self.segments or count // branches - self.stride + 1
        if self.segments == 1 and branches == 1:
            raise PlanError(
                f"segments=1 with branches={self.branches}: one segment needs 2 or more branches: choose 2 or more for either, "
                "or segments=0 (automatic)"
            )
        least = 2 if self.stride > 1 or branches == 1 else 1
        if not self.segments and segments < least:
            needed = branches * (least + self.stride - 1)
            raise PlanError(
                f"stride={self.stride} with branches={branches} needs {needed} devices or more, but there are {count}: lower "
                "one of these numbers"
            )
        return segments, {**self._knobs(), "forecast": int(self.forecast)}

    def _in_bands(self, count: int, branches: int) -> tuple[int, dict[str, Any]]:
        """The same, with bands: all calls, or with segments the synchronous ones."""
        segments = max(1, self.segments)
        if self.bands * branches > count:
            raise PlanError(
                f"bands={self.bands} with branches={branches} needs {self.bands * branches} devices, but there are {count}: "
                "lower one of these numbers"
            )
        return segments, {**self._knobs(), "forecast": int(self.forecast), "bands": self.bands}

    def _knobs(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "warmup", "time_shift", "cooldown")}

    def _check_range(self) -> None:
        """Refuse values that are out of range on any devices."""
        if self.speedup and not 1 <= self.speedup < math.inf:
            raise PlanError(f"speedup={self.speedup:g} is out of range: choose 1 or more, or 0 to set no speed-up")
        if self.segments < 0:
            raise PlanError(f"segments={self.segments} is out of range: choose 2 or more, or 0 (automatic)")
        if self.bands < 0:
            raise PlanError(f"bands={self.bands} is out of range: choose 1 or more, or 0 (automatic)")
        if self.branches < 0:
            raise PlanError(f"branches={self.branches} is out of range: choose 1 or more, or 0 (as many as are useful)")
        Plan(**self._knobs())

    def _branches(self, count: int, useful: int) -> int:
        """Number of branches on ``count`` devices, where there is work for ``useful`` branches."""
        if self.preset == CUSTOM and self.branches:
            return self.branches
        # with given segments or bands, or for the host's picture bit for bit, the batch stays whole
        given = self.cuts or (self.preset == CUSTOM and (self.segments or self.bands > 1)) or self.preset == "Exact"
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
            own = comfy.model_management.get_torch_device()
            names, left_out = accelerator.like_the_first(own.type)
            names.sort(key=lambda name: torch.device(name) == own)  # last: its segment rests while the sampler works there
            others = [f"{each.device} ({each.title}) is left out: {each.why}" for each in left_out]
            if len(names) < 2:
                seen = "ComfyUI sees only one GPU" if names else "ComfyUI uses no GPU that ranks could use"
                raise OneDeviceError(
                    f"{'; '.join([seen, *others])}. If there are more, start ComfyUI so that it sees them (on Windows: "
                    "--cuda-device all --disable-pinned-memory), or name them in AsyncDiff Options under devices"
                )
            for other in others:
                log.info("AsyncDiff: %s; name it in AsyncDiff Options under devices to use it all the same", other)
        if remote := next((name for name in names if name.startswith("ray://")), None):
            # a program may run anything for the address that it connects to, so no workflow or request may choose it
            raise DeviceError(
                f"{given}: for safety, no address is taken from a workflow or the settings: start ComfyUI with "
                f"RAY_ADDRESS={remote} in its environment, and name ray:auto here"
            )
        devices = resolve_devices(names)
        if len(devices) < 2:
            one = "finds only one device there" if any(map(on_cluster, names)) else "names only one device"
            raise OneDeviceError(f"{given} {one}: name two or more, or 'auto'")
        return devices


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\s,;]+", text.strip()) if word]


def _plain(name: str, kind: str, value: Any) -> Any:
    """Return ``value`` of the widget ``name`` as its plain type ``kind``."""
    take, cure = _KINDS[kind]
    taken, cure = take(value), _CURES.get(name, cure)
    if taken is None or taken not in CHOICES.get(name, (taken,)):
        raise (DeviceError if name == "devices" else PlanError)(f"{name}={shown(value)}: {cure}")
    return taken


def _is_bool(value: Any) -> bool:
    """Whether this is a bool of Python or NumPy."""
    return isinstance(value, bool | np.bool_)


# type of a field -> a function that returns a value as that type, or None; and what to do instead
_KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "str": (lambda value: value if isinstance(value, str) else None, "choose a text"),
    "int": (lambda value: None if _is_bool(value) else whole(value), "choose a whole number"),
    "bool": (lambda value: bool(value) if _is_bool(value) else None, "choose True or False"),
    "float": (lambda value: None if _is_bool(value) else number(value), "choose a number"),
}
_CURES = {
    "devices": "name the devices to use, such as cuda:0, cuda:1, or choose auto",
    "cuts": "name the blocks where segments begin, separated by commas, or leave it empty",
    **{name: f"choose one of {', '.join(choices)}" for name, choices in CHOICES.items()},
}
