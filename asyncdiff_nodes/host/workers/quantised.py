"""Quantised layers in a form that a worker process can rebuild: the host's own classes, with weights in plain parts."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from asyncdiff_nodes.engine.tensors import tensors_of

from . import lora
from .gguf import GGUF

_PARTS = "_parts"  # the name of the module with a weight's parts ends with this
Patches = Mapping[str, Sequence[Any]]  # name of a weight -> the patches on it, as the host keeps them
Pieces = tuple[Any, dict[str, torch.Tensor]]  # settings of a quantised tensor, and the plain tensors that it is made of


class Operations(Protocol):
    """Access to layer classes that cannot be imported. It is plain data, since it is compared and sent to ranks.

    Attributes:
        patch_dtype: the precision in which patches (LoRA) become part of a weight; None for the host's choice.
    """

    patch_dtype: torch.dtype | None

    def classes(self) -> type:
        """The class that has these layer classes as members, the same one each time."""

    def state(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        """The state that such a layer is loaded from, with weights on the meta device."""

    def carries(self, weight: torch.Tensor) -> bool:
        """Whether ``weight`` carries its patches along, so that they are added in every call."""

    def pieces(self, weight: torch.Tensor, patches: Sequence[Any] = ()) -> Pieces | None:
        """Take ``weight`` apart, with the ``patches`` that it carries along; None if it is a plain tensor."""

    def whole(self, settings: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Put the tensor together that :meth:`pieces` took apart."""


@dataclass(frozen=True)
class MixedPrecision:
    """The host's operations for checkpoints that say how each layer is quantised.

    A rank gets them from the host's own function too, which checks what the rank's device can compute.

    Attributes:
        settings: the items of the checkpoint's quantisation settings.
        compute_dtype: the dtype of the layers' results.
    """

    settings: tuple[tuple[str, Any], ...]
    compute_dtype: torch.dtype | None
    patch_dtype = None

    @classmethod
    def of(cls, patcher: ModelPatcher) -> MixedPrecision | None:
        """The operations of the model; None if it has others."""
        config = patcher.model.model_config
        settings = getattr(config, "quant_config", None)
        if not settings or config.custom_operations is not None:
            return None
        return cls(tuple(sorted(settings.items())), config.manual_cast_dtype)

    def classes(self) -> type:
        """See :class:`Operations`."""
        return _picked(self)

    def state(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        """See :class:`Operations`. ``comfy_quant``, a text that is read while loading, keeps its values."""
        return {key: value if key == "comfy_quant" else value.to("meta") for key, value in layer.state_dict().items()}

    def carries(self, weight: torch.Tensor) -> bool:
        """See :class:`Operations`."""
        return False

    def pieces(self, weight: torch.Tensor, patches: Sequence[Any] = ()) -> Pieces | None:
        """See :class:`Operations`."""
        if not is_traceable_wrapper_subclass(weight):
            return None
        names, settings = weight.__tensor_flatten__()
        return (type(weight), settings), {name: getattr(weight, name) for name in names}

    def whole(self, settings: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """See :class:`Operations`."""
        kind, rest = settings
        return kind.__tensor_unflatten__(tensors, rest, None, None)


@functools.cache
def _picked(operations: MixedPrecision) -> type:
    config = SimpleNamespace(quant_config=dict(operations.settings))
    return comfy.ops.pick_operations(None, operations.compute_dtype, model_config=config)


def operations_of(patcher: ModelPatcher) -> Operations | None:
    """A rank's access to the layer classes of the diffusion model; None where they can be imported, or none is known."""
    return MixedPrecision.of(patcher) or GGUF.of(patcher)


def made_by(operations: Operations | None, cls: type) -> bool:
    """Whether ``cls`` is one of these layer classes."""
    if operations is None:
        return False
    outer = operations.classes()
    return (cls.__module__, cls.__qualname__) == (outer.__module__, f"{outer.__qualname__}.{cls.__name__}")


def states(network: nn.Module, operations: Operations) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Name of each layer of these classes, and the state that it is loaded from, with weights on the meta device."""
    for name, layer in network.named_modules():
        if made_by(operations, type(layer)):
            yield name, operations.state(layer)


def outline(network: nn.Module, operations: Operations, patches: Patches) -> list[Any]:
    """A description that is equal for networks that are quantised and patched in the same way."""

    def described(name: str, value: torch.Tensor) -> Any:
        if not value.is_meta:
            return value.tolist()
        settings, tensors = operations.pieces(value, patches.get(name, ())) or (None, {})
        layouts = [(part, tuple(tensor.shape), tensor.dtype) for part, tensor in tensors.items()]
        return tuple(value.shape), value.dtype, settings, layouts

    layers = states(network, operations)
    return [(name, {key: described(f"{name}.{key}", value) for key, value in state.items()}) for name, state in layers]


def take_apart(network: nn.Module, operations: Operations, patches: Patches) -> None:
    """Make the layers of these classes, on the meta device, keep their quantised weights in :class:`Parts`."""
    for prefix, layer in list(network.named_modules()):
        if not made_by(operations, type(layer)):
            continue
        layer.__class__ = _layer_class(operations, type(layer).__name__)
        for name, weight in list(layer.named_parameters(recurse=False)):
            if pieces := operations.pieces(weight, patches.get(f"{prefix}.{name}", ())):
                del layer._parameters[name]
                layer.add_module(name + _PARTS, Parts(operations, weight, *pieces))


def whole_name(name: str) -> str:
    """The host's name of the weight that a skeleton's tensor ``name`` is, or is a part of."""
    owner = name.rpartition(".")[0]
    return owner.removesuffix(_PARTS) if owner.endswith(_PARTS) else name


def part_of(skeleton: nn.Module, name: str, weight: torch.Tensor, patches: Sequence[Any]) -> torch.Tensor:
    """The part of ``weight`` with its ``patches`` that the tensor ``name`` of ``skeleton`` holds; it may be the whole."""
    owner, _, leaf = name.rpartition(".")
    holder = skeleton.get_submodule(owner)
    pieces = holder.operations.pieces(weight, patches) if isinstance(holder, Parts) else None
    return weight if pieces is None else pieces[1][leaf]


def changed_by_patches(skeleton: nn.Module, names: Collection[str]) -> frozenset[str]:
    """The tensors of ``skeleton`` that change with the patches of the weights in ``names``: carried patches, or all parts."""
    parts_of: dict[str, list[str]] = {}
    for name, _ in tensors_of(skeleton):
        if (whole := whole_name(name)) in names:
            parts_of.setdefault(whole, []).append(name)
    changed: set[str] = set()
    for parts in parts_of.values():
        carried = [name for name in parts if name.rpartition(".")[2].startswith(lora.TENSOR)]
        changed.update(carried or parts)
    return frozenset(changed)


class Parts(nn.Module):
    """A quantised weight as the plain tensors that it is made of. They are buffers, sent and counted like any others.

    Args:
        weight: the whole weight.
        settings, tensors: see :class:`Operations`.
    """

    def __init__(self, operations: Operations, weight: torch.Tensor, settings: Any, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.operations = operations
        self._shape, self._dtype, self._settings = tuple(weight.shape), weight.dtype, settings
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to("meta"))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__["_whole"] = None  # a part has changed

    def whole(self) -> torch.Tensor:
        """The weight; on the meta device a plain tensor, since quantised ones do not compute there."""
        tensors = dict(self._buffers)
        if any(tensor.is_meta for tensor in tensors.values()):
            return torch.empty(self._shape, dtype=self._dtype, device="meta")
        if self._whole is None:
            self.__dict__["_whole"] = self.operations.whole(self._settings, tensors)
        return self._whole


class _Layer:
    """Mixin for a layer of the host's class; it comes before that class in the order of bases."""

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__["_modules"].get(name + _PARTS)
        return super().__getattr__(name) if parts is None else parts.whole()

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if input.is_meta:  # on the meta device nothing is quantised
            return self.forward_comfy_cast_weights(input, *args, **kwargs)
        return super().forward(input, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_layer, (self._operations, type(self).__name__), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if getattr(self, "quant_format", None) in getattr(self, "_disabled_formats", ()):  # on this process's device
            self._full_precision_mm = True


@functools.cache
def _layer_class(operations: Operations, name: str) -> type:
    return type(name, (_Layer, getattr(operations.classes(), name)), {"_operations": operations})


def _new_layer(operations: Operations, name: str) -> nn.Module:
    operations.classes()  # this process may have served another model, and may still have that one's options
    cls = _layer_class(operations, name)
    return cls.__new__(cls)
