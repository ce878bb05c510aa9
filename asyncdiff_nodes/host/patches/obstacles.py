"""Reasons why the ranks cannot compute a model or one of its calls; the host then computes it, and names the reason."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from asyncdiff_nodes.engine.trees import flatten
from asyncdiff_nodes.host.workers.weights import PREFIX

from .by_reference import Variable, is_plain
from .packs import code_name
from .registry import KINDS, is_needless, is_routed, shipped

_PATCHES = ("patches", "patches_replace")
_ATTENTION = "optimized_attention_override"
_READ_BY_PATCHES = ("cond_or_uncond", "sigmas")
READ_BY_NETWORKS = frozenset({*_READ_BY_PATCHES, "sample_sigmas"})  # by some
# networks write these before they read them; older hosts' do so in the options of the call, where the next call finds them
_OF_NETWORK = {"original_shape", "transformer_index", "activations_shape", "block", "block_index", "block_type", "total_blocks"}
# without patches, the network's forward reads none of it
_BOOKKEEPING = {"wrappers", "callbacks", "uuids", "prefetch_dynamic_vbars"}
_HOST_ONLY = {*_PATCHES, *READ_BY_NETWORKS, *_OF_NETWORK, *_BOOKKEEPING}


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
    injected = [str(key) for key in patcher.injections if not any(kind.injects(patcher, key) for kind in KINDS)]
    if injected:
        return f"another node injects modules into the model: {', '.join(injected)}"
    for kind in KINDS:
        if reason := kind.obstacle(patcher, model_options):
            return reason
    if any(patcher.hook_patches.values()):
        return "weight hooks (scheduled or masked LoRA) change the model's weights between its calls"
    return call_obstacle(patcher.model.diffusion_model, model_options.get("transformer_options", {}))


def call_obstacle(network: nn.Module, transformer_options: dict[str, Any]) -> str | None:
    """Why a call of ``network`` with these options cannot be routed; None if it can."""
    not_routed = {
        f"{place} ({code_name(patch)})"
        for kind in _PATCHES
        for place, patches in transformer_options.get(kind, {}).items()
        for patch in _values(patches)
        if not is_needless(patch) and not is_routed(patch, network)
    }
    # without patches, the network's own code reads only functions among the other options
    not_routed |= {
        f"{key} ({code_name(value)})"
        for key, value in transformer_options.items()
        if key not in _HOST_ONLY and callable(value) and (key != _ATTENTION or not is_routed(value, network))
    }
    return f"the model has patches that run inside the network: {', '.join(sorted(not_routed))}" if not_routed else None


def surroundings(given: dict[str, Any], network: nn.Module) -> str | None:
    """Why the ranks cannot compute a call of ``network`` in the state PyTorch is in; None if they can."""
    tensors = [leaf for leaf in flatten(given)[0] if isinstance(leaf, torch.Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *network.parameters())):
        return "another node needs gradients of the network, which the ranks do not compute"
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    if strange := [code_name(mode) for mode in modes if not isinstance(mode, DeviceContext)]:
        return f"another node watches every operation of the network: {', '.join(strange)}"
    return None


def shippable(transformer_options: dict[str, Any], read: Collection[str] = ()) -> dict[str, Any]:
    """The part of the options that a rank needs: plain data and patches by reference, without the host's bookkeeping.

    Args:
        read: which of :data:`READ_BY_NETWORKS` this network reads.
    """
    options = {
        key: value
        for key, value in transformer_options.items()
        if (key not in _HOST_ONLY and is_plain(value)) or (key in READ_BY_NETWORKS and key in read)
    }
    variables: dict[int, Variable] = {}
    if _ATTENTION in transformer_options:
        options[_ATTENTION] = shipped(transformer_options[_ATTENTION], transformer_options, variables)
    for kind in _PATCHES:
        kept = {}
        for place, patches in transformer_options.get(kind, {}).items():
            if isinstance(patches, dict):
                kept[place] = {where: shipped(patch, transformer_options, variables) for where, patch in patches.items()}
            elif needed := [patch for patch in patches if not is_needless(patch)]:
                kept[place] = [shipped(patch, transformer_options, variables) for patch in needed]
        if kept:
            options |= {
                kind: kept,
                **{key: transformer_options[key] for key in _READ_BY_PATCHES if key in transformer_options},
            }
    return options


def missing(transformer_options: dict[str, Any], read: Collection[str]) -> str | None:
    """Why ranks cannot compute a call with these options, of which the network reads ``read``; None if they can."""
    kept = [
        key for key in read if key in transformer_options and key not in _HOST_ONLY and not is_plain(transformer_options[key])
    ]
    return f"the network reads the option {min(kept)}, which holds more than plain values" if kept else None


def identity(shipped: dict[str, Any], by_value: bool = True) -> str:
    """A text that is equal for options of :func:`shippable` with the same patches; if not ``by_value``, of the same shapes."""
    leaves, structure = flatten([shipped.get(kind) for kind in (*_PATCHES, _ATTENTION)])

    def described(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return id(leaf) if by_value else leaf.shape
        return leaf

    return repr((structure, list(map(described, leaves))))


def _values(patches: Any) -> Any:
    return patches.values() if isinstance(patches, dict) else patches
