"""Small models of each family that the host builds from its ``UNetModel``, with random weights and the host's own classes."""

from __future__ import annotations

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch
from comfy.model_base import ModelType

_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}
_SD2 = {"context_dim": 1024, "use_linear_in_transformer": True}
_SDXL = {"context_dim": 2048, "use_linear_in_transformer": True, "transformer_depth": [0, 2], "num_classes": "sequential"}
_SDXL |= {"transformer_depth_output": [0, 0, 2, 3], "transformer_depth_middle": 3}  # 3: placed layer by layer
_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64, "hidden_size": 64,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 3, "depth_single_blocks": 4, "axes_dim": [8, 12, 12], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [], "context_dim": 64,
}  # fmt: skip
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 96, "ffn_dim": 128, "num_heads": 2, "num_layers": 5, "in_dim": 16,
    "out_dim": 16, "text_dim": 64, "freq_dim": 64, "context_dim": 64,
}  # fmt: skip
# kind: the host's configuration class, its BaseModel class, model type, and what differs in the network
KINDS = {
    "sd15": ("SD15", "BaseModel", ModelType.EPS, {"context_dim": 768}),
    "sd15_inpaint": ("SD15", "BaseModel", ModelType.EPS, {"context_dim": 768, "in_channels": 9}),
    "sd2_v": ("SD20", "BaseModel", ModelType.V_PREDICTION, _SD2),
    "sdxl": ("SDXL", "SDXL", ModelType.EPS, {**_SDXL, "adm_in_channels": 2816}),
    "sdxl_refiner": ("SDXLRefiner", "SDXLRefiner", ModelType.EPS, {**_SDXL, "adm_in_channels": 2560, "context_dim": 1280}),
}

TRANSFORMERS = {
    "flux": ("Flux", "Flux", ModelType.FLUX, _FLUX),
    "wan": ("WAN21_T2V", "WAN21", ModelType.FLOW, _WAN),
}


def unet_config(kind: str, channels: int = 64) -> dict:
    """Configuration of the network of this kind, ``channels`` wide."""
    if kind in TRANSFORMERS:
        return {name: value for name, value in TRANSFORMERS[kind][3].items() if name != "context_dim"}
    return {**_UNET, "adm_in_channels": None, **KINDS[kind][3], "model_channels": channels}


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Random weights, small enough for a network to stay finite and large enough for every one to matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def model(
    kind: str = "sd15", seed: int = 0, dtype: torch.dtype = torch.float32, channels: int = 64
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL."""
    config_class, model_class, model_type, _ = (KINDS | TRANSFORMERS)[kind]
    config = getattr(comfy.supported_models, config_class)(unet_config(kind, channels))
    config.set_inference_dtype(dtype, None if dtype is torch.float32 else torch.float32)
    base = getattr(comfy.model_base, model_class)(config, model_type=model_type)
    if kind == "sd15_inpaint":
        base.set_inpaint()
    randomise(base.diffusion_model, seed)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(base.eval(), device, torch.device("cpu"))


def conditioning(kind: str = "sd15", seed: int = 1, tokens: int = 77) -> list:
    """A CONDITIONING."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, (KINDS | TRANSFORMERS)[kind][3]["context_dim"], generator=generator)
    return [[context, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def latent(batch: int = 1, height: int = 16, width: int = 16, seed: int = 2, kind: str = "sd15") -> dict:
    """A LATENT that is not empty."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"flux": (16,), "wan": (16, 3)}.get(kind, (4,))
    return {"samples": torch.randn(batch, *shape, height, width, generator=generator)}


def control_net(seed: int = 3) -> comfy.controlnet.ControlNet:
    """A CONTROL_NET for ``sd15``."""
    config = {key: value for key, value in unet_config("sd15").items() if key not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, num_heads=8, dtype=torch.float32)
    randomise(network, seed)
    device = comfy.model_management.get_torch_device()
    return comfy.controlnet.ControlNet(network.eval(), load_device=device, compression_ratio=8)


def lora(patcher: comfy.model_patcher.ModelPatcher, seed: int = 4) -> dict:
    """The state dict of a LoRA of rank 4 on attention projections and resnet convolutions of ``patcher``."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in patcher.model.diffusion_model.named_parameters():
        if name.endswith((".to_q.weight", ".to_v.weight", "in_layers.2.weight", "attn.qkv.weight", "self_attn.q.weight")):
            key = f"diffusion_model.{name.removesuffix('.weight')}"
            down = torch.randn(4, weight[0].numel(), generator=generator) * 0.1
            found[f"{key}.lora_down.weight"] = down.reshape(4, *weight.shape[1:])
            found[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 4, *[1] * (weight.ndim - 2), generator=generator) * 0.1
            found[f"{key}.alpha"] = torch.tensor(4.0)
    return found


def node(cls: type, *args: object) -> object:
    """The first output of a node, of either of the host's kinds."""
    if hasattr(cls, "define_schema"):
        output = cls.execute(*args)
        return getattr(output, "result", output)[0]
    return getattr(cls(), cls.FUNCTION)(*args)[0]
