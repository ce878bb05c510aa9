"""What ``asyncdiff bench`` measures: subjects, and those of ``--suite``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from asyncdiff_nodes.engine import DeviceError, Plan, family_of
from asyncdiff_nodes.engine.planning.run_times import Costs

from .baseline import Baseline
from .example_calls import example_call
from .machine import cores
from .measure import Bench, Setting
from .zoo import Model, find_model


@dataclass(frozen=True)
class Subject:
    """What is to be known of a model at one size.

    Attributes:
        plans: the speed of whose asynchronous steps is asked for.
        runs: the time of whose whole runs is.
        steps: denoising steps per plan or run.
        threads: of the unrouted model, if not the setting's: where nothing is measured beside it, it may have the whole machine.
        repeats: calls that block times are the median of.
    """

    model: str
    size: int
    plans: tuple[Plan, ...] = ()
    runs: tuple[Plan, ...] = ()
    steps: int = 10
    threads: int | None = None
    repeats: int = 3


@dataclass
class Results:
    """Rows of subjects, as they are measured, and the profiles that projections rest on."""

    setting: Setting
    rows: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)

    def add(self, subject: Subject) -> None:
        """Measure ``subject``.

        Raises:
            DeviceError: there is not enough memory for it.
        """
        setting, model = self.setting, find_model(subject.model)
        measured = any(setting.has_devices_for(plan) for plan in (*subject.plans, *subject.runs)) and not subject.threads
        copies_on = (setting.devices * 2)[: 2 if measured else 1]
        held = max(plan.branches for plan in (*subject.plans, *subject.runs)) if measured else 0
        _check_memory(model, setting.dtype, copies_on, held)
        inputs = _inputs(model, model.latent_size(subject.size), setting.batch, setting.dtype)
        parts = family_of(model.skeleton(setting.dtype), *inputs).parts
        branches = {1} | {plan.branches for plan in (*subject.plans, *subject.runs)}
        by_branches = {n: parts(*inputs, n)[0] for n in sorted(branches)}
        threads = subject.threads or setting.threads
        with ExitStack() as stack:
            copies = [
                stack.enter_context(closing(Baseline(model, setting.dtype, device, threads, by_branches, subject.repeats)))
                for device in copies_on
            ]
            # all measure their blocks at once, as the ranks will run at once
            profiles, *_ = [copy.profile() for copy in copies]
            facts = {"model": model.name, "size": subject.size}
            costs = {}
            for n, (blocks, whole) in profiles.items():
                costs[n] = Costs(blocks, max(0.0, whole - sum(blocks)), setting.link, setting.round_trip)
                profile = {"branches": n, "threads": threads, "block_s": blocks, "unrouted_s": whole}
                self.profiles.append({**facts, **profile})
            bench = Bench(setting, model, inputs, copies, costs)
            for plan in subject.plans:
                real = measured and setting.has_devices_for(plan)
                row = bench.steps(plan, subject.steps) if real else bench.projected(plan)
                self.rows.append({**facts, "what": "step", **row})
            for plan in subject.runs:
                self.rows.append({**facts, "what": "run", **bench.run(plan, subject.steps)})


_FAST = {"fresh_skips": False}
_HALVES = Plan(1, branches=2)
_EVERY = (
    _HALVES,
    Plan(2),
    Plan(2, **_FAST),
    Plan(3, **_FAST),
    Plan(4, **_FAST),
    Plan(2, stride=2, **_FAST),
    Plan(3, stride=2, **_FAST),
    Plan(2, branches=2),
    Plan(2, branches=2, **_FAST),
)


def suite() -> tuple[Subject, ...]:
    """Real groups at sizes that a CPU manages, projections at the models' own."""
    # true sizes: nothing runs beside the one copy, whose device is the whole machine
    whole = {"threads": cores(), "repeats": 1}
    return (
        Subject("sd15", 256, plans=(Plan(2), Plan(2, **_FAST)), steps=13),
        Subject("sd21", 256, plans=(Plan(2, **_FAST),), steps=10),
        Subject("sd15", 128, runs=(Plan(2, warmup=2, **_FAST),), steps=30),
        Subject("sd15", 512, plans=(_HALVES,), steps=10),  # of smaller pictures half a batch costs more than half
        Subject("sd15", 512, plans=_EVERY, **whole),
        Subject("sd21", 768, plans=_EVERY, **whole),
        Subject("sdxl", 1024, plans=_EVERY, **whole),
    )


def _inputs(model: Model, size: int, batch: int, dtype: torch.dtype) -> Any:
    """``(args, kwargs)`` of one call on the CPU: noise in the layout of ``size`` latent pixels a side."""
    generator = torch.Generator().manual_seed(0)

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if not leaf.is_floating_point():
            return torch.zeros(leaf.shape, dtype=leaf.dtype)
        return torch.randn(leaf.shape, generator=generator).to(leaf.dtype)

    return torch.utils._pytree.tree_map(real, example_call(model.skeleton(dtype), size, batch))


def _check_memory(model: Model, dtype: torch.dtype, copies: Sequence[str], more: int) -> None:
    """Raise DeviceError if ``copies`` of the model, on these devices, and ``more`` in a group do not fit in."""
    weights = sum(p.numel() * dtype.itemsize for p in model.skeleton(dtype).parameters())
    # a little more: activations, and blocks that are in two segments
    needed = weights * (copies.count("cpu") + ("cpu" in copies) * more) * 1.15
    free = psutil.virtual_memory().available
    if needed > free:
        raise DeviceError(
            f"bench of {model.name} in {dtype} needs about {needed / 2**30:.0f} GiB of memory, "
            f"{free / 2**30:.0f} GiB are free: choose a smaller model or --dtype float16"
        )
