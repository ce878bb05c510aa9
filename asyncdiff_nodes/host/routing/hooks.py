"""The hooks on a model: while it is sampled, the calls of its network go to a worker group.

The host's own sampler loop runs as always; see docs/architecture.md for what each hook does.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from asyncdiff_nodes.host import OURS
from asyncdiff_nodes.host.attributes import replaced, without
from asyncdiff_nodes.host.page.settings import setting
from asyncdiff_nodes.host.workers.pool import POOL

from .network_call import NetworkCall, has_hook
from .options import OneDeviceError, Options
from .sampling import Sampling


def attach(patcher: ModelPatcher, options: Options | None = None) -> ModelPatcher:
    """Clone ``patcher`` so that a worker group computes its network wherever it is sampled.

    Args:
        options: the options; None for those of the user's settings.

    Raises:
        PlanError, DeviceError: an option is out of range, or this machine lacks a device.
    """
    options = options or Options(preset=setting("Preset"))
    with contextlib.suppress(OneDeviceError):  # the host then samples as usual
        options.resolve()
    clone = patcher.clone()
    route = Route(options)
    for kind, hook in (
        (WrappersMP.OUTER_SAMPLE, route.outer_sample),
        (WrappersMP.PREPARE_SAMPLING, route.prepare_sampling),
        (WrappersMP.DIFFUSION_MODEL, route.diffusion_model),
        (WrappersMP.APPLY_MODEL, route.apply_model),
        (WrappersMP.PREDICT_NOISE, route.predict_noise),
    ):
        clone.remove_wrappers_with_key(kind, OURS)
        clone.add_wrapper_with_key(kind, OURS, hook)
    return clone


class Route:
    """The hooks of one model; between samplings it holds nothing but its options."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._sampling: Sampling | None = None

    def outer_sample(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Wrap one sampling: set up before it, and clean up however it ends."""
        with POOL.in_use():
            outer, self._sampling = self._sampling, Sampling(self._options, executor.class_obj, *args[2:4])
            try:
                result = executor(*args, **kwargs)
                self._sampling.finish()
                return result
            except BaseException as error:
                self._sampling.fail(error)
                raise
            finally:
                self._sampling.close()
                self._sampling = outer

    def prepare_sampling(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Give the network to the ranks, where the host would load it onto its own device."""
        if self._sampling is not None and (prepared := self._sampling.prepare(*args, **kwargs)) is not None:
            return prepared
        return executor(*args, **kwargs)

    def predict_noise(self, executor: WrapperExecutor, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Note one evaluation of the model by the sampler; it may make several calls of the network."""
        if self._sampling is not None:
            self._sampling.evaluate(x, sigma)
        return executor(x, sigma, *args, **kwargs)

    def diffusion_model(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Route one call of the network."""
        network = executor.class_obj
        if not self._ranks_are_ready:
            return executor(*args, **kwargs)
        if not self._sampling.computes(network):
            self._sampling.pass_by(NetworkCall.of(network, executor.original, args, kwargs))
            return executor(*args, **kwargs)
        # the hooks of other nodes after ours still apply; only the network at the end of the chain is replaced
        inner = executor.wrappers[executor.idx + 1 :]

        def routed(*args: Any, **kwargs: Any) -> Any:
            return self._sampling.call(NetworkCall.of(network, executor.original, args, kwargs))

        return WrapperExecutor.new_class_executor(routed, network, inner).execute(*args, **kwargs)

    def apply_model(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Route one evaluation of the model, if its network calls no DIFFUSION_MODEL wrappers."""
        if not self._ranks_are_ready:
            return executor(*args, **kwargs)
        model = executor.class_obj
        self._sampling.evaluating(model, args, kwargs)
        network = model.diffusion_model
        if has_hook(type(network)):
            return executor(*args, **kwargs)
        forward, replacement = network.forward, vars(network).get("forward")

        def routed(*args: Any, **kwargs: Any) -> Any:
            call = NetworkCall.of(network, forward, args, kwargs)
            # each call looks for replacements by other nodes; ours must not count as one
            with without(network, "forward") if replacement is None else replaced(network, "forward", replacement):
                if self._sampling.computes(network):
                    return self._sampling.call(call)
                self._sampling.pass_by(call)
                return call.compute()

        with replaced(network, "forward", routed):
            return executor(*args, **kwargs)

    @property
    def _ranks_are_ready(self) -> bool:
        return self._sampling is not None and self._sampling.routes
