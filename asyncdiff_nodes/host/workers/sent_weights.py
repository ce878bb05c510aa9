"""The weights that ranks were sent, and those of them that have changed since, also in place.

Nobody announces such a change, and reading all weights of a large model takes too long. So before each sampling every small
weight is read, and a sample of each large one. A weight's address, and PyTorch's count of its changes if it has one, are compared
too. A weight that may only have moved, as happens when the host loads or unloads a model, is summed up before it is sent again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import WeightAdapterBase
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from asyncdiff_nodes.engine.tensors import tensors_of
from asyncdiff_nodes.engine.trees import flatten
from asyncdiff_nodes.host.patches.registry import models_of

from .weights import PREFIX, loaded_as_patched, net_prefix, unpatched

_WHOLE = 2**13  # a weight of at most so many bytes is read whole
_ALL = 2**25  # all weights of a model of at most so many bytes are read whole
_POINTS = 128  # elements that are read of a larger weight
_PATCH = "\0patch"  # between the name of a weight and the number of a tensor among its patches

_USUAL = (torch.Tensor, nn.Parameter)

Location = tuple[int, int | None, Any, Any]  # address, PyTorch's count of changes (None where it keeps none), shape and strides


@dataclass(frozen=True)
class Sources:
    """Everything that weights are made of, by name.

    Attributes:
        tensors: the weights before patches, and the tensors of the patches.
        patches: the rest of the patches.
        loaded: weights that the host has loaded with these very patches.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    patches: dict[str, Any] = field(default_factory=dict)
    loaded: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, patcher: ModelPatcher, nets: Sequence[nn.Module | None]) -> Sources:
        """The sources of the model, of its patches' further models, and of ControlNets that are not gone."""
        sources = cls()
        sources._add("", patcher, patcher.model.diffusion_model, PREFIX)
        for prefix, model in models_of(patcher).items():
            sources._add(prefix, model, model.model, "")
        for slot, net in enumerate(nets):
            sources.tensors.update((net_prefix(slot) + name, tensor) for name, tensor in tensors_of(net or nn.Module()))
        return sources

    def _add(self, name: str, patcher: ModelPatcher, network: nn.Module, prefix: str) -> None:
        """Add ``network`` of ``patcher``. Names begin with ``name`` here, and with ``prefix`` in the host."""
        for weight, tensor in tensors_of(network):
            key = prefix + weight
            self.tensors[name + weight] = unpatched(patcher, key, tensor)
            if key in patcher.patches:
                self._add_patches(name + weight, patcher.patches[key])
                if loaded_as_patched(patcher, key):
                    self.loaded[name + weight] = tensor

    def _add_patches(self, name: str, patches: Sequence[Any]) -> None:
        leaves, structure = flatten([[_opened(part) for part in each] for each in patches])
        is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self.patches[name] = structure, [leaf for leaf, one in zip(leaves, is_tensor, strict=True) if not one]
        for number, (leaf, one) in enumerate(zip(leaves, is_tensor, strict=True)):
            if one:
                self.tensors[f"{name}{_PATCH}{number}"] = leaf


def _opened(part: Any) -> Any:
    """A part of a patch, as the host keeps it, in a form that can be taken apart."""
    return (type(part), vars(part)) if isinstance(part, WeightAdapterBase) else part


class Sent:
    """The weights that the ranks of one group have.

    Args:
        sources: the sources of all weights that they will get.
    """

    @torch.no_grad()
    def __init__(self, sources: Sources) -> None:
        self._whole = _WHOLE if sum(tensor.nbytes for _, tensor in _plain(sources.tensors)) > _ALL else _ALL
        self._places: dict[str, Location] = {}
        self._samples: dict[str, bytes] = {}
        self._sums: dict[str, int] = {}
        self._patches: dict[str, Any] = {}
        self._patched: dict[str, bytes] = {}  # samples of weights as they were sent, with their patches
        self._as_loaded: set[str] = set()  # names of weights sent as the host had loaded them, with anybody's changes to them

    def noting(self, weights: Iterable[tuple[str, torch.Tensor]], patched: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``weights`` as they are sent, and keep samples of those whose names are in ``patched``."""
        for name, value in weights:
            if name in patched:
                self._patched |= _samples({name: value}, self._whole)
            yield name, value

    @torch.no_grad()
    def take(self, sources: Sources, names: Collection[str] | None = None) -> None:
        """Note that the ranks have the weights of these sources; only those in ``names``, if given."""
        tensors = {name: plain for name, plain in _plain(sources.tensors) if names is None or name.partition("\0")[0] in names}
        self._samples |= _samples(tensors, self._whole)
        for name, tensor in tensors.items():
            self._places[name], self._sums[name] = _place(tensor), _sum(tensor)
        self._patches = sources.patches
        again = {name.partition("\0")[0] for name in tensors}
        self._as_loaded = (self._as_loaded - again) | (sources.loaded.keys() & again)

    @torch.no_grad()
    def changed(self, sources: Sources) -> tuple[set[str], set[str]]:
        """Names of the weights that differ from the ranks', and of those where only the patches differ."""
        weights: set[str] = set()
        patches = {name for name in self._patches.keys() | sources.patches.keys() if self._other_patches(name, sources)}
        tensors = dict(_plain(sources.tensors))
        for name, sample in _samples(tensors, self._whole).items():
            place = _place(tensors[name])
            if sample == self._samples.get(name):
                if place == self._places[name]:
                    continue
                if _sum(tensors[name]) == self._sums[name]:
                    self._places[name] = place  # it was moved
                    continue
            weight, is_patch, _ = name.partition(_PATCH)
            (patches if is_patch else weights).add(weight.partition("\0")[0])
        loaded = {name: tensor for name, tensor in sources.loaded.items() if name in self._patched}
        weights |= self._as_loaded - sources.loaded.keys()
        weights |= {name for name, sample in _samples(loaded, self._whole).items() if sample != self._patched[name]}
        return weights, patches - weights

    def _other_patches(self, name: str, sources: Sources) -> bool:
        return self._patches.get(name) != sources.patches.get(name)


def _plain(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same as plain tensors, several for a quantised one; without tensors that the host has no values for."""
    for name, tensor in tensors.items():
        if type(tensor) not in _USUAL:
            if is_traceable_wrapper_subclass(tensor):
                parts, _ = tensor.__tensor_flatten__()
                yield from _plain({f"{name}\0{part}": getattr(tensor, part) for part in parts})
                continue
            tensor = tensor.as_subclass(torch.Tensor)
        if not tensor.is_meta and tensor.numel():
            yield name, tensor


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in memory from the first to the last of ``tensor``."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,))


def _samples(tensors: Mapping[str, torch.Tensor], whole: int) -> dict[str, bytes]:
    """Some bytes of each tensor, the same ones each time, or all up to ``whole`` bytes. It waits for each device once."""
    groups: dict[Any, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        each = _memory(tensor)
        if each.nbytes > whole:
            each = each[:: len(each) // _POINTS | 1]  # an odd distance, so that not all of them lie in one column
        groups.setdefault((each.device, each.dtype), {})[name] = each
    sums: dict[str, bytes] = {}
    for picked in groups.values():
        joined = memoryview(torch.cat(list(picked.values())).view(torch.uint8).cpu().numpy())
        begin = 0
        for name, each in picked.items():
            sums[name] = bytes(joined[begin : begin + each.nbytes])
            begin += each.nbytes
    return sums


def _place(tensor: torch.Tensor) -> Location:
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version, tensor.shape, tensor.stride()


def _sum(tensor: torch.Tensor) -> int:
    """The sum of all bytes, added up in machine words where they are aligned."""
    memory = _memory(tensor)
    aligned = memory.nbytes % 8 == 0 and memory.storage_offset() * memory.element_size() % 8 == 0
    return int(memory.view(torch.int64 if aligned else torch.uint8).sum(dtype=torch.int64))
