"""Small models of each family that this pack routes, with random weights and the host's own classes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import comfy.cldm.cldm
import comfy.cldm.mmdit
import comfy.controlnet
import comfy.latent_formats
import comfy.ldm.flux.controlnet
import comfy.ldm.qwen_image.controlnet
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.hunyuan_video.model import HunyuanVideoParams
from comfy.model_base import ModelType
from comfy.taesd.taesd import TAESD
from comfy_extras import nodes_custom_sampler

_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}
_SD2 = {"model_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True}  # 64: one attention head
_SDXL = {"context_dim": 2048, "use_linear_in_transformer": True, "transformer_depth": [0, 2], "num_classes": "sequential"}
_SDXL |= {"transformer_depth_output": [0, 0, 2, 3], "transformer_depth_middle": 3}  # 3: placed layer by layer
_SVD = {
    "model_channels": 64, "in_channels": 8, "context_dim": 64, "adm_in_channels": 768, "num_classes": "sequential",
    "use_linear_in_transformer": True, "use_temporal_resblock": True, "use_temporal_attention": True,
    "extra_ff_mix_layer": True, "num_head_channels": 32, "use_spatial_context": True, "merge_strategy": "learned_with_images",
    "merge_factor": 0.0, "video_kernel_size": [3, 1, 1], "disable_temporal_crossattention": False, "max_ddpm_temb_period": 10000,
}  # fmt: skip
# without attention in the middle, without any middle block, and with a prompt for each layer of its noise
_VEGA = {**_SDXL, "adm_in_channels": 2816, "transformer_depth_output": [0, 0, 2, 2], "transformer_depth_middle": -1}
_KOALA = {**_SDXL, "adm_in_channels": 2816, "transformer_depth_middle": -2}
_SSD = {**_SDXL, "adm_in_channels": 2816, "transformer_depth_output": [0, 0, 1, 4], "transformer_depth_middle": -1}
_X4 = {**_SD2, "in_channels": 7, "num_classes": 1000, "num_res_blocks": [1] * 4, "channel_mult": (1, 1, 2, 2)}
_X4 |= {"transformer_depth": [0, 1, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 1, 1, 1, 1]}
_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64, "hidden_size": 64,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 3, "depth_single_blocks": 4, "axes_dim": [8, 12, 12], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [], "context_dim": 64,
}  # fmt: skip
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 96, "ffn_dim": 128, "num_heads": 2, "num_layers": 5, "in_dim": 16,
    "out_dim": 16, "text_dim": 64, "freq_dim": 64, "context_dim": 64,
}  # fmt: skip
_HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 32,
    "context_in_dim": 64, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 3, "depth_single_blocks": 4,
    "axes_dim": [8, 12, 12], "theta": 256, "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False,
    "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False, "context_dim": 64,
}  # fmt: skip
_LTXV = {
    "image_model": "ltxv", "in_channels": 16, "cross_attention_dim": 64, "attention_head_dim": 32, "num_attention_heads": 2,
    "caption_channels": 48, "num_layers": 5, "context_dim": 48,
}  # fmt: skip
_LUMINA = {
    "image_model": "lumina2", "in_channels": 16, "dim": 96, "n_layers": 5, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "multiple_of": 32, "ffn_dim_multiplier": 1.0, "qk_norm": True, "cap_feat_dim": 64, "axes_dims": [16, 16, 16],
    "axes_lens": [300, 512, 512], "context_dim": 64,
}  # fmt: skip
_Z_IMAGE = {**_LUMINA, "dim": 256, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24]}
_Z_IMAGE |= {"z_image_modulation": True, "pad_tokens_multiple": 32, "time_scale": 1000.0}
_QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "num_layers": 5, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 64, "axes_dims_rope": [8, 12, 12], "context_dim": 64,
}  # fmt: skip
_SD3 = {
    "in_channels": 16, "patch_size": 2, "depth": 4, "adm_in_channels": 1280, "num_patches": 1024, "pos_embed_max_size": 32,
    "pos_embed_scaling_factor": None, "input_size": None, "qk_norm": "rms", "x_block_self_attn_layers": [0],
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 256}},
    "context_dim": 64,
}  # fmt: skip
# kind: the host's configuration class, its BaseModel class, model type, and what differs in the network
KINDS = {
    "sd15": ("SD15", "BaseModel", ModelType.EPS, {"context_dim": 768}),
    "sd15_inpaint": ("SD15", "BaseModel", ModelType.EPS, {"context_dim": 768, "in_channels": 9}),
    "sd2_v": ("SD20", "BaseModel", ModelType.V_PREDICTION, _SD2),
    "sdxl": ("SDXL", "SDXL", ModelType.EPS, {**_SDXL, "adm_in_channels": 2816}),
    "sdxl_refiner": ("SDXLRefiner", "SDXLRefiner", ModelType.EPS, {**_SDXL, "adm_in_channels": 2560, "context_dim": 1280}),
}
VARIANTS = {
    "koala": ("KOALA_700M", "SDXL", ModelType.EPS, _KOALA),
    "playground": ("SDXL", "SDXL", ModelType.EDM, {**_SDXL, "adm_in_channels": 2816}),
    "sdxl_inpaint": ("SDXL", "SDXL", ModelType.EPS, {**_SDXL, "adm_in_channels": 2816, "in_channels": 9}),
    "ssd_1b": ("SSD1B", "SDXL", ModelType.EPS, _SSD),
    "svd": ("SVD_img2vid", "SVD_img2vid", ModelType.V_PREDICTION_EDM, _SVD),
    "vega": ("Segmind_Vega", "SDXL", ModelType.EPS, _VEGA),
    "x4_upscaler": ("SD_X4Upscaler", "SD_X4Upscaler", ModelType.V_PREDICTION, _X4),
}
TRANSFORMERS = {
    "flux": ("Flux", "Flux", ModelType.FLUX, _FLUX),
    "hunyuan_video": ("HunyuanVideo", "HunyuanVideo", ModelType.FLOW, _HUNYUAN),
    "ltxv": ("LTXV", "LTXV", ModelType.FLUX, _LTXV),
    "lumina2": ("Lumina2", "Lumina2", ModelType.FLOW, _LUMINA),
    "qwen_image": ("QwenImage", "QwenImage", ModelType.FLUX, _QWEN),
    "sd3": ("SD3", "SD3", ModelType.FLOW, _SD3),
    "wan": ("WAN21_T2V", "WAN21", ModelType.FLOW, _WAN),
    "wan_i2v": ("WAN21_I2V", "WAN21", ModelType.FLOW, {**_WAN, "model_type": "i2v", "in_dim": 36}),
    "z_image": ("ZImage", "Lumina2", ModelType.FLOW, _Z_IMAGE),
}
_LATENTS = {
    "wan": (16, 3),
    "wan_i2v": (16, 3),
    "hunyuan_video": (16, 3),
    "ltxv": (16, 3),
    "qwen_image": (16, 1),
}  # channels and frames


ALL = KINDS | VARIANTS | TRANSFORMERS


def unet_config(kind: str, channels: int = 32) -> dict:
    """Configuration of the network of this kind, ``channels`` wide if it can be."""
    if kind in TRANSFORMERS:
        known = {"flux": FluxParams, "hunyuan_video": HunyuanVideoParams}.get(kind)  # older hosts know less
        names = known and {"image_model", *(field.name for field in dataclasses.fields(known))}
        config = TRANSFORMERS[kind][3].items()
        return {name: value for name, value in config if name != "context_dim" and (names is None or name in names)}
    return {**_UNET, "model_channels": channels, "adm_in_channels": None, **ALL[kind][3]}


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Random weights, small enough for a network to stay finite and large enough for every one to matter."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)


def model(
    kind: str = "sd15",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    channels: int = 32,
    compute: torch.dtype = torch.float32,
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL."""
    config_class, model_class, model_type, _ = ALL[kind]
    config = getattr(comfy.supported_models, config_class)(unet_config(kind, channels))
    config.set_inference_dtype(dtype, None if dtype is compute else compute)
    video = {"image_to_video": True} if kind == "wan_i2v" else {}
    base = getattr(comfy.model_base, model_class)(config, model_type=model_type, **video)
    if kind.endswith("inpaint"):
        base.set_inpaint()
    randomise(base.diffusion_model, seed)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(base.eval(), device, torch.device("cpu"))


def attentive(kind: str = "sd15") -> comfy.model_patcher.ModelPatcher:
    """A MODEL that attends to some places more than to others, and whose pictures show it."""
    made = model(kind)
    for name, weight in made.model.diffusion_model.named_parameters():
        if "attn1" in name:
            weight.data *= 30
    return made


def conditioning(kind: str = "sd15", seed: int = 1, tokens: int = 77, width: int | None = None) -> list:
    """A CONDITIONING, of another ``width`` than the small model's if given."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, width or ALL[kind][3]["context_dim"], generator=generator)
    extras = {"pooled_output": torch.randn(1, 1280, generator=generator)}
    if kind == "ltxv":
        extras["attention_mask"] = (torch.arange(tokens) < tokens - 3 * seed).long()[None]
    elif kind == "svd":
        extras |= {"concat_latent_image": torch.randn(1, 4, 16, 16, generator=generator), "motion_bucket_id": 40 * seed}
    elif kind == "wan_i2v":
        seen = torch.randn(1, 5, 1280, generator=generator)
        extras |= {"concat_latent_image": torch.randn(1, 16, 3, 16, 16, generator=generator)}
        extras |= {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=seen)}
    elif kind == "x4_upscaler":
        extras |= {"concat_image": torch.randn(1, 3, 16, 16, generator=generator), "noise_augmentation": 0.1 * seed}
    return [[context, extras]]


def latent(batch: int = 1, height: int = 16, width: int = 16, seed: int = 2, kind: str = "sd15") -> dict:
    """A LATENT that is not empty."""
    generator = torch.Generator().manual_seed(seed)
    shape = _LATENTS.get(kind, (16,) if kind in TRANSFORMERS else (4,))
    return {"samples": torch.randn(batch, *shape, height, width, generator=generator)}


def control_net(
    kind: str = "sd15",
    seed: int = 3,
    channels: int = 32,
    union: int | None = None,
    dtype: torch.dtype = torch.float32,
    **others: object,
) -> comfy.controlnet.ControlNet:
    """A CONTROL_NET for models of this kind, or a ``union`` of so many types of control; see :func:`hint`.

    FLUX.1's unions read a latent of four channels, as :func:`vae` encodes it, and a mask. ``others`` are of the network's class.
    """
    config, device = unet_config(kind, channels), comfy.model_management.get_torch_device()
    cast = None if dtype is torch.float32 else torch.float32
    made = {"dtype": dtype, "operations": comfy.ops.manual_cast if cast else comfy.ops.disable_weight_init, **others}
    if kind == "flux":
        network_class, options = comfy.ldm.flux.controlnet.ControlNetFlux, {"extra_conds": ["y", "guidance"]}
        if union:
            made |= {"latent_input": True, "num_union_modes": union, "control_latent_channels": 5}
            options |= {"compression_ratio": 1, "latent_format": comfy.latent_formats.Flux(), "concat_mask": True}
    elif kind == "qwen_image":
        network_class, options = comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel, {"compression_ratio": 1}
        made |= {"num_layers": 2}
    elif kind == "sd3":
        network_class, options = comfy.cldm.mmdit.ControlNet, {"compression_ratio": 1}
        made |= {"num_blocks": 2}
    else:
        config = {key: value for key, value in config.items() if key not in ("out_channels", "transformer_depth_output")}
        config |= getattr(comfy.supported_models, ALL[kind][0]).unet_extra_config  # its attention heads
        network_class, options = comfy.cldm.cldm.ControlNet, {}
        made |= {"hint_channels": 3, "union_controlnet_num_control_type": union}
    network = network_class(**config | made)
    randomise(network, seed)
    return comfy.controlnet.ControlNet(network.eval(), load_device=device, manual_cast_dtype=cast, **options)


def hint(kind: str = "sd15", seed: int = 1) -> torch.Tensor:
    """An IMAGE to control by; for SD 3 and Qwen-Image a latent, as their VAEs would make of one."""
    shape = {"sd3": (16, 16, 16), "qwen_image": (1, 16, 16, 16)}.get(kind, (128, 128, 3))
    return torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed))


def vae(seed: int = 8) -> comfy.sd.VAE:
    """A VAE of four channels, the host's smallest."""
    network = TAESD()
    randomise(network, seed)
    return comfy.sd.VAE(sd=network.state_dict())


def lora(patcher: comfy.model_patcher.ModelPatcher, seed: int = 4) -> dict:
    """The state dict of a LoRA of rank 4 on attention projections and resnet convolutions of ``patcher``."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in patcher.model.diffusion_model.named_parameters():
        if name.endswith(
            (
                ".to_q.weight",
                ".to_v.weight",
                "in_layers.2.weight",
                "attn.qkv.weight",
                "attention.qkv.weight",
                "self_attn.q.weight",
            )
        ):
            key = f"diffusion_model.{name.removesuffix('.weight')}"
            down = torch.randn(4, weight[0].numel(), generator=generator) * 0.1
            found[f"{key}.lora_down.weight"] = down.reshape(4, *weight.shape[1:])
            found[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 4, *[1] * (weight.ndim - 2), generator=generator) * 0.1
            found[f"{key}.alpha"] = torch.tensor(4.0)
    return found


def custom_sample(
    model: comfy.model_patcher.ModelPatcher,
    prompts: tuple[list, list],
    sampler: object,
    steps: int = 4,
    scheduler: str = "normal",
    start: dict | None = None,
) -> torch.Tensor:
    """What SamplerCustom makes of a LATENT at CFG 1; ``sampler`` is a name, or a function that samples."""
    made = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else comfy.samplers.KSAMPLER(sampler)
    sigmas = node(nodes_custom_sampler.BasicScheduler, model, scheduler, steps, 1.0)
    return node(nodes_custom_sampler.SamplerCustom, model, True, 1, 1.0, *prompts, made, sigmas, start or latent())["samples"]


def node(cls: type, *args: object, **kwargs: object) -> object:
    """The first output of a node, of either of the host's kinds."""
    if hasattr(cls, "define_schema"):
        output = cls.execute(*args, **kwargs)
        return getattr(output, "result", output)[0]
    return getattr(cls(), cls.FUNCTION)(*args, **kwargs)[0]
