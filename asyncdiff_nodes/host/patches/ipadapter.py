"""The patches of ComfyUI_IPAdapter_plus in a rank: its code by import, what it looks at by value.

Each replaces the attention of one block to the prompt. Of the adapter's weights it needs the two layers of that block alone.
Nothing of the host is imported here: a rank has not its flags yet when it imports this.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import register_pytree_node, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .by_reference import is_plain
from .packs import PackModule

_PACK, _MODULE, _CLASS, _CALLBACK = "comfyui_ipadapter_plus", "CrossAttentionPatch", "Attn2Replace", "ipadapter_attention"
_OF_SDXL = "101_to_k_ip"  # the pack tells SDXL's adapters by their having this layer

Layers = tuple[tuple[torch.Tensor, torch.Tensor | None], ...]  # (weight, bias) of linear layers, one after the other


@dataclass(frozen=True)
class _At:
    """In place of a tensor: where it is among those of its patch."""

    index: int


@dataclass(frozen=True)
class ImageAttention:
    """The patch of one block by reference; called like the object it stands for.

    To the engine it is a container of its tensors, so that each rank is sent what its blocks look at, once per sampling.

    Attributes:
        module: where its class is.
        settings: of each adapter that was applied to the block, with the layers of the block in place of the adapter.
        tensors: of the settings.
    """

    module: PackModule
    settings: tuple[dict[str, Any], ...]
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, patch: Any) -> ImageAttention | None:
        """The reference to ``patch``; None if it is none of the pack's, or in a form that is not known."""
        module = PackModule.of(type(patch))
        if module is None or (module.pack, module.name, type(patch).__qualname__) != (_PACK, _MODULE, _CLASS):
            return None
        if (made := _made.get(patch)) is not None and len(made.settings) == len(patch.callback):
            return made  # nodes add to it, and never change what is there
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
        """What stands for it on the meta device: whether it looks at its tensors depends on the step, here it does."""
        for tensor in self.tensors:
            torch.empty_like(tensor)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class _Adapter:
    """What the pack's code reads of an adapter.

    Args:
        layers: of this block, by name.
    """

    def __init__(self, layers: dict[str, Layers | None]) -> None:
        self.ip_layers = self
        self.to_kvs = {name: functools.partial(_project, each) for name, each in layers.items()}

    def get_multigpu_clone(self, device: torch.device) -> _Adapter:
        """Itself: its layers are where the block is."""
        return self


_made: WeakKeyDictionary[Any, ImageAttention] = WeakKeyDictionary()
_constants = WeakTensorKeyDictionary()  # a tensor that several blocks look at -> the parameter that is sent in its place

register_pytree_node(
    ImageAttention,
    lambda patch: (list(patch.tensors), (patch.module, patch.settings)),
    lambda tensors, context: ImageAttention(*context, tuple(tensors)),
)


def _settings(given: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of one adapter as plain data; None if they are others than expected."""
    layers = getattr(getattr(given.get("ipadapter"), "ip_layers", None), "to_kvs", {})
    names = [f"{given.get('module_key')}_to_{what}_ip" for what in "kv"]
    found = {name: _layers(layers[name]) for name in names if name in layers}
    if len(found) < len(names) or None in found.values():
        return None
    return {**given, "ipadapter": {_OF_SDXL: None, **found} if _OF_SDXL in layers else found}


def _layers(module: nn.Module) -> Layers | None:
    linear = list(module) if type(module) is nn.Sequential else [module]
    return tuple((each.weight, each.bias) for each in linear) if all(type(each) is nn.Linear for each in linear) else None


def _project(layers: Layers, x: torch.Tensor) -> torch.Tensor:
    for weight, bias in layers:
        x = nn.functional.linear(x, weight, bias)
    return x


def constant(tensor: torch.Tensor) -> nn.Parameter:
    """``tensor`` as what the engine takes for constant; the same one each time."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    if tensor not in _constants:
        _constants[tensor] = nn.Parameter(tensor, requires_grad=False)
    return _constants[tensor]
