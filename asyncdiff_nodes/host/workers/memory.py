"""Memory for the ranks: how much there is, and the ranks' entries in the host's own bookkeeping.

Because of these entries, *Unload models*, a lack of memory, and a change of models free the ranks' weights.
"""

from __future__ import annotations

import contextlib
import math
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from asyncdiff_nodes.engine.devices import on_cluster

_CONTEXT = 2**29  # bytes of a device that a process takes before anything is there, reckoned rather too high


def room_for_weights(devices: Sequence[str], call: float, networks: Sequence[ModelPatcher]) -> list[float]:
    """Bytes of weights that each of these ranks can hold beside a call, which needs ``call`` bytes on each.

    Devices of a cluster have no limit, since nothing is known about their memory.

    Args:
        networks: the host's own; with --highvram or --gpu-only they stay on a GPU.
    """
    ranks, reserved = Counter(devices), Counter(dict.fromkeys(devices, comfy.model_management.extra_reserved_memory()))
    for network in networks:
        if network.offload_device.type != "cpu":
            reserved[str(network.offload_device)] += network.model_size()

    def room(device: str) -> float:
        if on_cluster(device):
            return math.inf
        total = comfy.model_management.get_total_memory(torch.device(device))
        context = 0 if torch.device(device).type == "cpu" else _CONTEXT
        return (total - reserved[device]) / ranks[device] - context - call

    return list(map(room, devices))


def unload(patchers: Sequence[ModelPatcher], device: torch.device) -> None:
    """Have the host unload these models, and their clones, from ``device``, as it does when memory is short."""
    models = {id(patcher.model) for patcher in patchers}
    loaded = comfy.model_management.current_loaded_models
    kept = [each for each in loaded if id(getattr(each.model, "model", None)) not in models]
    comfy.model_management.free_memory(1e30, device, kept)  # more than any device has, so that all of them go


@contextlib.contextmanager
def kept_from_host(ranks: Sequence[RankMemory]) -> Iterator[None]:
    """Take these ranks off the host's loaded models for a while, so that it does not end them to make room."""
    loaded = comfy.model_management.current_loaded_models
    entries = [entry for entry in loaded if any(entry.model is rank for rank in ranks)]
    for entry in entries:
        loaded.remove(entry)
    try:
        yield
    finally:
        loaded.extend(entries)


class AsyncDiffRank:
    """Stand-in for a rank's weights; the host's log shows the name of this class."""


class RankMemory:
    """One rank among the host's loaded models.

    It has the members of a ``ModelPatcher`` that ``comfy.model_management`` uses.
    """

    parent = None

    def __init__(self, device: torch.device, size: int, release: Callable[[int | None], int]) -> None:
        """``release`` frees so many bytes of the rank's weights, or a little more, or all; returns how many those were."""
        self.model = AsyncDiffRank()
        self.load_device = device
        self.offload_device = torch.device("cpu")
        self.clone_base_uuid = uuid.uuid4()
        self._size = size
        self._release = release
        self._held = 0

    def forget(self) -> None:
        """Note that the group has ended: it holds nothing any more, and nothing can be loaded."""
        self._size = self._held = 0

    def resize(self, size: int) -> None:
        """Note that the rank has other weights now, of ``size`` bytes."""
        self._size, self._held = size, size if self._held else 0

    def model_size(self) -> int:
        """Bytes of the rank's weights."""
        return self._size

    def loaded_size(self) -> int:
        """Bytes that the rank holds now."""
        return self._held

    def current_loaded_device(self) -> torch.device:
        """The device of the weights; the host asks, to learn how much room it must make."""
        return self.load_device if self._held else self.offload_device

    def partially_load(self, device: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Count the weights as loaded, now that the host has made room; returns the bytes that are new."""
        grown, self._held = self._size - self._held, self._size
        return grown

    def partially_unload(self, device: torch.device, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
        """Free so many bytes of the rank's weights, or a little more; returns how many."""
        freed = self._release(math.ceil(memory_to_free))
        self._held = max(0, self._held - freed)
        return freed

    def detach(self, unpatch_all: bool = True) -> AsyncDiffRank:
        """Free the rank's weights. With ``unpatch_all=False`` do nothing: the model is about to be loaded again."""
        if unpatch_all:
            self._held = 0
            self._release(None)
        return self.model

    def is_clone(self, other: Any) -> bool:
        """Whether ``other`` stands for the same weights."""
        return getattr(other, "model", None) is self.model

    def is_dynamic(self) -> bool:
        """False: the host does not load a rank on demand."""
        return False

    def lowvram_patch_counter(self) -> int:
        """Zero: no weights are patched while loading."""
        return 0

    def model_patches_to(self, target: Any) -> None:
        """Do nothing: patches are in the weights already."""

    def model_patches_models(self) -> list[Any]:
        """An empty list: no further models come with a rank."""
        return []

    def get_nested_additional_models(self) -> list[Any]:
        """An empty list: no further models come with a rank."""
        return []

    def model_dtype(self) -> None:
        """None: the host does not use it."""
