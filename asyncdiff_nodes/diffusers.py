"""A diffusers pipeline whose denoiser runs on a worker group; everything else of the pipeline stays as it is.

>>> pipe = StableDiffusionPipeline.from_pretrained(...)
>>> with accelerate(pipe, Plan(segments=2), devices=["cuda:0", "cuda:1"]):
...     image = pipe("a red heart").images[0]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from asyncdiff_nodes.engine import NoiseLevels, Plan, RunStats, ScheduleError, WorkerGroup


class RoutedUNet(nn.Module):
    """Stands in for ``pipe.unet``: same configuration and signature, computed by the group.

    A pipeline run begins when its scheduler has a new ``timesteps`` tensor, which every ``set_timesteps`` makes.
    """

    def __init__(self, pipe: Any, group: WorkerGroup) -> None:
        super().__init__()
        # in __dict__, so that they are no submodules: moving or saving the pipeline must not touch the original through us
        self.__dict__["original"] = pipe.unet
        self.__dict__["_pipe"] = pipe
        self.group = group
        self._timesteps: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)  # config, dtype, device, add_embedding, ...

    def forward(self, sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the denoiser; see ``UNet2DConditionModel.forward``."""
        timesteps = self._pipe.scheduler.timesteps
        if timesteps is not self._timesteps:
            self.group.begin(timesteps, levels=noise_levels(self._pipe.scheduler))
            self._timesteps = timesteps
        try:
            return self.group(sample, timestep, *args, **kwargs)
        except ScheduleError:
            if self.group.plan.stride > 1:
                raise
            self.group.begin(plan=replace(self.group.plan, forecast=0))  # a pipeline with calls of its own
            return self.group(sample, timestep, *args, **kwargs)

    def stats(self) -> RunStats:
        """Telemetry of the last run."""
        return self.group.stats()


def noise_levels(scheduler: Any) -> NoiseLevels | None:
    """Of the calls of a diffusers scheduler whose timesteps are set; None if it does not say."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return None
    # fractional timesteps lie between two of training; an alpha of 0 (zero terminal SNR) would be infinite noise
    found = np.interp(scheduler.timesteps.cpu().double().numpy(), np.arange(len(alphas)), alphas.cpu().double().numpy())
    return NoiseLevels.variance_preserving(found.clip(1e-6).tolist())


@contextmanager
def accelerate(
    pipe: Any, plan: Plan | None = None, devices: Sequence[str] = ("cpu", "cpu"), **options: Any
) -> Iterator[RoutedUNet]:
    """Route ``pipe.unet`` to a worker group within the ``with`` block.

    Args:
        pipe: a diffusers pipeline with a ``unet`` and a ``scheduler``.
        plan, devices, options: as for :class:`~asyncdiff_nodes.engine.WorkerGroup`.

    Raises:
        TypeError: the pipeline has no UNet.
        AsyncDiffError: see :class:`~asyncdiff_nodes.engine.WorkerGroup`.
    """
    if not isinstance(getattr(pipe, "unet", None), nn.Module):
        raise TypeError(f"{type(pipe).__name__} has no unet to route: pass a UNet pipeline such as StableDiffusionPipeline")
    with WorkerGroup(pipe.unet, plan, devices, **options) as group:
        routed = RoutedUNet(pipe, group)
        pipe.unet = routed
        try:
            yield routed
        finally:
            pipe.unet = routed.original
