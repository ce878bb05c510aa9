"""One network in one dtype: what the ranks make of it, beside the first device alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from asyncdiff_nodes.engine import Plan, RankOptions, Simulator, WorkerGroup, accelerator

from .finding import SEND, Finding
from .networks import Subject

BALANCED = Plan(warmup=3, cooldown=1)
_STEPS = 10
_ROUNDING = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}  # of the results' spread
_SLOW = 1.2  # times faster: less is not worth a second device


class Comparison:
    """A network on ranks and on the first device.

    Args:
        scale: of the network's widths.
        devices: one per rank.
        options: for the ranks.
    """

    def __init__(self, subject: Subject, dtype: torch.dtype, scale: float, devices: Sequence[str], options: RankOptions) -> None:
        self._subject, self._dtype, self._scale = subject, dtype, scale
        self._devices, self._options = tuple(devices), options
        self._plan = replace(BALANCED, segments=len(devices))
        self._device = torch.device(devices[0])
        self._network = subject.network(scale, dtype, self._device)
        self._sample, self._context = subject.inputs(scale, dtype, self._device)
        self.title = f"{subject.name}, {str(dtype).removeprefix('torch.')}"
        self.timesteps = [float(900 - 90 * step) for step in range(_STEPS)]

    def group(self) -> WorkerGroup:
        """Start the ranks."""
        family = self._subject.family(self._scale, self._dtype)
        return WorkerGroup(self._network, self._plan, self._devices, family=family, ranks=self._options)

    def call(self, model: Any, step: int, sample: torch.Tensor | None = None) -> torch.Tensor:
        """Have the network, or what stands in for it, predict."""
        timestep = torch.full((1,), self.timesteps[step], device=self._device)
        result: torch.Tensor = model(self._sample if sample is None else sample, timestep, self._context)
        return result

    def denoise(self, model: Any) -> list[torch.Tensor]:
        """Make a run in which each call follows from the one before; returns what was predicted."""
        sample, predicted = self._sample, []
        for step in range(_STEPS):
            predicted.append(self.call(model, step, sample))
            sample = sample - predicted[-1] / _STEPS
        return predicted

    @torch.inference_mode()
    def exactness(self, group: WorkerGroup) -> Finding:
        """Compare a synchronous run with the network's own."""
        group.begin(self.timesteps, replace(self._plan, warmup=_STEPS))
        ranks, own = self.denoise(group), self.denoise(self._network)
        same = all(map(torch.equal, ranks, own))
        alike = len({accelerator.title(device) for device in self._devices}) == 1
        apart = _apart(ranks, own)
        if same or (not alike and apart < _ROUNDING[self._dtype]):
            return Finding("exact", self.title, "bit for bit" if same else "up to rounding: the devices differ", "good")
        return Finding("exact", self.title, f"{apart:.1e} of the spread apart", "wrong", SEND)

    @torch.inference_mode()
    def asynchrony(self, group: WorkerGroup) -> Finding:
        """Compare an asynchronous run with what it is by definition, computed by one process."""
        group.begin(self.timesteps)
        ranks = self.denoise(group)
        plan = replace(self._plan, cuts=group.placement.cuts)
        with Simulator(self._network, plan, family=self._subject.family(self._scale, self._dtype)) as simulator:
            simulator.begin(self.timesteps)
            apart = _apart(ranks, self.denoise(simulator))
        good = apart < _ROUNDING[self._dtype]
        value = f"{apart:.1e} of the spread from its definition" if apart else "bit for bit as defined"
        return Finding("asynchronous", self.title, value, "good" if good else "wrong", "" if good else SEND)

    @torch.inference_mode()
    def speed(self, group: WorkerGroup) -> Finding:
        """Time asynchronous calls beside the first device's own."""
        one = statistics.median(self._seconds(self._network)[1:])
        group.begin(self.timesteps)
        together = statistics.median(self._seconds(group)[self._plan.warmup + 1 : -self._plan.cooldown])
        gain, best = one / together, 1 / max(group.placement.shares)
        value = f"{gain:.2f}x ({one * 1e3:.1f} ms on one device, {together * 1e3:.1f} ms together); {best:.2f}x at best"
        numbers = {"one": one, "together": together, "best": best}
        if gain >= _SLOW:
            return Finding("speed", self.title, value, "good", numbers=numbers)
        cure = "look at the links above; networks of true depth gain more, since their calls are longer"
        return Finding("speed", self.title, value, "slow", cure, numbers)

    def _seconds(self, model: Any) -> list[float]:
        seconds = []
        for step in range(_STEPS):
            begin = time.perf_counter()
            self.call(model, step)
            accelerator.synchronize(self._device)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def memory(self, group: WorkerGroup, before: Mapping[str, int]) -> Iterator[Finding]:
        """Compare planned weights with those that ranks have; and say what each device has less of than ``before``."""
        reports = group.stats().ranks
        for device, free in before.items():
            ranks = [report for report in reports if report.device == device]
            planned = sum(group.placement.weight_bytes(report.segment) for report in ranks)
            held, taken = sum(report.weight_bytes for report in ranks), free - accelerator.memory(device)[0]
            value = f"{planned >> 20} MiB of weights planned, {held >> 20} MiB held, {taken >> 20} MiB taken in all"
            good, numbers = planned == held, {"planned": planned, "held": held, "taken": taken}
            cure = "" if good else SEND
            yield Finding("memory", f"{self.title}, {device}", value, "good" if good else "wrong", cure, numbers)


def free_memory(devices: Sequence[str]) -> dict[str, int]:
    """Bytes that are free on each accelerator."""
    return {name: accelerator.memory(name)[0] for name in dict.fromkeys(devices) if torch.device(name).type != "cpu"}


def _apart(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference, as a share of the expected values' spread."""
    apart = [(a.float() - b.float()).abs().max() / b.float().std() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(apart).max())  # NaN if one of them is
