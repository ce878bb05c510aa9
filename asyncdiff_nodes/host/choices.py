"""The presets, choices and defaults of everything that the user can set.

This module imports nothing of the pack, because the nodes' schemas read it when the host starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ALWAYS = 1_000_000  # a warm-up longer than any run: every step is synchronous


@dataclass(frozen=True)
class Preset:
    """What a preset stands for; see :class:`~asyncdiff_nodes.engine.Plan`."""

    warmup: int
    cooldown: int = 1
    stride: int = 1
    fresh_skips: bool = True


PRESETS = {
    "Exact": Preset(warmup=ALWAYS),
    "Balanced": Preset(warmup=3),
    "Fast": Preset(warmup=2, fresh_skips=False),
    "Turbo": Preset(warmup=3, stride=2),
}
# how many times longer than working ahead a run in bands may take, and is chosen still, as nothing is stale in it; and the same
# with a sampler that adds noise, which working ahead cannot foresee
STALE_COSTS = {"Balanced": (1.1, 1.25), "Fast": (1.0, 1.0), "Turbo": (1.0, 1.0)}
CUSTOM = "Custom"  # every option as the user sets it

# the values of each option that is a choice
CHOICES: dict[str, tuple[str, ...]] = {
    "preset": (*PRESETS, CUSTOM),
    "control_nets": ("shared", "fresh"),
    "on_failure": ("restart", "finish"),
    "compression": ("none", "half", "int8"),
    "verify": ("auto", "off", "first", "always"),
}


@dataclass(frozen=True)
class OptionValues:
    """The widgets of the *AsyncDiff Options* node.

    Attributes:
        preset: ``Exact`` (every step synchronous), ``Balanced``, ``Fast``, ``Turbo``, or ``Custom``, which uses the fields from
            ``segments`` to ``branches``.
        devices: ``auto`` for those of the settings (by default every GPU like the first), a list such as ``cuda:0, cuda:2``, or
            ``ray:auto`` for all GPUs of this machine's Ray cluster; see :mod:`asyncdiff_nodes.cluster`.
        cuts: block names where the segments begin, separated by commas; empty for automatic ones.
        segments: number of segments, 0 for as many as the devices allow.
        stride, warmup, time_shift, forecast, cooldown: see :class:`~asyncdiff_nodes.engine.Plan`.
        speedup: the target for the whole run. The warm-up is then as long as that allows, whatever ``warmup`` says. 0: none.
        branches: see :class:`~asyncdiff_nodes.engine.Plan`; 0 for as many as are useful.
        bands: see :class:`~asyncdiff_nodes.engine.Plan`. 0: as the preset chooses; none with ``Custom``. 1: none, so that each
            device holds its part of the network only. More: with ``Custom``.
        control_nets: ``shared``: the ranks compute ControlNets together with the network, so their values may be stale too;
            ``fresh``: the host computes them before each call.
        on_failure: what happens when a rank dies or hangs. ``restart``: new ranks take over at the current step, once per
            sampling. After that, and with ``finish``: the host continues by itself.
        compression: see :class:`~asyncdiff_nodes.engine.Plan`.
        verify: which calls the host computes as well, to compare; see :class:`~.routing.verify.Audit`. ``auto`` for the
            choice in the settings.
    """

    preset: str = "Balanced"
    devices: str = "auto"
    cuts: str = ""
    segments: int = 0
    stride: int = 1
    warmup: int = PRESETS["Balanced"].warmup
    time_shift: bool = False
    forecast: bool = True
    cooldown: int = PRESETS["Balanced"].cooldown
    speedup: float = 0.0
    branches: int = 0
    control_nets: str = "shared"
    on_failure: str = "restart"
    compression: str = "none"
    verify: str = "auto"
    bands: int = 0


# defaults of ComfyUI's settings under AsyncDiff; a test compares them with js/settings.js
FOUND = "blocks found automatically"  # of networks that no table lists

SETTINGS: dict[str, Any] = {
    "Preset": OptionValues.preset,
    "Devices": OptionValues.devices,
    "KeepMinutes": 0,
    "Links": "auto",
    "Unlisted": FOUND,
    "Verify": OptionValues.verify,
}
SETTING_CHOICES = {
    "Preset": tuple(PRESETS),
    "Verify": CHOICES["verify"],
    "Links": ("auto", "host memory"),
    "Unlisted": (FOUND, "ComfyUI samples"),
}
