"""What hangs on a model or on one of its calls that only the host itself can compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from asyncdiff_nodes.engine.trees import flatten
from asyncdiff_nodes.host.patches.animatediff import calls as animatediff
from asyncdiff_nodes.host.workers.weights import PREFIX

from .by_reference import ShippedPatch, Variable, is_plain
from .ipadapter import ImageAttention
from .packs import code_name
from .sag import Attention
from .tome import Merging

_PATCHES = ("patches", "patches_replace")
_ATTENTION = "optimized_attention_override"
_READ_BY_PATCHES = ("cond_or_uncond", "sigmas")
# The host's own bookkeeping: without patches, the network's forward reads none of it.
_HOST_ONLY = {*_PATCHES, *_READ_BY_PATCHES, "wrappers", "callbacks", "uuids", "sample_sigmas", "prefetch_dynamic_vbars"}


def obstacle(patcher: ModelPatcher, model_options: dict[str, Any]) -> str | None:
    """Why no call of ``patcher`` can be routed in this sampling, in words that name the cause; None if they can."""
    if patcher.get_additional_models_with_key("multigpu") or "multigpu_clones" in model_options:
        return "MultiGPU CFG Split is attached to the model; remove it to use AsyncDiff"
    for key in patcher.object_patches:
        if key.startswith(PREFIX.rstrip(".")):
            return f"another node replaced {key} (as torch.compile does)"
    for key in patcher.weight_wrapper_patches:
        if key.startswith(PREFIX):
            return f"another node computes the weight {key} anew in every call"
    if reason := animatediff.obstacle(patcher, model_options):
        return reason
    if any("compile" in str(key) and key != COMPILE_KEY for keys in patcher.wrappers.values() for key in keys):
        return "another pack compiles the model in a way of its own"
    if any(patcher.hook_patches.values()):
        return "weight hooks (scheduled or masked LoRA) change the model's weights between its calls"
    return call_obstacle(patcher.model.diffusion_model, model_options.get("transformer_options", {}))


def call_obstacle(network: nn.Module, transformer_options: dict[str, Any]) -> str | None:
    """Why a call of ``network`` with these options cannot be routed; None if it can."""
    found = {
        f"{place} ({code_name(patch)})"
        for kind in _PATCHES
        for place, patches in transformer_options.get(kind, {}).items()
        for patch in _values(patches)
        if not animatediff.is_dispatch(patch) and not _is_routed(patch, network)
    }
    # without patches, the network's own code reads only those of the other options that are functions
    found |= {
        f"{key} ({code_name(value)})"
        for key, value in transformer_options.items()
        if key not in _HOST_ONLY and callable(value) and (key != _ATTENTION or not _is_routed(value, network))
    }
    return f"the model carries patches that run inside the network: {', '.join(sorted(found))}" if found else None


def surroundings(given: dict[str, Any], network: nn.Module) -> str | None:
    """Why the ranks cannot compute a call of ``network`` with these arguments where it is made; None if they can."""
    tensors = [leaf for leaf in flatten(given)[0] if isinstance(leaf, torch.Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *network.parameters())):
        return "a gradient is taken through the network, which the ranks have none of"
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    if strange := [code_name(mode) for mode in modes if not isinstance(mode, DeviceContext)]:
        return f"another node watches every operation of the network: {', '.join(strange)}"
    return None


def shippable(transformer_options: dict[str, Any]) -> dict[str, Any]:
    """The part of the options that a rank needs: plain data and patches by reference, without the host's bookkeeping."""
    options = {key: value for key, value in transformer_options.items() if key not in _HOST_ONLY and is_plain(value)}
    variables: dict[int, Variable] = {}
    if _ATTENTION in transformer_options:
        options[_ATTENTION] = _shipped(transformer_options[_ATTENTION], variables, transformer_options)
    for kind in _PATCHES:
        shipped = {}
        for place, patches in transformer_options.get(kind, {}).items():
            if isinstance(patches, dict):
                shipped[place] = {where: _shipped(patch, variables, transformer_options) for where, patch in patches.items()}
            elif kept := [patch for patch in patches if not animatediff.is_dispatch(patch)]:
                shipped[place] = [_shipped(patch, variables, transformer_options) for patch in kept]
        if shipped:
            options |= {
                kind: shipped,
                **{key: transformer_options[key] for key in _READ_BY_PATCHES if key in transformer_options},
            }
    return options


def identity(shipped: dict[str, Any], by_value: bool = True) -> str:
    """Equal for options, as made by :func:`shippable`, that have the same patches; or such of tensors of the same shapes."""
    leaves, structure = flatten([shipped.get(kind) for kind in (*_PATCHES, _ATTENTION)])

    def described(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return id(leaf) if by_value else leaf.shape
        return leaf

    return repr((structure, list(map(described, leaves))))


def _shipped(patch: Any, variables: dict[int, Variable], transformer_options: dict[str, Any]) -> Callable[..., Any] | None:
    """What stands for ``patch`` in a rank; None if that is nothing."""
    if shipped := ShippedPatch.of(patch, variables):
        return Attention.of(shipped, transformer_options) or Merging.of(shipped) or shipped
    return ImageAttention.of(patch)


def _is_routed(patch: Any, network: nn.Module) -> bool:
    shipped = _shipped(patch, {}, {})
    return shipped is not None and (not isinstance(shipped, Attention | Merging) or shipped.runs_in(network))


def _values(patches: Any) -> Any:
    return patches.values() if isinstance(patches, dict) else patches
