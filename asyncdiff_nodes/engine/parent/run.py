"""One denoising run of a group, as ``begin`` announces it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from asyncdiff_nodes.engine.errors import PlanError, ScheduleError
from asyncdiff_nodes.engine.planning.lookahead import NoiseLevels
from asyncdiff_nodes.engine.planning.plan import PER_RUN, Plan


@dataclass(frozen=True)
class Run:
    """One denoising run.

    Attributes:
        number: of the run, so that what an older one left behind is not mistaken for its own.
        timesteps: of every call of a stream; None if not known.
        levels: of the same calls.
        checked: ranks look in every call for the blocks that NaN or infinity come from.
    """

    number: int
    plan: Plan
    timesteps: tuple[float, ...] | None = None
    levels: NoiseLevels | None = None
    checked: bool = False

    @classmethod
    def begun(
        cls,
        number: int,
        own: Plan,
        plan: Plan,
        timesteps: Sequence[float] | torch.Tensor | None,
        levels: NoiseLevels | None,
    ) -> Run:
        """Make the run that a call of ``begin`` asks for; see :meth:`.WorkerGroup.begin`.

        Args:
            own: the group's plan.

        Raises:
            PlanError: the plan needs other ranks than the group has.
            ScheduleError: no timesteps, or levels of another number of calls.

        A schedule counts only where ranks need to know it, as not in a run that is all warm-up:

        >>> plan = Plan(segments=2, warmup=2)
        >>> Run.begun(1, plan, plan, [900, 600, 300], None).timesteps
        (900.0, 600.0, 300.0)
        >>> Run.begun(2, plan, replace(plan, warmup=3), [900, 600, 300], None).timesteps is None
        True
        """
        mine = {name: getattr(plan, name) for name in (*PER_RUN, "stride", "forecast")}
        bands = 1 if plan.bands == 1 and own.segments > 1 else own.bands
        placed = replace(own, **mine, bands=bands, cuts=plan.cuts and own.cuts)
        if placed != plan or plan.stride > own.stride or plan.forecast > own.forecast:
            raise PlanError(
                f"{plan} does not fit a group that was started with {own}: warm-up, cool-down, time shift and "
                "micro-batches may differ, stride and forecast may be lower, and segments may do without bands"
            )
        if isinstance(timesteps, torch.Tensor):
            timesteps = timesteps.detach().flatten().tolist()
        if timesteps is not None and not len(timesteps):
            raise ScheduleError("begin: timesteps is empty; give the timestep of every call, or None")
        if levels is not None and (timesteps is None or len(levels.sigmas) != len(timesteps)):
            raise ScheduleError("begin: levels must be given for the same calls as timesteps")
        ahead = plan.segments > 1 and (plan.forecast or plan.cooldown) and plan.warmup < len(timesteps or ())
        if plan.stride == 1 and not ahead:
            timesteps = levels = None  # each call brings all that it needs: the caller need not follow any schedule
        return cls(number, plan.at(levels), None if timesteps is None else tuple(map(float, timesteps)), levels)
