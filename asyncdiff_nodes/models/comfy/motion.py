"""ComfyUI's UNets with motion models of AnimateDiff, whose modules are further blocks.

See :mod:`asyncdiff_nodes.host.patches.animatediff.network`.
"""

from __future__ import annotations

from dataclasses import replace

from asyncdiff_nodes.models.network import Network

from . import unet


def block_names(net: Network) -> list[str]:
    """List those of the UNet, and every motion module."""
    return [*unet.block_names(net), *(name for names in net.places.values() for name in names)]


FAMILY = replace(unet.FAMILY, name="UNetModel with AnimateDiff", block_names=block_names, example_inputs=None)
