"""The calls of the network that a sampling will make, and its plan counted in calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_base import BaseModel

from asyncdiff_nodes.engine import NoiseLevels, Placement, Plan, PlanError
from asyncdiff_nodes.engine.trees import flatten
from asyncdiff_nodes.host.choices import ALWAYS, CUSTOM

from .options import Options
from .rehearsal import rehearse


class Announced:
    """The calls of one sampling.

    Args:
        sampler, sigmas: the host's SAMPLER, and its schedule [steps + 1].
        plan: a plan with the warm-up in steps.
        placement: the ranks' placement.
        evaluation: the sampling's first one.
        note: called with a text for the user.

    Attributes:
        sigmas: the noise of each call of a stream, [calls].
        noisy: the sampler adds noise between calls, which working ahead cannot foresee.
        levels: the sigmas in the engine's form; None if it makes no sense there. The sampler decides whether that is an error.
        timesteps: the timestep of each call, as the network gets it.
        plan: the plan with warm-up and cool-down in calls.
        asynchronous: how many calls of a stream lie between warm-up and cool-down.
    """

    def __init__(
        self,
        options: Options,
        patcher: Any,
        sampler: Any,
        sigmas: torch.Tensor,
        plan: Plan,
        placement: Placement,
        evaluation: Evaluation | None,
        note: Callable[[str], None],
    ) -> None:
        sampling, steps = patcher.get_model_object("model_sampling"), len(sigmas) - 1
        self.sigmas, self.noisy = rehearse(sampler, sigmas, patcher)
        calls = len(self.sigmas)
        self.levels = _levels(sampling, self.sigmas, rest=float(sigmas[-1]))
        self.timesteps = sampling.timestep(self.sigmas)
        if evaluation is not None:
            self.timesteps = evaluation.as_network_sees(self.timesteps)
        plan = _in_calls(plan, calls / steps)
        wanted = options.preset == CUSTOM and options.speedup
        if wanted:
            try:
                plan = placement.within(options.speedup, plan, calls, self.levels)
            except PlanError as error:
                note(str(error))
                plan = replace(plan, warmup=1)
        here = plan.at(self.levels)
        if plan.segments > 1 and plan.bands == 1 and not wanted and calls <= here.warmup + here.cooldown < ALWAYS:
            note(
                f"all of these {steps} steps are synchronous, so none is much faster: the warm-up of {here.warmup} and the "
                f"cool-down of {here.cooldown} leave no step between them. Take more steps, or a shorter warm-up (preset Fast or "
                "Custom)"
            )
        self.plan, self._cooldown = plan, here.cooldown
        self.asynchronous = calls - here.warmup - here.cooldown

    def __len__(self) -> int:
        """Number of calls of each stream."""
        return len(self.sigmas)

    def left(self, posted: int) -> int:
        """Number of calls that may still be asynchronous after ``posted`` calls."""
        return len(self.sigmas) - self._cooldown - posted


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the host's model, whose network may see its timestep otherwise than the sampler.

    Attributes:
        rest: further arguments of ``apply_model``.
    """

    model: Any
    x: torch.Tensor
    rest: dict[str, Any]

    @classmethod
    def of(cls, model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Evaluation:
        """Describe an evaluation by the arguments of ``apply_model``."""
        named = {"c_concat", "c_crossattn", "control", "transformer_options", "x", "t"}
        return cls(model, args[0] if args else kwargs["x"], {name: value for name, value in kwargs.items() if name not in named})

    def as_network_sees(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Timesteps [calls] as numbers that the network gets: of several the largest, as other tokens may be at rest."""
        if type(self.model).process_timestep is BaseModel.process_timestep:
            return timesteps
        seen = [
            flatten(self.model.process_timestep(step.float().expand(len(self.x)), x=self.x, **self.rest))[0]
            for step in timesteps.to(self.x.device)
        ]
        return torch.tensor([max(float(leaf.max()) for leaf in leaves) for leaves in seen])


def _levels(sampling: Any, sigmas: torch.Tensor, rest: float) -> NoiseLevels | None:
    scales = sampling.calculate_input(sigmas, torch.ones_like(sigmas))
    try:
        return NoiseLevels(tuple(sigmas.tolist()), tuple(scales.tolist()), rest)
    except ValueError:
        return None


def _in_calls(plan: Plan, calls_per_step: float) -> Plan:
    """Convert the warm-up of ``plan`` from steps to calls, for a sampler with so many calls per step."""
    if calls_per_step == 1:
        return plan
    warmup = math.ceil(plan.warmup * calls_per_step)
    return replace(plan, warmup=warmup + (1 - warmup) % plan.stride)  # see Plan: one more than a multiple of the stride
