"""The host's own network in a sampling that ranks compute: it is loaded only once it has to compute a call itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from asyncdiff_nodes.host.attributes import replaced
from asyncdiff_nodes.host.workers.memory import unload
from asyncdiff_nodes.host.workers.weights import originals_of


class OwnNetwork:
    """The host's network in one sampling.

    Args:
        patcher: the host's patcher of the network.
        more: patchers that are loaded with it: of its motion models, and of ControlNets that otherwise the ranks compute.
    """

    def __init__(self, patcher: ModelPatcher, more: Sequence[ModelPatcher]) -> None:
        self._patcher, self._more = patcher, more
        self._loaded = False

    def prepare(self) -> None:
        """Do what loading does to the rest of the model: apply other nodes' object patches, move small parts to the device."""
        patcher, live = self._patcher, dict(self._patcher.model.diffusion_model.named_parameters())
        if any(name in live and kept.shape != live[name].shape for name, kept in originals_of(patcher).items()):
            unload([patcher], patcher.load_device)  # the host reads shapes, and a clone's patches have changed them
        patcher.model_patches_to(patcher.load_device)
        patcher.model_patches_to(patcher.model_dtype())
        patcher.unpatch_model(patcher.offload_device, unpatch_weights=False)
        with replaced(patcher, "skip_injection", True):
            patcher.patch_model(load_weights=False)
        for child in patcher.model.children():
            if child is not patcher.model.diffusion_model:
                child.to(patcher.load_device)

    def load(self, x: torch.Tensor) -> None:
        """Have the host load the network after all, for a call at the latent ``x``."""
        if not self._loaded:
            need = self._patcher.memory_required(list(x.shape))
            comfy.model_management.load_models_gpu(list(dict.fromkeys([self._patcher, *self._more])), memory_required=need)
            self._loaded = True

    def for_once(self, compute: Callable[[], Any]) -> Any:
        """Return the result of ``compute``, which uses the network. Then unload it again, and restore the random numbers."""
        loaded, device = self._loaded, self._patcher.load_device
        try:
            own = {} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
            with torch.random.fork_rng(**({"devices": []} | own)):
                return compute()
        finally:
            if not loaded:
                unload([self._patcher], device)
                self.prepare()
                self._loaded = False

    @contextlib.contextmanager
    def batched_for(self, free: float) -> Iterator[None]:
        """Tell the host for a while that ``free`` bytes are free; it asks in each step, and divides a batch that does not fit.

        Otherwise it would ask a device that a rank has filled, and put the prompts into separate calls in some steps only.
        """
        if not hasattr(self._patcher, "get_free_memory"):  # not in 0.3
            yield
            return
        its_own = self._patcher.get_free_memory

        def get_free_memory(device: torch.device) -> float:
            return its_own(device) if self._loaded else free

        with replaced(self._patcher, "get_free_memory", get_free_memory):
            yield
