"""The patches of ComfyUI_IPAdapter_plus in a rank: their code is imported, and the data that they read is sent.

Each replaces one block's attention to the prompt. It needs only two layers of the adapter, those of its block.
Nothing of the host is imported here: a rank does not have the host's flags yet when it imports this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import register_pytree_node, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .by_reference import Variable, is_plain
from .packs import PackModule
from .protocol import RoutedPatch

_PACK, _MODULE, _CLASS, _CALLBACK = "comfyui_ipadapter_plus", "CrossAttentionPatch", "Attn2Replace", "ipadapter_attention"
_OF_SDXL = "101_to_k_ip"  # the pack recognises SDXL's adapters by this layer

Layers = tuple[tuple[torch.Tensor, torch.Tensor | None], ...]  # (weight, bias) of linear layers, one after the other


@dataclass(frozen=True)
class _At:
    """Placeholder for a tensor: its index among the tensors of its patch."""

    index: int


@dataclass(frozen=True)
class ImageAttention:
    """The patch of one block by reference; it is called like the object that it stands for.

    For the engine it is a container of tensors, so that each rank gets what its blocks read, once per sampling.

    Attributes:
        module: where its class is.
        settings: the settings of each adapter on the block, with the block's layers in place of the adapter.
        tensors: the tensors of the settings.
    """

    module: PackModule
    settings: tuple[dict[str, Any], ...]
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, patch: Any) -> ImageAttention | None:
        """The reference to ``patch``; None if it is not the pack's, or its form is unknown."""
        module = PackModule.of(type(patch))
        if module is None or (module.pack, module.name, type(patch).__qualname__) != (_PACK, _MODULE, _CLASS):
            return None
        if (made := _made.get(patch)) is not None and len(made.settings) == len(patch.callback):
            return made  # nodes only add to it, and never change what is there
        callback = getattr(module.load(), _CALLBACK, None)
        settings = tuple(map(_settings, patch.kwargs))
        if any(each is not callback for each in patch.callback) or None in settings or not is_plain(settings):
            return None
        tensors: list[torch.Tensor] = []

        def take(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            tensors.append(constant(value))
            return _At(len(tensors) - 1)

        _made[patch] = cls(module, tree_map(take, settings), tuple(tensors))
        return _made[patch]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        """Run the patch."""
        module = self.module.load()
        callback = getattr(module, _CALLBACK)
        settings = tree_map(lambda value: self.tensors[value.index] if isinstance(value, _At) else value, self.settings)
        first, *others = ({**each, "ipadapter": _Adapter(each["ipadapter"])} for each in settings)
        patch = getattr(module, _CLASS)(callback, **first)
        for each in others:
            patch.add(callback, **each)
        return patch(q, k, v, extra_options)

    def traced(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        """Stand-in for the patch on the meta device. It always reads its tensors; the patch does so in some steps only."""
        for tensor in self.tensors:
            torch.empty_like(tensor)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class ImageAdapter(RoutedPatch):
    """The pack's patches."""

    def shipped(self, patch: Any, options: dict[str, Any], variables: dict[int, Variable]) -> Callable[..., Any] | None:
        """See :class:`RoutedPatch`."""
        return ImageAttention.of(patch)


class _Adapter:
    """The part of an adapter that the pack's code reads.

    Args:
        layers: the layers of this block, by name.
    """

    def __init__(self, layers: dict[str, Layers | None]) -> None:
        self.ip_layers = self
        self.to_kvs = {name: functools.partial(_project, each) for name, each in layers.items()}

    def get_multigpu_clone(self, device: torch.device) -> _Adapter:
        """Return itself: its layers are where the block is."""
        return self


_made: WeakKeyDictionary[Any, ImageAttention] = WeakKeyDictionary()
_constants = WeakTensorKeyDictionary()  # a tensor that several blocks read -> the parameter that is sent in its place

register_pytree_node(
    ImageAttention,
    lambda patch: (list(patch.tensors), (patch.module, patch.settings)),
    lambda tensors, context: ImageAttention(*context, tuple(tensors)),
)


def _settings(given: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of one adapter as plain data; None if they are not the expected ones."""
    layers = getattr(getattr(given.get("ipadapter"), "ip_layers", None), "to_kvs", {})
    names = [f"{given.get('module_key')}_to_{what}_ip" for what in "kv"]
    own = {name: _layers(layers[name]) for name in names if name in layers}
    if len(own) < len(names) or None in own.values():
        return None
    return {**given, "ipadapter": {_OF_SDXL: None, **own} if _OF_SDXL in layers else own}


def _layers(module: nn.Module) -> Layers | None:
    linear = list(module) if type(module) is nn.Sequential else [module]
    return tuple((each.weight, each.bias) for each in linear) if all(type(each) is nn.Linear for each in linear) else None


def _project(layers: Layers, x: torch.Tensor) -> torch.Tensor:
    for weight, bias in layers:
        x = nn.functional.linear(x, weight, bias)
    return x


def constant(tensor: torch.Tensor) -> nn.Parameter:
    """``tensor`` as a parameter, which the engine treats as constant; the same parameter each time."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    if tensor not in _constants:
        _constants[tensor] = nn.Parameter(tensor, requires_grad=False)
    return _constants[tensor]
