"""What is looked at: links, exactness, speed and memory of networks, and the lives of ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import torch

from asyncdiff_nodes.engine import AsyncDiffError, IdleWorkers, RankOptions, WorkerError, WorkerGroup

from .comparison import Comparison, free_memory
from .finding import SEND, Finding
from .link_trial import try_link
from .networks import SUBJECTS, Subject

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST = 4  # devices: the networks have no more parts worth having
_CPU_SCALE = 0.25
_PROMPT = 2.0  # seconds within which a cancel and a death must be noticed


class _Cancelled(Exception):
    """What a user's Cancel raises."""


class Checks:
    """All checks of some devices.

    Args:
        devices: one or more; a single one gets two ranks.
        prepare: as of :class:`~asyncdiff_nodes.engine.RankOptions`.
        scale: of the networks' widths; by default 1 on accelerators, a quarter on CPUs.
    """

    def __init__(self, devices: Sequence[str], prepare: Callable[[], None] | None = None, scale: float | None = None) -> None:
        self.devices = tuple(devices[:_MOST]) if len(devices) > 1 else (devices[0], devices[0])
        self._scale = scale or (_CPU_SCALE if torch.device(self.devices[0]).type == "cpu" else 1.0)
        self._prepare = prepare
        self._threads = max(1, torch.get_num_threads() // len(self.devices))
        self._idle = IdleWorkers()
        self._cancel = False

    def run(self) -> Iterator[Finding]:
        """Yield findings as they are made. A check that fails is a finding, and the next one follows."""
        checks = [self._links, *(self._network(subject, dtype) for subject in SUBJECTS for dtype in _DTYPES), self._lives]
        if len(set(self.devices)) > 1:
            checks.insert(-1, self._one_device)
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)  # a CPU is one device of several here, too: sums depend on the number of threads
        try:
            for check in checks:
                yield from self._caught(check)
        finally:
            torch.set_num_threads(before)
            self._idle.close()

    def _caught(self, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
        try:
            yield from check()
        except (AsyncDiffError, RuntimeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding(
                "failed", ", ".join(self.devices), first, "wrong", f"{SEND}; started with NCCL_DEBUG=WARN it may say more"
            )

    def _links(self) -> Iterator[Finding]:
        """Send values from each device to each other one, and back."""
        for pair in list(combinations(dict.fromkeys(self.devices), 2)) or [self.devices]:
            trial = try_link(pair, self._prepare)
            kind = "direct" if trial.direct else "through host memory"
            value = f"{kind}, {trial.bandwidth / 2**20:.0f} MiB/s, {trial.latency * 1e6:.0f} µs"
            numbers = {"bytes_per_second": trial.bandwidth, "latency": trial.latency}
            if trial.refusal:
                value, cure = f"{value}: a direct link did not work ({trial.refusal})", "docs/reliability.md, Links between GPUs"
                yield Finding("link", " and ".join(pair), value, "slow", cure, numbers)
            else:
                yield Finding("link", " and ".join(pair), value, "good", numbers=numbers)

    def _network(self, subject: Subject, dtype: torch.dtype) -> Callable[[], Iterator[Finding]]:
        """Compute a network on all devices, beside the first one alone."""

        def check() -> Iterator[Finding]:
            comparison = self._comparison(subject, dtype)
            before = free_memory(self.devices)
            with comparison.group() as group:
                yield comparison.exactness(group)
                yield comparison.asynchrony(group)
                yield comparison.speed(group)
                yield from comparison.memory(group, before)
                self._idle.absorb(group.release())

        return check

    def _one_device(self) -> Iterator[Finding]:
        """Put two ranks on the first device, beside this process, as ComfyUI's own card has them."""
        comparison = self._comparison(SUBJECTS[0], torch.float32, self.devices[:1] * 2)
        with comparison.group() as group:
            yield comparison.exactness(group)

    def _lives(self) -> Iterator[Finding]:
        """Start, cancel, kill and start again."""
        self._idle.close()
        begin, comparison = time.monotonic(), self._comparison(SUBJECTS[0], torch.float32)
        with comparison.group() as group:
            group.begin(comparison.timesteps)
            comparison.call(group, 0)
            yield _seconds("start", "new processes, to the first result", begin)
            yield self._cancelled(comparison, group)
            yield comparison.exactness(group)
            os.kill(group.pids[-1], getattr(signal, "SIGKILL", signal.SIGTERM))
            begin = time.monotonic()
            try:
                group.begin(comparison.timesteps)
                comparison.call(group, 0)
                yield Finding("death", "a rank was killed", "not noticed", "wrong", SEND)
            except WorkerError:
                yield _seconds("death", "a rank was killed: noticed", begin, _PROMPT)
        begin = time.monotonic()
        with comparison.group() as group:
            group.begin(comparison.timesteps)
            comparison.call(group, 0)
            yield _seconds("restart", "new processes, to the first result", begin)

    def _cancelled(self, comparison: Comparison, group: WorkerGroup) -> Finding:
        self._cancel, begin = True, time.monotonic()
        try:
            while time.monotonic() < begin + 2 * _PROMPT:  # a group looks now and then, and fast devices do many calls meanwhile
                group.begin(comparison.timesteps)
                comparison.denoise(group)
        except _Cancelled:
            return _seconds("cancel", "in a call: answered", begin, _PROMPT)
        finally:
            self._cancel = False
        return Finding("cancel", "in a call", "not answered", "wrong", SEND)

    def _poll(self) -> None:
        if self._cancel:
            raise _Cancelled

    def _comparison(self, subject: Subject, dtype: torch.dtype, devices: Sequence[str] | None = None) -> Comparison:
        devices = devices or self.devices
        options = RankOptions(
            threads_per_rank=self._threads, prepare=self._prepare, call_timeout=60, idle=self._idle, poll=self._poll
        )
        return Comparison(subject, dtype, self._scale, devices, options)


def _seconds(check: str, subject: str, begin: float, most: float = float("inf")) -> Finding:
    seconds = time.monotonic() - begin
    good = seconds <= most
    cure = "" if good else f"it should take less than {most:.0f} s; {SEND}"
    return Finding(check, subject, f"{seconds:.2f} s", "good" if good else "slow", cure, {"seconds": seconds})
