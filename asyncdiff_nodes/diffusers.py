"""A diffusers pipeline whose denoiser runs on a worker group; everything else of the pipeline stays as it is.

>>> pipe = StableDiffusionPipeline.from_pretrained(...)
>>> with accelerate(pipe, Plan(segments=2), devices=["cuda:0", "cuda:1"]):
...     image = pipe("a red heart").images[0]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import nn

from asyncdiff_nodes.engine.inputs import Inputs
from asyncdiff_nodes.engine.tensors import tensors_of

from .engine import BlockTimes, NoiseLevels, Plan, RunStats, ScheduleError, WorkerGroup, better, pause

_DPMPP_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2}
SCHEDULERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, _DPMPP_2M),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, _DPMPP_2M | {"use_karras_sigmas": True}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),  # two calls per step
}
#: DDIM-only keys that the other schedulers do not know.
_DDIM_KEYS = ("_class_name", "clip_sample", "set_alpha_to_one")


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Make a new diffusers scheduler, one of ``SCHEDULERS``, for a model with this scheduler configuration.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler: {name!r} is unknown; choose one of {', '.join(SCHEDULERS)}")
    kind, extra = SCHEDULERS[name]
    if kind is not DDIMScheduler:
        config = {key: value for key, value in config.items() if key not in _DDIM_KEYS}
    return kind.from_config(config, **extra)


def denoiser_of(pipe: Any) -> str:
    """Name the pipeline's component that denoises: ``unet`` or ``transformer``.

    Raises:
        TypeError: it has neither.
    """
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise TypeError(f"{type(pipe).__name__} has no unet or transformer to route: pass a pipeline such as StableDiffusionPipeline")


class RoutedDenoiser(nn.Module):
    """Stands in for ``pipe.unet`` or ``pipe.transformer``: same configuration and signature, computed by the group.

    A pipeline run begins when its scheduler has a new ``timesteps`` tensor, which every ``set_timesteps`` makes. Prompts that it
    evaluates one after the other are streams of their own, by the names that it gives them for its caches.
    """

    def __init__(self, pipe: Any, group: WorkerGroup) -> None:
        super().__init__()
        # in __dict__, so that they are no submodules: moving or saving the pipeline must not touch the original through us
        self.__dict__["original"] = getattr(pipe, denoiser_of(pipe))
        self.__dict__["_pipe"] = pipe
        self.group = group
        self._timesteps: torch.Tensor | None = None
        self._stream: str | None = None

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Give the calls for one prompt, such as ``cond``, a stream of their own; pipelines say so to models that cache."""
        self._stream = name
        try:
            yield
        finally:
            self._stream = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)  # config, dtype, device, add_embedding, ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute one call of the denoiser; see the original's ``forward``."""
        self.group.place(args, kwargs)  # only then its family is known
        timesteps = self._pipe.scheduler.timesteps
        if timesteps is not self._timesteps:
            given = Inputs.take(args, kwargs, self.group.family.timestep).timestep_number()
            self.group.begin(_in_units_of(given, timesteps), levels=noise_levels(self._pipe.scheduler))
            self._timesteps = timesteps
        try:
            return self.group(*args, stream=self._stream, **kwargs)
        except ScheduleError:
            if self.group.plan.stride > 1:
                raise
            self.group.begin(plan=replace(self.group.plan, forecast=0))  # a pipeline with calls of its own
            return self.group(*args, stream=self._stream, **kwargs)

    def stats(self) -> RunStats:
        """Telemetry of the last run."""
        return self.group.stats()

    def rebalance(self, room: Sequence[float] | None = None) -> bool:
        """Have blocks change their ranks if the last run's block times say that this pays; returns whether they did.

        For unequal devices, and slow links between machines. An asynchronous picture depends on the cuts, so the next one of the
        same seed may differ a little: call it before the pictures that count.

        Args:
            room: bytes of weights that each device can hold.

        Raises:
            WorkerError, DeadlineError: the move failed; the group is closed.
        """
        group, records = self.group, self.stats().records
        ranks = [f"{device} {rank}" for rank, device in enumerate(group.devices)]
        alike = [record for record in records if record.stream == records[0].stream]  # others may be of another shape
        times = BlockTimes.of(alike, ranks, pause(alike, group.plan))
        known = times.estimate(group.placement.graph, ranks, group.devices)
        placement = known and better(group.placement, *known, times.pause, room, group.bandwidth)
        if placement is None:
            return False
        group.move(placement, lambda names: ((name, tensor) for name, tensor in tensors_of(self.original) if name in names))
        return True


def is_flow(scheduler: Any) -> bool:
    """Whether a diffusers scheduler is one for models that were trained for flow matching."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or bool(scheduler.config.get("use_flow_sigmas"))


def noise_levels(scheduler: Any) -> NoiseLevels | None:
    """Read the noise of every call off a diffusers scheduler whose timesteps are set; None if it does not say."""
    if is_flow(scheduler):
        # clean + sigma * (noise - clean): straight in sigma as it is
        *sigmas, rest = scheduler.sigmas.tolist()
        return NoiseLevels(tuple(sigmas), (1.0,) * len(sigmas), rest)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return None
    # fractional timesteps lie between two of training; an alpha of 0 (zero terminal SNR) would be infinite noise
    timesteps = scheduler.timesteps.cpu().double().numpy()
    by_call = np.interp(timesteps, np.arange(len(alphas)), alphas.cpu().double().numpy())
    return NoiseLevels.variance_preserving(by_call.clip(1e-6).tolist())


def _in_units_of(given: float, timesteps: torch.Tensor) -> torch.Tensor:
    """Scale a schedule as the pipeline passes it on: some models take thousandths."""
    return min(timesteps, timesteps / 1000, key=lambda scaled: float((scaled - given).abs().min()))


@contextmanager
def accelerate(
    pipe: Any, plan: Plan | None = None, devices: Sequence[str] = ("cpu", "cpu"), **options: Any
) -> Iterator[RoutedDenoiser]:
    """Route ``pipe.unet`` or ``pipe.transformer`` to a worker group within the ``with`` block.

    Args:
        pipe: a diffusers pipeline with a denoiser that can be split and a ``scheduler``.
        plan, devices, options: as for :class:`~asyncdiff_nodes.engine.WorkerGroup`.

    Raises:
        TypeError: the pipeline has neither.
        AsyncDiffError: see :class:`~asyncdiff_nodes.engine.WorkerGroup`.
    """
    name = denoiser_of(pipe)
    with WorkerGroup(getattr(pipe, name), plan, devices, **options) as group:
        routed = RoutedDenoiser(pipe, group)
        setattr(pipe, name, routed)
        try:
            yield routed
        finally:
            setattr(pipe, name, routed.original)
