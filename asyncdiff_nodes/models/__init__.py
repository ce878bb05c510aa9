"""The table of model families: class name -> block list. A new architecture is one module and one row here."""

from asyncdiff_nodes.engine.family import Family

from . import comfy_unet, pixart, unet2d

FAMILIES: dict[str, Family] = {
    "PixArtTransformer2DModel": pixart.FAMILY,
    "UNet2DConditionModel": unet2d.FAMILY,
    "UNetModel": comfy_unet.FAMILY,
}
