"""ComfyUI's UNets with motion models of AnimateDiff, whose modules are further blocks.

See :mod:`asyncdiff_nodes.host.patches.animatediff.network`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.models.network import Network

from . import unet


def block_names(net: Network) -> list[str]:
    """List those of the UNet, and every motion module."""
    return [*unet.block_names(net), *(name for names in net.places.values() for name in names)]


def example_inputs(net: Network, size: Any = None, batch: int = 2) -> Arguments:
    """Make those of the UNet. The batch are the frames of two videos."""
    args, kwargs = unet.example_inputs(net, size, batch)
    frames = batch // 2
    return args, {**kwargs, "motion": {"frames": frames, "length": frames, "window": None, "changed": {}}}


FAMILY = replace(unet.FAMILY, name="UNetModel with AnimateDiff", block_names=block_names, example_inputs=example_inputs)
