"""The weights of a loaded model as its ranks must have them: every LoRA and other weight patch applied, one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from asyncdiff_nodes.engine import UnsupportedModelError
from asyncdiff_nodes.engine.graph import tensors_of

PREFIX = "diffusion_model."
_string_to_seed = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed  # moved after 0.3


def net_prefix(slot: int) -> str:
    """Of the names of the weights of a ControlNet; see :class:`~.controlled.ControlledUNet`."""
    return f"control_nets.{slot}."


def patched_names(patcher: ModelPatcher) -> frozenset[str]:
    """Names, without prefix, of the diffusion model's weights that carry a patch."""
    return frozenset(key.removeprefix(PREFIX) for key in patcher.patches if key.startswith(PREFIX))


def weights_of(
    patcher: ModelPatcher,
    skeleton: nn.Module,
    names: Collection[str] | None = None,
    nets: Sequence[nn.Module | None] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every parameter and buffer of the diffusion model, or of those in ``names``.

    The values are what the host would have loaded: patches are applied on its device and in its precision, then rounded to the
    weight's dtype. Nothing of the model is changed, whether it is loaded or not.

    Args:
        nets: networks of the ControlNets in ``skeleton``; None for one that is gone, so that no call can ask for it.

    Raises:
        UnsupportedModelError: a weight that is not a plain tensor (quantised), or that a patch would reshape.
    """
    device = patcher.load_device
    compute_dtype = getattr(comfy.model_management, "lora_compute_dtype", lambda _: torch.float32)(device)
    patches = patcher.get_key_patches(PREFIX)
    live = dict(tensors_of(patcher.model.diffusion_model))
    for slot, net in enumerate(nets):
        live |= {net_prefix(slot) + name: tensor for name, tensor in tensors_of(net or skeleton.control_nets[slot])}
    for name, meta in tensors_of(skeleton):
        if names is not None and name not in names:
            continue
        key = PREFIX + name
        # buffers that the state dict leaves out have no patches
        (value, convert), *changes = patches.get(key) or [(live[name], lambda weight, **_: weight)]
        if type(value) not in (torch.Tensor, nn.Parameter):
            raise UnsupportedModelError(f"its weight {name} is a {type(value).__name__}: quantised weights cannot be split")
        if value.is_meta:  # a checkpoint without it: the host, too, takes zeros
            value = torch.zeros(value.shape, dtype=value.dtype)
        if changes:
            dtype = value.dtype
            value = comfy.model_management.cast_to_device(value, device, compute_dtype, copy=True)
            value = comfy.lora.calculate_weight(changes, convert(value, inplace=True), key)
            value = comfy.float.stochastic_rounding(value, dtype, seed=_string_to_seed(key))
        if value.shape != meta.shape:
            raise UnsupportedModelError(f"a patch changes the shape of its weight {name} to {tuple(value.shape)}")
        yield name, value.detach().to(meta.dtype)
