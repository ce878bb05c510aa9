"""Configurations of ControlNets' networks, read from the networks, since the host keeps none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from comfy.cldm import cldm, mmdit
from comfy.ldm.flux.controlnet import ControlNetFlux
from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel
from torch import nn

from .network import ControlNetOnMeta


def on_meta(net: nn.Module, config: dict[str, Any], operations: type) -> nn.Module:
    """Build the network ``net`` again on the meta device, with layers of ``operations``.

    Args:
        config: the configuration of the network that it is a copy of; differences are read from ``net`` itself.

    Raises:
        Exception: any error; it shows that ``net`` is built in another way.
    """
    own = {**_OWN[type(net)](net, config), "dtype": net.dtype, "device": "meta", "operations": operations}
    return ControlNetOnMeta(own) if type(net) is cldm.ControlNet else type(net)(**own).requires_grad_(False).eval()


def _of_unet(net: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in config.items() if key != "out_channels"}
    own |= {"in_channels": _reads(net, "input_blocks.0.0"), "hint_channels": _reads(net, "input_hint_block.0")}
    if net.control_add_embedding is not None:
        own["union_controlnet_num_control_type"] = net.num_control_type
    return own


def _of_flux(net: nn.Module, _: dict[str, Any]) -> dict[str, Any]:
    kinds = {name: getattr(net, name) for name in ("latent_input", "num_union_modes", "mistoline")}
    patch = net.patch_size**2
    return {**dataclasses.asdict(net.params), **kinds, "control_latent_channels": _reads(net, "pos_embed_input") // patch}


def _of_sd3(net: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "num_blocks": len(net.joint_blocks), "control_latent_channels": _reads(net, "pos_embed_input.proj")}


def _of_qwen_image(net: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    more = _reads(net, "controlnet_x_embedder") - net.in_channels
    return {**config, "num_layers": len(net.transformer_blocks), "extra_condition_channels": more}


def _reads(net: nn.Module, layer: str) -> int:
    """Number of channels that the layer of this name reads."""
    return net.get_submodule(layer).weight.shape[1]


_OWN: dict[type[nn.Module], Callable[[nn.Module, dict[str, Any]], dict[str, Any]]] = {
    cldm.ControlNet: _of_unet,
    ControlNetFlux: _of_flux,
    mmdit.ControlNet: _of_sd3,
    QwenImageControlNetModel: _of_qwen_image,
}
