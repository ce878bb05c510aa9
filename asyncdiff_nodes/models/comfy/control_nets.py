"""ComfyUI's UNets together with ControlNets, whose blocks are further ones of theirs.

See :mod:`asyncdiff_nodes.host.controlnet.network`.
"""

from __future__ import annotations

from dataclasses import replace

from asyncdiff_nodes.models.network import Network

from . import unet


def block_names(network: Network) -> list[str]:
    """List those of the UNet, and of each ControlNet."""
    nets = [f"control_nets.{slot}.{name}" for slot, net in enumerate(network.control_nets) for name in net_blocks(net)]
    return [*unet.block_names(network), *nets]


def net_blocks(net: Network) -> list[str]:
    """List the layers of the UNet that it is a copy of, one that reads the hint, and one for each residual."""
    return [*unet.layers_of(net, "input_blocks", "zero_convs"), "input_hint_block", "middle_block_out"]


UNET = replace(unet.FAMILY, name="UNetModel with ControlNets", block_names=block_names, example_inputs=None)
