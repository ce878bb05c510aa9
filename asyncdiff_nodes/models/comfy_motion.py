"""ComfyUI's UNets with motion models of AnimateDiff, whose modules are further blocks.

See :mod:`asyncdiff_nodes.host.animated`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from asyncdiff_nodes.engine.batch import Arguments

from . import comfy_unet


def block_names(unet: nn.Module) -> list[str]:
    """Those of the UNet, and every motion module."""
    return [*comfy_unet.block_names(unet), *(name for names in unet.places.values() for name in names)]


def example_inputs(unet: nn.Module, size: Any = None, batch: int = 2) -> Arguments:
    """Those of the UNet. The batch are the frames of two videos."""
    args, kwargs = comfy_unet.example_inputs(unet, size, batch)
    frames = batch // 2
    return args, {**kwargs, "motion": {"frames": frames, "length": frames, "window": None, "changed": {}}}


FAMILY = replace(comfy_unet.FAMILY, name="UNetModel with AnimateDiff", block_names=block_names, example_inputs=example_inputs)
