"""Everything that a sampling needs before it asks for ranks: its plan, other models, ControlNets, patches, and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
from comfy.model_patcher import ModelPatcher

from asyncdiff_nodes.engine import Placement
from asyncdiff_nodes.host.choices import CUSTOM
from asyncdiff_nodes.host.controlnet.calls import ControlNets
from asyncdiff_nodes.host.patches.compiled import compile_arguments
from asyncdiff_nodes.host.patches.registry import begun, models_of
from asyncdiff_nodes.host.workers.band_times import BandTimes
from asyncdiff_nodes.host.workers.banded import obstacle
from asyncdiff_nodes.host.workers.block_times import Balance
from asyncdiff_nodes.host.workers.limits import Limits
from asyncdiff_nodes.host.workers.memory import room_for_weights
from asyncdiff_nodes.host.workers.pool import GroupRequest

from .cfg_branches import affordable, items_per_call
from .options import Options


class Preparation:
    """Everything that one sampling needs.

    Args:
        guider: the host's GUIDER.
        latent: the shape of the sampler's latent, [B, C, h, w] or [B, C, F, h, w].
        conds: the sampling's prompts by name.
        model_options: the options of this sampling.

    Attributes:
        plan: the ranks' plan, with the warm-up in steps.
        patches: the work of the model's patches in this sampling.
        nets: the ControlNets that the ranks compute.
        others: other models, which the host has to load.
        theirs: models, beside the sampled one, whose weights the ranks have.
        shape: the shape of the latent in each call of the network.
        balance: the known speeds of blocks and devices.
        band_times: what calls in bands took.
        request: the request to the pool.

    Raises:
        OneDeviceError: there is no second device to share the work with.
        PlanError, DeviceError, UnsupportedModelError: see :meth:`.options.Options.resolve` and :class:`.block_times.Balance`.
    """

    def __init__(
        self,
        options: Options,
        guider: Any,
        patcher: ModelPatcher,
        latent: Sequence[int],
        conds: dict[str, Any],
        model_options: dict[str, Any],
    ) -> None:
        items = items_per_call(guider, conds, model_options, latent[0])
        self.patches = begun(patcher)
        patched = obstacle(model_options.get("transformer_options", {})) or models_of(patcher) or compile_arguments(patcher)
        plan, devices = options.resolve(items, banding=not patched)
        self.nets = ControlNets(conds if options.control_nets == "shared" else {}, patcher, model_options)
        self.theirs = [*self.nets.patchers, *models_of(patcher).values()]
        helpers = comfy.sampler_helpers
        others, extra = helpers.get_additional_models(conds, patcher.model_dtype())
        others += helpers.get_additional_models_from_model_options(model_options)
        others += patcher.get_nested_additional_models()
        self.others = [other for other in others if not any(other is each for each in self.theirs)]
        need, least = (size + extra for size in helpers.estimate_memory(patcher, latent, conds))
        self.networks, call = [patcher, *self.theirs], need if items > 1 else least  # for two prompts, or for one
        limits = Limits(patcher.model, latent)

        def room(call: float) -> list[float]:
            """Bytes of weights that each rank can hold beside its branch's part of a call that needs ``call`` bytes."""
            return limits.of(devices, room_for_weights(devices, call / plan.branches, self.networks))

        # whoever chooses bands is told by the ranks what there is no room for
        if plan.bands > 1 and options.preset != CUSTOM and not affordable(self.networks, plan, devices, room(1.5 * call)):
            plan, devices = options.resolve(items)
        weights = sum(network.model_size() for network in self.networks)
        if plan.bands > 1 and plan.segments > 1 and weights > min(limits.of(devices, [math.inf] * len(devices))):
            plan = replace(plan, bands=1)  # as they said before
        # the host wants half as much again to be free before prompts share a call
        if plan.branches > 1 and not options.branches and not affordable(self.networks, plan, devices, room(1.5 * call)):
            plan, devices = options.resolve(items, branching=False)
        self.plan, self._devices = plan, devices

        def load(ranks: list[Any], kept: int) -> None:
            comfy.model_management.load_models_gpu(
                [*self.others, *ranks], memory_required=need + kept, minimum_memory_required=least + kept
            )
            comfy.model_management.soft_empty_cache()  # the ranks are other processes

        self.shape = list(latent)
        for patch in self.patches:
            patch.prepare()
            self.shape = patch.shape(self.shape)
        self.balance = Balance(patcher, plan, self.shape, devices, room(call))
        self.band_times = BandTimes(patcher, plan, self.shape, devices)
        poll = comfy.model_management.throw_exception_if_processing_interrupted
        self.request = GroupRequest(patcher, self.nets.networks, plan, devices, self.shape, load, poll, self.balance, limits)

    def room_for_calls(self, placement: Placement | None) -> float:
        """Bytes that ranks have left for the calls of all branches, beside the weights of ``placement``, or of equal parts."""
        plan, room = self.plan, room_for_weights(self._devices, 0.0, self.networks)
        if placement is None:
            weights = [self.request.expected_bytes] * len(room)
        else:
            weights = [placement.weight_bytes(plan.segment_of_rank(rank)) for rank in range(len(room))]
        return plan.branches * min(space - size for space, size in zip(room, weights, strict=True))
