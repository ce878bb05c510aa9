"""ComfyUI's networks together with ControlNets, whose blocks are further ones of theirs.

See :mod:`asyncdiff_nodes.host.controlnet.network`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.planning.family import Family
from asyncdiff_nodes.models.network import Network
from asyncdiff_nodes.models.stack import meta, stacked

from . import transformers, unet

Call = dict[str, Any]  # of a ControlNet, beside what all of them are given


def _controlled(
    family: Family, net_blocks: Callable[[Network], list[str]], call: Callable[[Network, torch.Tensor, dict[str, Any]], Call]
) -> Family:
    """``family`` with ControlNets.

    Args:
        net_blocks: of each ControlNet.
        call: ``(net, x, kwargs of the network)`` -> a call of a ControlNet.
    """

    def block_names(network: Network) -> list[str]:
        own = [f"control_nets.{slot}.{name}" for slot, net in enumerate(network.control_nets) for name in net_blocks(net)]
        return [*family.block_names(network), *own]

    def example_inputs(network: Network, *args: Any) -> Arguments:
        assert family.example_inputs is not None, "these families are listed with some"
        (x, timestep), kwargs = family.example_inputs(network, *args)
        common = {"merge": {"strength": 1.0}, "context": kwargs["context"]}
        nets = {slot: {**common, **call(net, x, kwargs)} for slot, net in enumerate(network.control_nets)}
        return (x, timestep), {**kwargs, "nets": nets}

    name = f"{family.name} with ControlNets"
    return replace(family, name=name, block_names=block_names, example_inputs=example_inputs)


def _unet_net_blocks(net: Network) -> list[str]:
    """List the layers of the UNet that it is a copy of, one that reads the hint, and one for each residual."""
    return [*unet.layers_of(net, "input_blocks", "zero_convs"), "input_hint_block", "middle_block_out"]


def _unet_net_call(net: Network, x: torch.Tensor, given: dict[str, Any]) -> Call:
    hint = _hint(x, next(net.input_hint_block.parameters()).shape[1], 8)
    return {"channels": net.in_channels, "hint": hint, **({"y": given["y"]} if net.num_classes is not None else {})}


def _flux_net_blocks(net: Network) -> list[str]:
    """List those of a FLUX.1 without a head, those that read the hint, and one for each residual."""
    readers = [name for name in ("input_hint_block", "input_cond_block") if hasattr(net, name)]
    return [*readers, *_FLUX_NET_BLOCKS(net)]


def _flux_net_call(net: Network, x: torch.Tensor, given: dict[str, Any]) -> Call:
    patch = net.patch_size**2
    hint = _hint(x, net.pos_embed_input.weight.shape[1] // patch, 1) if net.latent_input else _hint(x, 3, 8)
    return {"channels": net.in_channels // patch, "hint": hint, "y": given["y"], "guidance": meta(len(x), dtype=x.dtype)}


def _sd3_net_call(net: Network, x: torch.Tensor, given: dict[str, Any]) -> Call:
    hint = _hint(x, net.pos_embed_input.proj.weight.shape[1], 1)
    return {"channels": net.in_channels, "hint": hint, "y": given["y"]}


def _qwen_net_call(net: Network, x: torch.Tensor, _: dict[str, Any]) -> Call:
    patch = net.patch_size**2
    return {"channels": net.in_channels // patch, "hint": _hint(x, net.controlnet_x_embedder.weight.shape[1] // patch, 1)}


def _hint(x: torch.Tensor, channels: int, scale: int) -> torch.Tensor:
    """[1, channels, (F,) scale h, scale w] for a sample ``x`` [B, C, (F,) h, w]."""
    *frames, height, width = x.shape[2:]
    return meta(1, channels, *frames, scale * height, scale * width, dtype=x.dtype)


_FLUX_NET_BLOCKS = stacked(
    ("img_in", "txt_in", "pos_embed_input"),
    ("double_blocks", "single_blocks", "controlnet_blocks", "controlnet_single_blocks"),
    (),
)
_SD3_NET_BLOCKS = stacked(("x_embedder", "context_embedder", "pos_embed_input"), ("joint_blocks", "controlnet_blocks"), ())
_QWEN_NET_BLOCKS = stacked(
    ("img_in", "txt_norm", "txt_in", "controlnet_x_embedder"), ("transformer_blocks", "controlnet_blocks"), ()
)

FLUX = _controlled(transformers.FLUX, _flux_net_blocks, _flux_net_call)
QWEN_IMAGE = _controlled(transformers.QWEN_IMAGE, _QWEN_NET_BLOCKS, _qwen_net_call)
SD3 = _controlled(transformers.SD3, _SD3_NET_BLOCKS, _sd3_net_call)
UNET = _controlled(unet.FAMILY, _unet_net_blocks, _unet_net_call)
