"""What hangs on a model or on one of its calls that only the host itself can compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from .weights import PREFIX

# Of the host's own bookkeeping: the network's forward reads none of it without patches.
_HOST_ONLY = {"wrappers", "callbacks", "patches", "patches_replace", "uuids", "sigmas", "sample_sigmas", "cond_or_uncond"}


def obstacle(patcher: ModelPatcher, model_options: dict[str, Any]) -> str | None:
    """Why no call of ``patcher`` can be routed in this sampling, in words that name the cause; None if they can."""
    if patcher.get_additional_models_with_key("multigpu") or "multigpu_clones" in model_options:
        return "MultiGPU CFG Split is attached to the model; remove it to use AsyncDiff"
    for key in patcher.object_patches:
        if key.startswith(PREFIX.rstrip(".")):
            return f"another node replaced {key} (as torch.compile does)"
    for key in patcher.weight_wrapper_patches if hasattr(patcher, "weight_wrapper_patches") else ():
        if key.startswith(PREFIX):
            return f"another node computes the weight {key} anew in every call"
    if patcher.injections:
        return f"another node injects modules into the model: {', '.join(map(str, patcher.injections))}"
    if any(patcher.hook_patches.values()):
        return "weight hooks (scheduled or masked LoRA) change the model's weights between its calls"
    return call_obstacle(model_options.get("transformer_options", {}))


def call_obstacle(transformer_options: dict[str, Any]) -> str | None:
    """Why a call with these options cannot be routed; None if it can."""
    found = [name for kind in ("patches", "patches_replace") for name in _patch_names(transformer_options.get(kind, {}))]
    found += [
        f"{key} ({_name(value)})" for key, value in transformer_options.items() if key not in _HOST_ONLY and callable(value)
    ]
    return f"the model carries patches that run inside the network: {', '.join(sorted(set(found)))}" if found else None


def shippable(transformer_options: dict[str, Any]) -> dict[str, Any]:
    """The part of the options that a rank needs: plain data, without the host's own bookkeeping."""
    return {key: value for key, value in transformer_options.items() if key not in _HOST_ONLY and _is_plain(value)}


def _patch_names(patches: dict[str, Any]) -> Iterator[str]:
    for place, functions in patches.items():
        for function in functions.values() if isinstance(functions, dict) else functions:
            yield f"{place} ({_name(function)})"


def _name(function: Any) -> str:
    """Where a patch comes from, as its author wrote it."""
    if isinstance(function, tuple):  # forward_timestep_embed_patch: (class, function)
        function = function[-1]
    named = function if hasattr(function, "__qualname__") else type(function)
    module = named.__module__.replace("\\", "/").rpartition("/")[2]  # packs are loaded under path-like names
    return f"{module}.{named.__qualname__.split('.<locals>')[0]}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor | torch.dtype)
