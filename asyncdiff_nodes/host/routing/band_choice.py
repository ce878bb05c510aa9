"""Whether the calls of one run are all computed in bands, or work ahead between the first ones and the last."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from asyncdiff_nodes.engine import Plan, WorkerGroup
from asyncdiff_nodes.host.choices import ALWAYS, STALE_COSTS
from asyncdiff_nodes.host.workers.band_times import BandTimes

from .announced import Announced
from .options import OneDeviceError

_LEAST_WARMUP = 2  # calls, which tell what to expect next; see engine/planning/lookahead.py

# runs of each of the host's models that no ranks make faster, and why
_for_one_device: weakref.WeakKeyDictionary[Any, dict[Hashable, str]] = weakref.WeakKeyDictionary()


class BandChoice:
    """The choice of one sampling, by what calls in bands took before, or take in its first calls.

    Args:
        preset: those of :data:`~asyncdiff_nodes.host.choices.STALE_COSTS` choose; with others the plan is as the user wants it.
        times: what calls in bands took.
        model: the host's.
        run: what this run and others have in common that take as long: sampler and schedule.

    Attributes:
        why: what was chosen, and why, in words; empty where there was no choice.

    Raises:
        OneDeviceError: it is known that no ranks make this run faster.
    """

    def __init__(self, preset: str, times: BandTimes, model: Any, run: Hashable) -> None:
        self.why = ""
        self._stale_costs, self._times = STALE_COSTS.get(preset), times
        self._useless, self._run = _for_one_device.setdefault(model, {}), (preset, times.key, run)
        self._trying = False  # nothing is known of calls in bands
        self._ahead: Plan
        if self._run in self._useless:
            raise OneDeviceError(self._useless[self._run])

    def plan(self, announced: Announced, group: WorkerGroup) -> Plan:
        """Return the announced plan, which works ahead, or the same with all calls in bands.

        Raises:
            OneDeviceError: neither is faster than one device; each has room for the whole network, or there were no bands.
        """
        self._ahead = plan = announced.plan
        self.why, self._trying = "", False
        if self._stale_costs is None or plan.segments == 1:
            return plan
        if plan.bands == 1:
            self.why = group.bandless and f"working ahead, because {group.bandless}"
            return plan
        stale_costs = self._stale_costs[announced.noisy]
        choice = self._times.choice(group.placement, plan, len(announced), announced.levels, stale_costs)
        self._trying = choice is None
        self.why = "in bands, to see how long that takes" if choice is None else str(choice)
        if choice is not None and not choice.pays:
            self._useless[self._run] = f"with these {len(announced)} calls nothing is faster than one device ({choice})"
            raise OneDeviceError(self._useless[self._run])
        if choice is not None and not choice.in_bands:
            return plan if choice.begins_in_bands else replace(plan, bands=1)
        return replace(plan, warmup=ALWAYS, cooldown=0, stride=1, forecast=0, time_shift=False)

    def instead(self, done: int) -> Plan | None:
        """Return another plan for the calls after the first ``done`` ones, if these show, once, that bands lose."""
        if not self._trying or not self._times.lose:
            return None
        self._trying = False
        self.why = "working ahead after the first calls, since in bands they took longer than one device would take"
        warmup = max(_LEAST_WARMUP, self._ahead.warmup - done)
        return replace(self._ahead, warmup=warmup + (1 - warmup) % self._ahead.stride, bands=1)  # see Plan.stride
