"""What calls in bands took, kept on disk, and the choice between them and working ahead.

The same choice is made again for the same model, size, devices and steps, so that the same seed gives the same picture: what is
kept is replaced only where the machine has become another one.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from comfy.model_patcher import ModelPatcher

from asyncdiff_nodes.engine import NoiseLevels, Placement, Plan, accelerator
from asyncdiff_nodes.engine.devices import on_cluster
from asyncdiff_nodes.engine.telemetry import CallRecord

from . import user_files
from .skeleton import fingerprint_of

FILE, _KEPT = "band_times", 200
_ENOUGH = 2  # calls of a stream that are measured, without the first, in which kernels are loaded
_OTHER = 2.0  # how many times more, or less, bands take of one device's time if the machine is another one


@dataclass(frozen=True)
class Choice:
    """How long a run would take, in seconds.

    Attributes:
        bands: with all calls in bands.
        ahead: with segments that work ahead between the first calls and the last.
        alone: on one device, if it were as fast as each of these.
        in_bands: all calls are to be in bands.
        begins_in_bands: otherwise the synchronous ones are, rather than one segment after the other.
    """

    bands: float
    ahead: float
    alone: float
    in_bands: bool
    begins_in_bands: bool

    @property
    def pays(self) -> bool:
        """Whether either is faster than one device."""
        return min(self.bands, self.ahead) < self.alone

    def __str__(self) -> str:
        """Say what was chosen, and what the other would take."""
        chosen, other = ("in bands", "working ahead") if self.in_bands else ("working ahead", "in bands")
        seconds = (self.bands, self.ahead) if self.in_bands else (self.ahead, self.bands)
        return (
            f"{chosen}, about {seconds[0]:.2f} s; {other} {seconds[1]:.2f} s, one device {self.alone:.2f} s, "
            "by what calls in bands took"
        )


class BandTimes:
    """The speed of one sampling's model in bands on its devices.

    Args:
        shape: [B, C, h, w], the shape of the latent.
        devices: one per rank of ``plan``.

    Attributes:
        key: of what is known, in the file.
    """

    def __init__(self, patcher: ModelPatcher, plan: Plan, shape: Sequence[int], devices: Sequence[str]) -> None:
        names = [device if on_cluster(device) else f"{accelerator.title(device)} {device}" for device in devices]
        facts = (fingerprint_of(patcher), tuple(shape), plan.branches, plan.bands, str(patcher.model_dtype()), names)
        self.key = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
        self._ranks = plan.world_size
        kept = user_files.load(FILE).get(self.key)
        self._known: tuple[float, float] | None = tuple(kept) if kept else None
        self._calls: defaultdict[tuple[str, int], list[CallRecord]] = defaultdict(list)
        self._first: dict[str, int] = {}

    def add(self, record: CallRecord) -> None:
        """Add the record of a call that a rank has finished."""
        if record.banded:
            self._first.setdefault(record.stream, record.call)
            self._calls[record.stream, record.call].append(record)

    def choice(
        self, placement: Placement, plan: Plan, calls: int, levels: NoiseLevels | None, stale_costs: float
    ) -> Choice | None:
        """Choose how to compute ``calls`` calls; None where nothing is known.

        Args:
            plan: of a run that works ahead.
            stale_costs: how many times longer bands may take and are chosen still, since nothing is stale in them.
        """
        if self._known is None:
            return None
        step, work = self._known
        fitted = plan.at(levels)
        synchronous = min(fitted.warmup + fitted.cooldown, calls)
        rest = placement.cost(calls, levels, plan) - synchronous / plan.bands / plan.branches
        bands, ahead = calls * step, synchronous * step + rest * work
        by_segments = placement.cost(calls, levels, replace(plan, bands=1)) * work
        least, alone = min(ahead, by_segments), calls * work
        return Choice(bands, least, alone, bands <= stale_costs * least and bands < alone, ahead <= by_segments)

    @property
    def lose(self) -> bool:
        """Whether calls in bands were seen to take longer than one device would."""
        return len(self._steps()) >= _ENOUGH and self._medians()[0] > self._medians()[1]

    def finish(self) -> None:
        """Save what this sampling has measured, if it is news. Never raises."""
        if len(self._steps()) < _ENOUGH:
            return
        step, work = self._medians()
        if self._known is None or not 1 / _OTHER < step / work / (self._known[0] / self._known[1]) < _OTHER:
            self._known = step, work
            user_files.save(FILE, user_files.load(FILE) | {self.key: [step, work]}, _KEPT)

    def _steps(self) -> list[list[CallRecord]]:
        """The records of each call that all ranks have finished, without the first one of each stream."""
        return [
            records
            for (stream, call), records in self._calls.items()
            if len(records) == self._ranks and call > self._first[stream]
        ]

    def _medians(self) -> tuple[float, float]:
        """Seconds of a call, and of computing in it on all ranks together."""
        steps = self._steps()
        spans = [max(record.end for record in step) - min(record.start for record in step) for step in steps]
        return statistics.median(spans), statistics.median(sum(record.compute for record in step) for step in steps)
