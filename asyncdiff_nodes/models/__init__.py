"""The table of model families: package and class -> block list. A new architecture is one module and one row here."""

from asyncdiff_nodes.engine.family import Family

from . import (
    comfy_control_nets,
    comfy_motion,
    comfy_transformers,
    comfy_unet,
    flux,
    hunyuan_video,
    ltx_video,
    motion,
    pixart,
    qwen_image,
    sd3,
    svd,
    unet2d,
    wan,
)

FAMILIES: dict[str, Family] = {
    "asyncdiff_nodes.AnimatedUNet": comfy_motion.FAMILY,
    "asyncdiff_nodes.ControlledFlux": comfy_control_nets.FLUX,
    "asyncdiff_nodes.ControlledQwenImage": comfy_control_nets.QWEN_IMAGE,
    "asyncdiff_nodes.ControlledSD3": comfy_control_nets.SD3,
    "asyncdiff_nodes.ControlledUNet": comfy_control_nets.UNET,
    "asyncdiff_nodes.DemoUNet": comfy_unet.FAMILY,
    "asyncdiff_nodes.GuidedUNet": comfy_unet.FAMILY,
    "comfy.Flux": comfy_transformers.FLUX,
    "comfy.HunyuanVideo": comfy_transformers.HUNYUAN_VIDEO,
    "comfy.LTXVModel": comfy_transformers.LTXV,
    "comfy.NextDiT": comfy_transformers.LUMINA,
    "comfy.OpenAISignatureMMDITWrapper": comfy_transformers.SD3,
    "comfy.QwenImageTransformer2DModel": comfy_transformers.QWEN_IMAGE,
    "comfy.UNetModel": comfy_unet.FAMILY,
    "comfy.WanModel": comfy_transformers.WAN,
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
