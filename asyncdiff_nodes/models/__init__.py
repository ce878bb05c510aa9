"""The table of model families: package and class -> block list. A new architecture is one module and one row here."""

from asyncdiff_nodes.engine.planning.family import Family
from asyncdiff_nodes.models.comfy import control_nets, unet
from asyncdiff_nodes.models.comfy import motion as comfy_motion
from asyncdiff_nodes.models.diffusers import flux, hunyuan_video, ltx_video, motion, pixart, qwen_image, sd3, svd, unet2d, wan

FAMILIES: dict[str, Family] = {
    "asyncdiff_nodes.AnimatedUNet": comfy_motion.FAMILY,
    "asyncdiff_nodes.ControlledUNet": control_nets.UNET,
    "asyncdiff_nodes.DemoUNet": unet.FAMILY,
    "comfy.UNetModel": unet.FAMILY,
    "diffusers.FluxTransformer2DModel": flux.FAMILY,
    "diffusers.HunyuanVideoTransformer3DModel": hunyuan_video.FAMILY,
    "diffusers.LTXVideoTransformer3DModel": ltx_video.FAMILY,
    "diffusers.PixArtTransformer2DModel": pixart.FAMILY,
    "diffusers.QwenImageTransformer2DModel": qwen_image.FAMILY,
    "diffusers.SD3Transformer2DModel": sd3.FAMILY,
    "diffusers.UNet2DConditionModel": unet2d.FAMILY,
    "diffusers.UNetMotionModel": motion.FAMILY,
    "diffusers.UNetSpatioTemporalConditionModel": svd.FAMILY,
    "diffusers.WanTransformer3DModel": wan.FAMILY,
}
