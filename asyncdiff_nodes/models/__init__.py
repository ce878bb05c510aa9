"""Families whose blocks are listed: package and class -> list. Of all others, blocks are found in their first call."""

from asyncdiff_nodes.engine.planning.family import Family
from asyncdiff_nodes.models.comfy import control_nets, unet
from asyncdiff_nodes.models.comfy import motion as comfy_motion
from asyncdiff_nodes.models.diffusers import motion, svd, unet2d

FAMILIES: dict[str, Family] = {
    "asyncdiff_nodes.AnimatedUNet": comfy_motion.FAMILY,
    "asyncdiff_nodes.ControlledUNet": control_nets.UNET,
    "asyncdiff_nodes.DemoUNet": unet.FAMILY,
    "comfy.UNetModel": unet.FAMILY,
    "diffusers.UNet2DConditionModel": unet2d.FAMILY,
    "diffusers.UNetMotionModel": motion.FAMILY,
    "diffusers.UNetSpatioTemporalConditionModel": svd.FAMILY,
}
