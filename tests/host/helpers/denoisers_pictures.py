"""Rows for ``denoisers.py``: what makes pictures, UNets and transformers, in latent or in pixel space."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.latent_formats
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams

from . import small


def _known(params: type, config: dict) -> dict:
    """What the host's own dataclass has: older ones lack some."""
    return {name: value for name, value in config.items() if name in params.__dataclass_fields__}


_FLUX = small.unet_config("flux")
_FLUX2 = {
    **_FLUX, "in_channels": 128, "out_channels": 128, "axes_dim": [8, 8, 8, 8], "theta": 2000, "global_modulation": True,
    "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "txt_ids_dims": [3], "patch_size": 1, "vec_in_dim": None,
    "default_ref_method": "index", "ref_index_scale": 10.0,
}  # fmt: skip
_CHROMA = {name: value for name, value in _FLUX.items() if name != "guidance_embed"}
_CHROMA |= {
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 96,
    "n_layers": 2,
    "vec_in_dim": None,
}
_RADIANCE = {
    **_CHROMA, "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 64, "nerf_mlp_ratio": 4,
    "nerf_depth": 2, "nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32, "use_x0": False, "use_sequential_txt_ids": False,
}  # fmt: skip
_CHROMA, _RADIANCE = _known(ChromaParams, _CHROMA), _known(ChromaRadianceParams, _RADIANCE)
_LENS = {"num_layers": 5, "num_attention_heads": 2, "axes_dims_rope": (8, 28, 28), "enc_hidden_dim": 16}
_Z_IMAGE = {**small.unet_config("z_image"), "patch_size": 2}
_Z_PIXELS = {**_Z_IMAGE, "in_channels": 3, "patch_size": 8, "decoder_in_channels": 192, "decoder_hidden_size": 64}
_PIXDIT = {"hidden_size": 64, "num_groups": 2, "pixel_attn_hidden_size": 64, "pixel_num_groups": 2, "patch_depth": 4}
_PIXDIT |= {"txt_embed_dim": 64, "patch_size": 8}
_HIDREAM = {
    "attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": [16, 8, 8], "caption_channels": [64, 64],
    "num_layers": 3, "num_single_layers": 4, "llama_layers": [0, 1, 2, 3, 3, 3, 3], "text_emb_dim": 64,
    "max_resolution": [128, 128], "in_channels": 16, "out_channels": 16, "patch_size": 2,
}  # fmt: skip
_HIDREAM_O1 = {  # its vocabulary must reach its special tokens
    "text_config_overrides": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 32, "vocab_size": 151937, "rope_dims": [8, 4, 4],
    },
    "vision_config_overrides": {"hidden_size": 64, "num_heads": 2, "depth": 2, "intermediate_size": 64},
}  # fmt: skip
_OMNIGEN2 = {
    "hidden_size": 96, "axes_dim_rope": [16, 16, 16], "axes_lens": [1024, 1664, 1664], "num_attention_heads": 2,
    "num_kv_heads": 1, "num_layers": 4, "text_feat_dim": 64, "multiple_of": 32, "timestep_scale": 1000.0,
}  # fmt: skip
_BOOGU = {
    "hidden_size": 96, "axes_dim_rope": (16, 16, 16), "num_attention_heads": 2, "num_kv_heads": 1, "num_layers": 4,
    "num_double_stream_layers": 2, "num_refiner_layers": 1, "instruction_feat_dim": 64, "multiple_of": 32,
}  # fmt: skip
_QWEN = small.unet_config("qwen_image")
_JOY = {"hidden_size": 64, "num_attention_heads": 2, "text_dim": 64, "num_layers": 4, "rope_dim_list": [8, 12, 12]}
_IDEOGRAM = {
    "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 32, "intermediate_size": 96, "adaln_dim": 64,
    "llm_features_dim": 64, "mrope_section": (6, 5, 5),
}  # fmt: skip
_KREA2 = {
    "features": 256, "tdim": 64, "txtdim": 64, "heads": 2, "kvheads": 1, "layers": 4, "txtlayers": 3, "txtheads": 2,
    "txtkvheads": 2,
}  # fmt: skip
_ERNIE = {"hidden_size": 64, "num_attention_heads": 2, "num_layers": 4, "ffn_hidden_size": 96, "text_in_dim": 48}
_HUNYUAN_IMAGE = {**small.unet_config("hunyuan_video"), "in_channels": 64, "out_channels": 64, "patch_size": [1, 1]}
_HUNYUAN_IMAGE |= {"vec_in_dim": None, "axes_dim": [16, 16], "byt5": True}
_REFINER = {**_HUNYUAN_IMAGE, "in_channels": 128, "patch_size": [1, 1, 1], "axes_dim": [8, 12, 12], "byt5": False}
_CASCADE = {"c_cond": 64}
_CASCADE_C = {**_CASCADE, "c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[2, 3], [3, 2]]}
_CASCADE_B = {**_CASCADE, "c_hidden": [32, 64, 64, 64], "nhead": [-1, -1, 2, 2], "blocks": [[1, 2, 2, 1], [1, 2, 2, 1]]}
_AURA = {"max_seq": 64, "dim": 64, "n_layers": 6, "n_double_layers": 2, "n_heads": 2, "global_conddim": 64, "cond_seq_dim": 64}
_PIXART = {"hidden_size": 64, "num_heads": 2, "depth": 4}
_LOTUS = {**small.unet_config("sd2_v"), "adm_in_channels": 4, "num_head_channels": 64}
# newer hosts make twice the channels, and half the frames, of what they are given
_REFINED = 32 if "process_in" in vars(comfy.latent_formats.HunyuanImage21Refiner) else 64


def _pooled(width: int):
    return lambda draw: {"pooled_output": draw(1, width)}


def _with_reference(*shape: int, **others):
    return lambda draw: {"reference_latents": [draw(1, *shape)], **others}


def _all_seen(tokens: int) -> dict:
    return {"attention_mask": torch.ones(1, tokens, dtype=torch.long)}


def _hunyuan_dit(draw) -> dict:
    return {
        "attention_mask": torch.ones(1, 77, dtype=torch.long),
        "conditioning_mt5xl": draw(1, 256, 2048),
        "attention_mask_mt5xl": torch.ones(1, 256, dtype=torch.long),
    }


def _hidream(draw) -> dict:
    return {"pooled_output": draw(1, 64), "conditioning_llama3": draw(1, 4, 20, 64)}


def _hidream_o1(draw) -> dict:
    time_token = torch.tensor([[151673]])  # the network puts its timestep there
    return {"text_input_ids": torch.cat([draw.ids(1000, 1, 19), time_token], dim=1)}


def _zero123_weights(draw) -> dict:
    return {"cc_projection.weight": draw(768, 772) * 0.03, "cc_projection.bias": draw(768)}


def _unclip(draw) -> dict:
    seen = SimpleNamespace(image_embeds=draw(1, 768))
    return {"unclip_conditioning": [{"clip_vision_output": seen, "strength": 1.0, "noise_augmentation": 0.1}]}


# name: the host's configuration class, its BaseModel class, what the tiny network's configuration sets, a latent's shape without
# its batch, tokens and width of a prompt, and a function that draws what else a CONDITIONING holds
ROWS = {
    "sd15": ("SD15", "BaseModel", small.unet_config("sd15"), (4, 16, 16), (77, 768)),
    "sd15_inpaint": ("SD15", "BaseModel", small.unet_config("sd15_inpaint"), (4, 16, 16), (77, 768),
                     lambda draw: {"concat_latent_image": draw(1, 4, 16, 16), "concat_mask": draw.mask(1, 1, 16, 16)}),
    "instruct_pix2pix": ("SD15_instructpix2pix", "SD15_instructpix2pix", {**small.unet_config("sd15"), "in_channels": 8},
                         (4, 16, 16), (77, 768), lambda draw: {"concat_latent_image": draw(1, 4, 16, 16)}),
    "zero123": ("Stable_Zero123", "Stable_Zero123", {**small.unet_config("sd15"), "in_channels": 8}, (4, 16, 16), (1, 772),
                lambda draw: {"concat_latent_image": draw(1, 4, 16, 16)}),
    "unclip": ("SD21UnclipL", "SD21UNCLIP", {**small.unet_config("sd2_v"), "adm_in_channels": 1536, "num_classes": "sequential"},
               (4, 16, 16), (77, 1024), _unclip),
    "lotus": ("LotusD", "Lotus", _LOTUS, (4, 16, 16), (77, 1024)),
    "sdxl": ("SDXL", "SDXL", small.unet_config("sdxl"), (4, 16, 16), (77, 2048), _pooled(1280)),
    "sdxl_refiner": ("SDXLRefiner", "SDXLRefiner", small.unet_config("sdxl_refiner"), (4, 16, 16), (77, 1280), _pooled(1280)),
    "sdxl_pix2pix": ("SDXL_instructpix2pix", "SDXL_instructpix2pix", {**small.unet_config("sdxl"), "in_channels": 8}, (4, 16, 16),
                     (77, 2048), lambda draw: {"pooled_output": draw(1, 1280), "concat_latent_image": draw(1, 4, 16, 16)}),
    "x4_upscaler": ("SD_X4Upscaler", "SD_X4Upscaler", small.unet_config("x4_upscaler"), (4, 16, 16), (77, 1024),
                    lambda draw: {"concat_image": draw(1, 3, 16, 16), "noise_augmentation": 0.1}),
    "cascade_c": ("Stable_Cascade_C", "StableCascade_C", _CASCADE_C, (16, 8, 8), (77, 1280),
                  lambda draw: {"pooled_output": draw(1, 1, 1280)}),
    "cascade_b": ("Stable_Cascade_B", "StableCascade_B", _CASCADE_B, (4, 32, 32), None,
                  lambda draw: {"pooled_output": draw(1, 1, 1280), "stable_cascade_prior": draw(1, 16, 8, 8)}),
    "sd3": ("SD3", "SD3", small.unet_config("sd3"), (16, 16, 16), (77, 64), _pooled(1280)),
    "aura_flow": ("AuraFlow", "AuraFlow", _AURA, (4, 16, 16), (77, 64)),
    "hunyuan_dit": ("HunyuanDiT", "HunyuanDiT", {"hidden_size": 128, "depth": 6, "num_heads": 2}, (4, 16, 16),
                    (77, 1024), _hunyuan_dit),
    "pixart_alpha": ("PixArtAlpha", "PixArt", {**_PIXART, "hidden_size": 96, "input_size": 48, "micro_condition": True},
                     (4, 48, 48), (120, 4096), lambda _: {"width": 384, "height": 384}),
    "pixart_sigma": ("PixArtSigma", "PixArt", {**_PIXART, "input_size": 48, "pe_interpolation": 2, "micro_condition": False},
                     (4, 48, 48), (120, 4096)),
    "flux": ("Flux", "Flux", _FLUX, (16, 16, 16), (40, 64), _pooled(32)),
    "flux_references": ("Flux", "Flux", _FLUX, (16, 16, 16), (40, 64),
                        lambda draw: {"pooled_output": draw(1, 32),
                                      "reference_latents": [draw(1, 16, 8, 8), draw(1, 16, 16, 8)]}),
    "flux_fill": ("FluxInpaint", "Flux", {**_FLUX, "in_channels": 96}, (16, 16, 16), (40, 64),
                  lambda draw: {"pooled_output": draw(1, 32), "concat_latent_image": draw(1, 16, 16, 16),
                                "concat_mask": draw.mask(1, 1, 128, 128)}),
    "long_cat_image": ("LongCatImage", "LongCatImage",
                       {**_FLUX, "guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]}, (16, 16, 16), (40, 64)),
    "flux2": ("Flux2", "Flux2", _FLUX2, (128, 8, 8), (40, 64)),
    "flux2_references": ("Flux2", "Flux2", _FLUX2, (128, 8, 8), (40, 64), _with_reference(128, 8, 8)),
    "chroma": ("Chroma", "Chroma", _CHROMA, (16, 16, 16), (40, 64), lambda _: {"pooled_output": None}),
    "chroma_radiance": ("ChromaRadiance", "ChromaRadiance", _RADIANCE, (3, 32, 32), (40, 64),
                        lambda _: {"pooled_output": None}),
    "lens": ("Lens", "Lens", _LENS, (128, 8, 8), (40, 64), lambda _: {"attention_mask": (torch.arange(40) < 36).long()[None]}),
    "lumina2": ("Lumina2", "Lumina2", small.unet_config("lumina2"), (16, 16, 16), (40, 64),
                lambda _: {"attention_mask": torch.ones(1, 40, dtype=torch.long)}),
    "z_image": ("ZImage", "Lumina2", _Z_IMAGE, (16, 16, 16), (40, 64)),
    "z_image_omni": ("ZImage", "Lumina2", {**_Z_IMAGE, "siglip_feat_dim": 48}, (16, 16, 16), (40, 64),
                     lambda draw: {"reference_latents": [draw(1, 16, 16, 16)], "reference_latents_text_embeds": [draw(1, 20, 64)],
                                   "clip_vision_outputs": [draw.seen(4, 48)]}),
    "z_image_pixels": ("ZImagePixelSpace", "ZImagePixelSpace", {**_Z_PIXELS, "decoder_num_res_blocks": 2}, (3, 64, 64), (40, 64)),
    "pixel_dit": ("PixelDiTT2I", "PixelDiTT2I", _PIXDIT, (3, 32, 32), (40, 64), lambda _: {"attention_mask": torch.ones(1, 40)}),
    "pid": ("PiD", "PiD", {**_PIXDIT, "patch_size": 16, "lq_hidden_dim": 32, "lq_num_res_blocks": 1}, (3, 64, 64), (40, 64),
            lambda draw: {"lq_latent": draw(1, 16, 2, 2), "degrade_sigma": torch.tensor([0.3])}),
    "hidream": ("HiDream", "HiDream", _HIDREAM, (16, 16, 16), (20, 64), _hidream),
    "hidream_edit": ("HiDream", "HiDream", _HIDREAM, (16, 16, 16), (20, 64),
                     lambda draw: {**_hidream(draw), "concat_latent_image": draw(1, 16, 16, 16)}),
    "hidream_o1": ("HiDreamO1", "HiDreamO1", _HIDREAM_O1, (3, 128, 128), (1, 64), _hidream_o1),
    "omnigen2": ("Omnigen2", "Omnigen2", _OMNIGEN2, (16, 16, 16), (40, 64), lambda _: _all_seen(40)),
    "omnigen2_reference": ("Omnigen2", "Omnigen2", _OMNIGEN2, (16, 16, 16), (40, 64), _with_reference(16, 8, 8, **_all_seen(40))),
    "boogu": ("Boogu", "Boogu", _BOOGU, (16, 16, 16), (40, 64), lambda _: _all_seen(40)),
    "boogu_reference": ("Boogu", "Boogu", _BOOGU, (16, 16, 16), (40, 64), _with_reference(16, 8, 8, **_all_seen(40))),
    "qwen_image": ("QwenImage", "QwenImage", _QWEN, (16, 1, 16, 16), (40, 64)),
    "qwen_image_reference": ("QwenImage", "QwenImage", _QWEN, (16, 1, 16, 16), (40, 64), _with_reference(16, 1, 16, 16)),
    "mage_flow": ("MageFlow", "MageFlow", {**_QWEN, "in_channels": 128, "out_channels": 128}, (128, 8, 8), (40, 64)),
    "mage_flow_reference": ("MageFlow", "MageFlow", {**_QWEN, "in_channels": 128, "out_channels": 128}, (128, 8, 8), (40, 64),
                            _with_reference(128, 8, 8)),
    "joy_image": ("JoyImage", "JoyImage", _JOY, (16, 1, 16, 16), (40, 64)),
    "joy_image_reference": ("JoyImage", "JoyImage", _JOY, (16, 1, 16, 16), (40, 64), _with_reference(16, 1, 16, 16)),
    "ideogram4": ("Ideogram4", "Ideogram4", _IDEOGRAM, (128, 8, 8), (40, 64)),
    "krea2": ("Krea2", "Krea2", _KREA2, (16, 16, 16), (40, 192)),
    "krea2_reference": ("Krea2", "Krea2", _KREA2, (16, 16, 16), (40, 192),
                        _with_reference(16, 1, 16, 16, reference_latents_method="index")),
    "ernie_image": ("ErnieImage", "ErnieImage", {**_ERNIE, "rope_axes_dim": (8, 12, 12)}, (128, 8, 8), (40, 48)),
    "hunyuan_image": ("HunyuanImage21", "HunyuanImage21", _HUNYUAN_IMAGE, (64, 16, 16), (40, 64),
                      lambda draw: {"conditioning_byt5small": draw(1, 12, 1472)}),
    "hunyuan_image_refiner": ("HunyuanImage21Refiner", "HunyuanImage21Refiner", _REFINER, (64, 1, 8, 8), (40, 64),
                              lambda draw: {"concat_latent_image": draw(1, _REFINED, 1, 8, 8), "noise_augmentation": 0.1}),
}  # fmt: skip
# weights that BaseModel classes take from a checkpoint when they are built
CHECKPOINTS = {"zero123": _zero123_weights}
