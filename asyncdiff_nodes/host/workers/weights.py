"""The weights of a loaded model as its ranks must have them: every LoRA and other weight patch applied, one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from asyncdiff_nodes.engine import UnsupportedModelError
from asyncdiff_nodes.engine.tensors import tensors_of
from asyncdiff_nodes.host.patches.registry import models_of

from .quantised import Operations, operations_of, part_of, whole_name

PREFIX = "diffusion_model."
_string_to_seed = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed  # moved after 0.3


def net_prefix(slot: int) -> str:
    """The prefix of the names of a ControlNet's weights; see :class:`~.controlnet.network.Controlled`."""
    return f"control_nets.{slot}."


def patches_of(patcher: ModelPatcher) -> dict[str, Sequence[Any]]:
    """The patches of the diffusion model's weights, by the weight's name without prefix."""
    return {key.removeprefix(PREFIX): patches for key, patches in patcher.patches.items() if key.startswith(PREFIX)}


def weights_of(
    patcher: ModelPatcher,
    skeleton: nn.Module,
    names: Collection[str] | None = None,
    nets: Sequence[nn.Module | None] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor of ``skeleton``; with ``names``, of those there and of parts of weights there.

    The values are what the host would have loaded: patches are applied on its device and in its precision, then rounded to the
    weight's dtype, or quantised again. The model is not changed, whether it is loaded or not.

    Args:
        nets: networks of the ControlNets in ``skeleton``; None for one that is gone, which no call can ask for.

    Raises:
        UnsupportedModelError: a weight is neither a plain tensor nor made of them, or a patch would reshape it.
    """
    live = {}
    for slot, net in enumerate(nets):
        live |= {net_prefix(slot) + name: tensor for name, tensor in tensors_of(net or skeleton.control_nets[slot])}
    of_patches = {
        prefix + name: (model, name) for prefix, model in models_of(patcher).items() for name, _ in tensors_of(model.model)
    }
    operations = operations_of(patcher)
    patches = {} if operations is None else patches_of(patcher)
    wholes: dict[str, dict[str, torch.Tensor]] = {}
    for name, meta in tensors_of(skeleton):
        if names is None or name in names or whole_name(name) in names:
            wholes.setdefault(whole_name(name), {})[name] = meta
    for name, metas in wholes.items():
        if name in of_patches:
            weight = _loaded(*of_patches[name], None)
        else:
            weight = _filled(live[name]) if name in live else _loaded(patcher, PREFIX + name, operations)
        for part, meta in metas.items():
            value = part_of(skeleton, part, weight, patches.get(name, ())).cpu()
            if type(value) not in (torch.Tensor, nn.Parameter):
                raise UnsupportedModelError(f"its weight {name} is a {type(value).__name__}, which a rank cannot get")
            if value.shape != meta.shape:
                raise UnsupportedModelError(f"a patch changes the shape of its weight {part} to {tuple(value.shape)}")
            yield part, value.detach().to(meta.dtype)


def _loaded(patcher: ModelPatcher, key: str, operations: Operations | None) -> torch.Tensor:
    """The weight ``key`` of the model as the host would load it."""
    live, set_weight, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    value = _filled(unpatched(patcher, key, live))
    if key not in patcher.patches or (operations and operations.carries(value)) or not _takes_patches(patcher, key):
        return value
    if loaded_as_patched(patcher, key):
        return live
    device, dtype = patcher.load_device, value.dtype
    compute_dtype = operations and operations.patch_dtype
    if compute_dtype is None:
        compute_dtype = getattr(comfy.model_management, "lora_compute_dtype", lambda _: torch.float32)(device)
    value = comfy.model_management.cast_to_device(value, device, compute_dtype, copy=True)
    if convert is not None:
        value = convert(value, inplace=True)
    value = comfy.lora.calculate_weight(patcher.patches[key], value, key)
    if set_weight is not None:  # of a quantised layer
        return set_weight(value, seed=_string_to_seed(key), return_weight=True)
    return comfy.float.stochastic_rounding(value, dtype, seed=_string_to_seed(key))


def _takes_patches(patcher: ModelPatcher, key: str) -> bool:
    """Whether the host applies patches to the weight ``key``: not where other modules with weights are within its module."""
    owner = patcher.model.get_submodule(key.rpartition(".")[0])
    return all(next(child.parameters(), None) is None for child in owner.children())


def unpatched(patcher: ModelPatcher, key: str, live: torch.Tensor) -> torch.Tensor:
    """The weight ``key`` without patches; where the host has loaded it with patches, this is not the ``live`` one."""
    if key in patcher.hook_backup:
        return patcher.hook_backup[key][0]
    return patcher.backup[key].weight if key in patcher.backup else live


def originals_of(patcher: ModelPatcher) -> dict[str, torch.Tensor]:
    """The diffusion model's original weights, by name, where the host has loaded patched ones, of ``patcher`` or a clone."""
    return {key.removeprefix(PREFIX): kept.weight for key, kept in patcher.backup.items() if key.startswith(PREFIX)}


def loaded_as_patched(patcher: ModelPatcher, key: str) -> bool:
    """Whether the host has loaded the weight ``key`` with the patches of ``patcher``: then its current value counts."""
    dynamic = getattr(patcher, "is_dynamic", bool)()  # not in 0.3
    return key in patcher.backup and not dynamic and patcher.model.current_weight_patches_uuid == patcher.patches_uuid


def reshaped(patcher: ModelPatcher) -> list[str]:
    """Names of the weights whose shape a patch changes, such as a LoRA with inputs of its own."""
    shape_of = getattr(comfy.lora, "calculate_shape", None)  # not in 0.3
    if shape_of is None:
        return []
    live = dict(tensors_of(patcher.model.diffusion_model))

    def shapes(name: str) -> set[tuple[int, ...]]:
        key = PREFIX + name
        weight = unpatched(patcher, key, live[name])
        return {tuple(weight.shape), tuple(shape_of(patcher.patches[key], weight, key))}

    return [name for name in patches_of(patcher) if name in live and len(shapes(name)) > 1]


def _filled(weight: torch.Tensor) -> torch.Tensor:
    """``weight``, or zeros where the checkpoint does not have it, as in the host."""
    return torch.zeros(weight.shape, dtype=weight.dtype) if weight.is_meta else weight
