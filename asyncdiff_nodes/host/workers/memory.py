"""Memory for the ranks: how much there is, and the ranks in the host's own bookkeeping.

So that *Unload models*, memory pressure and a model switch free them.
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


def room_for_weights(devices: Sequence[str], call: float, networks: Sequence[ModelPatcher]) -> list[float]:
    """Bytes of weights that each of these ranks can hold beside a call, which needs ``call`` bytes on each.

    Of a cluster's devices nothing is known, and no limit is set.

    Args:
        networks: the host's own, which stay on a GPU where it was told to keep all there (--highvram, --gpu-only).
    """
    ranks, reserved = Counter(devices), Counter(dict.fromkeys(devices, comfy.model_management.extra_reserved_memory()))
    for network in networks:
        if network.offload_device.type != "cpu":
            reserved[str(network.offload_device)] += network.model_size()

    def room(device: str) -> float:
        if on_cluster(device):
            return math.inf
        return (comfy.model_management.get_total_memory(torch.device(device)) - reserved[device]) / ranks[device] - call

    return list(map(room, devices))


def unload(patchers: Sequence[ModelPatcher], device: torch.device) -> None:
    """Have the host unload these models, and their clones, from ``device``, as it does where memory is short."""
    models = {id(patcher.model) for patcher in patchers}
    loaded = comfy.model_management.current_loaded_models
    others = [each for each in loaded if id(getattr(each.model, "model", None)) not in models]
    comfy.model_management.free_memory(1e30, device, others)  # more than there is: all of these


@contextlib.contextmanager
def kept_from_host(ranks: Sequence[RankMemory]) -> Iterator[None]:
    """While these are not among the host's loaded models, so that it does not end them to make room for others."""
    loaded = comfy.model_management.current_loaded_models
    entries = [entry for entry in loaded if any(entry.model is rank for rank in ranks)]
    for entry in entries:
        loaded.remove(entry)
    try:
        yield
    finally:
        loaded.extend(entries)


class AsyncDiffRank:
    """What the host's log calls a rank: the object that stands for its weights."""


class RankMemory:
    """One rank among the host's loaded models.

    It has the members of a ``ModelPatcher`` that ``comfy.model_management`` touches. A rank cannot give up a part of its
    weights, and a group cannot run without one of its ranks: freeing any of them ends the whole group.
    """

    parent = None

    def __init__(self, device: torch.device, size: int, release: Callable[[], None]) -> None:
        """``release`` ends the group; it must never raise, and may be called again."""
        self.model = AsyncDiffRank()
        self.load_device = device
        self.offload_device = torch.device("cpu")
        self.clone_base_uuid = uuid.uuid4()
        self._size = size
        self._release = release
        self._held = 0

    def forget(self) -> None:
        """The group has ended: nothing is held any more, nor can be loaded."""
        self._size = self._held = 0

    def resize(self, size: int) -> None:
        """The rank's weights are other ones now, of ``size`` bytes."""
        self._size, self._held = size, size if self._held else 0

    def model_size(self) -> int:
        """Bytes of the rank's weights."""
        return self._size

    def loaded_size(self) -> int:
        """Bytes that the rank holds now."""
        return self._held

    def current_loaded_device(self) -> torch.device:
        """Where its weights are; the host asks to learn how much it must make room for."""
        return self.load_device if self._held else self.offload_device

    def partially_load(self, device: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """The host has made room: count the weights as loaded."""
        grown, self._held = self._size - self._held, self._size
        return grown

    def partially_unload(self, device: torch.device, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
        """End the group; returns the bytes that this rank really held."""
        freed = self._held
        self.forget()
        self._release()
        return freed

    def detach(self, unpatch_all: bool = True) -> AsyncDiffRank:
        """End the group, or with ``unpatch_all=False``, of a model about to be loaded again, do nothing."""
        if unpatch_all:
            self.partially_unload(self.offload_device)
        return self.model

    def is_clone(self, other: Any) -> bool:
        """Whether ``other`` stands for the same weights."""
        return getattr(other, "model", None) is self.model

    def is_dynamic(self) -> bool:
        """Not of the host's on-demand kind."""
        return False

    def lowvram_patch_counter(self) -> int:
        """No weights are patched while loading."""
        return 0

    def model_patches_to(self, target: Any) -> None:
        """Nothing to move: patches are in the weights."""

    def model_patches_models(self) -> list[Any]:
        """No further models come with it."""
        return []

    def get_nested_additional_models(self) -> list[Any]:
        """No further models come with it."""
        return []

    def model_dtype(self) -> None:
        """Of no concern to the host."""
