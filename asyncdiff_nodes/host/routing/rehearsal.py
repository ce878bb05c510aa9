"""Find the calls of the network that a sampler will make, and whether it adds noise, by running it with a stand-in for the model.

The host's schedule names the noise of every step. But many samplers call the network more than once per step: at a noise level
between two steps (dpm_2, dpmpp_sde), or twice at the same level (heun). Working ahead and stride need to know all calls.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

log = logging.getLogger(__name__)

_MOST = 8  # calls per step; a sampler that makes more probably never ends with this stand-in


class Rehearsal(NamedTuple):
    """What a sampler will do.

    Attributes:
        sigmas: of every call of the network, in order.
        noisy: between calls it adds noise that nobody can foresee.
    """

    sigmas: torch.Tensor
    noisy: bool


def rehearse(sampler: Any, sigmas: torch.Tensor, patcher: ModelPatcher) -> Rehearsal:
    """Find what ``sampler`` will do for the schedule ``sigmas`` [steps + 1].

    One call per step, and no noise, is assumed where this is not known in advance. Only the host's own samplers are rehearsed:
    another pack's might have side effects.
    """
    once = Rehearsal(sigmas[:-1], noisy=False)
    function = getattr(sampler, "sampler_function", None)
    if not getattr(function, "__module__", "").startswith("comfy."):
        return once
    stand_in = _StandIn(patcher, limit=_MOST * len(once.sigmas))
    start = torch.ones(1, 4, 8, 8) * float(sigmas[0])
    options = {**sampler.extra_options, "extra_args": {"model_options": {}, "seed": 0}, "callback": None, "disable": True}
    if "noise_sampler" in inspect.signature(function).parameters:
        noise = torch.linspace(-1, 1, start.numel()).reshape(start.shape)
        options["noise_sampler"] = lambda *_: noise  # their own takes ten times as long as everything else
    try:
        # the picture's own noise must not depend on whether there was a rehearsal
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            function(stand_in, start, sigmas.cpu(), **options)
    except Exception as error:  # a sampler may want something of a model that the stand-in does not have
        log.debug("AsyncDiff: no rehearsal of this sampler (%s: %s)", type(error).__name__, error)
        return once
    if not stand_in.sigmas:
        return once
    return Rehearsal(torch.tensor(stand_in.sigmas, dtype=sigmas.dtype, device=sigmas.device), stand_in.noisy)


class _StandIn:
    """Stand-in for the model that a sampler denoises with; it always predicts an empty picture.

    A picture that begins all alike stays so, unless the sampler adds noise.
    """

    def __init__(self, patcher: ModelPatcher, limit: int) -> None:
        self.sigmas: list[float] = []
        self.noisy = False
        self._limit = limit
        # where samplers look for facts about the model: in the guider and below it
        self.inner_model = self
        self.model_patcher = patcher
        self.model_sampling = patcher.get_model_object("model_sampling")

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, model_options: Mapping[str, Any] | None = None, **_: Any
    ) -> torch.Tensor:
        if len(self.sigmas) == self._limit:
            raise RuntimeError(f"more than {self._limit} calls")
        self.sigmas.append(float(sigma.flatten()[0]))
        self.noisy = self.noisy or float(x.max() - x.min()) > 1e-3 * float(x.abs().max())
        denoised = torch.zeros_like(x)
        for look in (model_options or {}).get("sampler_post_cfg_function", ()):  # cfg_pp samplers look at the two halves
            denoised = look({"denoised": denoised, "cond_denoised": denoised, "uncond_denoised": denoised})
        return denoised
