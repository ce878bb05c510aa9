"""Rows for ``denoisers.py``: what makes videos, with or without sound, and pictures by networks for videos."""

from __future__ import annotations

import torch

from . import small

_WAN = small.unet_config("wan")
_I2V = {**_WAN, "model_type": "i2v", "in_dim": 36}
_WIDER = {**_WAN, "dim": 128}
_VIDEO = (16, 3, 8, 8)
_MOCHI = {
    "depth": 3, "patch_size": 2, "num_heads": 2, "hidden_size_x": 64, "hidden_size_y": 64, "mlp_ratio_x": 192.0,
    "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False, "out_bias": True,
    "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True,
    "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 64, "t5_token_length": 256,
    "rope_theta": 10000.0,
}  # fmt: skip
_LTXV = {**small.unet_config("ltxv"), "in_channels": 128}
_LTX2 = {
    **_LTXV, "audio_cross_attention_dim": 64, "audio_attention_head_dim": 32, "audio_num_attention_heads": 2, "num_layers": 4,
    "connector_attention_head_dim": 24, "connector_num_attention_heads": 2,
}  # fmt: skip
_HUNYUAN = small.unet_config("hunyuan_video")
_HUNYUAN15 = {
    **_HUNYUAN, "in_channels": 65, "out_channels": 32, "vec_in_dim": None, "depth": 4, "depth_single_blocks": 0,
    "guidance_embed": False, "byt5": True, "use_cond_type_embedding": True, "vision_in_dim": 1152, "meanflow_sum": True,
    "patch_size": [1, 1, 1],
}  # fmt: skip
_COSMOS = {
    "max_img_h": 16, "max_img_w": 16, "max_frames": 8, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 128, "block_config": "FA-CA-MLP", "concat_padding_mask": True, "pos_emb_cls": "rope3d",
    "block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 4,
    "num_heads": 2, "crossattn_emb_channels": 64, "extra_per_block_abs_pos_emb": True, "rope_t_extrapolation_ratio": 2.0,
    "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
_COSMOS2 = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 128, "concat_padding_mask": True, "crossattn_emb_channels": 64,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 4,
    "num_heads": 2, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_enable_fps_modulation": False,
}  # fmt: skip
_KANDINSKY = {
    "in_text_dim": 64, "in_text_dim2": 48, "time_dim": 64, "model_dim": 128, "ff_dim": 192, "num_visual_blocks": 4,
    "axes_dims": (16, 24, 24),
}  # fmt: skip
_COGVIDEO = {"num_attention_heads": 2, "num_layers": 4, "text_embed_dim": 64, "time_embed_dim": 64}
_COGVIDEO |= {"use_rotary_positional_embeddings": True}
_SEEDVR = {
    "vid_dim": 64, "heads": 2, "head_dim": 32, "num_layers": 4, "mm_layers": 2, "rope_dim": 32, "norm_eps": 1e-5,
    "mlp_type": "swiglu", "vid_out_norm": True,
}  # fmt: skip
_MINIMAX = {
    "hidden_size": 96, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 96, "ffn_hidden_size": 96, "text_dim": 64,
    "time_embed_hidden_size": 96, "time_embed_dim": 64,
}  # fmt: skip


def _clip(draw) -> dict:
    return {"clip_vision_output": draw.seen(257, 1280)}


def _start_image(draw) -> dict:
    return {**_clip(draw), "concat_latent_image": draw(1, *_VIDEO), "concat_mask": draw.mask(1, 1, 3, 8, 8)}


def _posed(draw, frames: int, *size: int) -> dict:
    return {"pose_video_latent": draw(1, 16, frames, *size)}


def _scail(draw) -> dict:
    return {**_clip(draw), "reference_latents": [draw(1, 16, 1, 8, 8)], **_posed(draw, 3, 4, 4)}


def _scail2(draw) -> dict:
    masks = {"driving_mask_28ch": draw.mask(1, 3, 28, 4, 4), "ref_mask_28ch": draw.mask(1, 4, 28, 8, 8)}
    return {**_scail(draw), **masks}


def _vace(draw) -> dict:
    return {"vace_frames": [draw(1, 32, 3, 8, 8)], "vace_mask": [draw.mask(1, 64, 3, 8, 8)], "vace_strength": [0.9]}


def _animate(draw) -> dict:
    face = draw(1, 3, 1, 512, 512)  # the encoder takes no smaller picture
    return {**_start_image(draw), **_posed(draw, 2, 8, 8), "face_video_pixels": face}


def _animate2(draw) -> dict:
    return {**_start_image(draw), **_posed(draw, 2, 8, 8)}


def _speech(draw) -> dict:
    return {"audio_embed": draw(1, 25, 1024, 12), "reference_latents": [draw(1, 16, 1, 8, 8)]}


def _humo(draw) -> dict:
    return {"audio_embed": draw(1, 3, 8, 5, 1280), "reference_latents": [draw(1, 16, 1, 8, 8)]}


def _hunyuan15(draw) -> dict:
    given = {"conditioning_byt5small": draw(1, 12, 1472), "clip_vision_output": draw.seen(729, 1152), "pooled_output": None}
    return {**given, "concat_latent_image": draw(1, 32, 3, 8, 8), "concat_mask": draw.mask(1, 1, 3, 8, 8)}


def _hunyuan15_upscaler(draw) -> dict:
    return {**_hunyuan15(draw), "concat_latent_image": draw(1, 66, 3, 8, 8), "noise_augmentation": 0.1}


def _anima(draw) -> dict:
    return {"t5xxl_ids": draw.ids(1000, 20), "t5xxl_weights": torch.ones(20)}


def _keyframe(draw) -> dict:
    kept = {"resolved_frame_index": 0, "latent": draw(1, 24, 1, 8, 8)}
    return {"minimax_keyframes": [kept], "minimax_token_tags": (torch.arange(30) >= 10).long()[None]}


# columns as in denoisers_pictures.py; a latent of several shapes is nested
ROWS = {
    "svd": ("SVD_img2vid", "SVD_img2vid", small.unet_config("svd"), (4, 8, 8), (1, 64),
            lambda draw: {"concat_latent_image": draw(1, 4, 8, 8), "motion_bucket_id": 100}),
    "sv3d_u": ("SV3D_u", "SV3D_u", {**small.unet_config("svd"), "adm_in_channels": 256}, (4, 8, 8), (1, 64),
               lambda draw: {"concat_latent_image": draw(1, 4, 8, 8)}),
    "sv3d_p": ("SV3D_p", "SV3D_p", {**small.unet_config("svd"), "adm_in_channels": 1280}, (4, 8, 8), (1, 64),
               lambda draw: {"concat_latent_image": draw(1, 4, 8, 8), "elevation": [0.0] * 3, "azimuth": [0.0, 120.0, 240.0]}),
    "mochi": ("GenmoMochi", "GenmoMochi", _MOCHI, (12, 3, 8, 8), (256, 64),
              lambda _: {"attention_mask": (torch.arange(256) < 60)[None]}),
    "ltxv": ("LTXV", "LTXV", _LTXV, (128, 3, 8, 8), (40, 48), lambda _: {"attention_mask": (torch.arange(40) < 36).long()[None]}),
    "ltx2": ("LTXAV", "LTXAV", _LTX2, ((128, 3, 8, 8), (8, 16, 16)), (40, 96), lambda _: {"frame_rate": 24}),
    "ltx2_raw_prompt": ("LTXAV", "LTXAV", _LTX2, ((128, 3, 8, 8), (8, 16, 16)), (128, 48),
                        lambda _: {"unprocessed_ltxav_embeds": True}),  # its extra_conds reads weights of the network
    "hunyuan_video": ("HunyuanVideo", "HunyuanVideo", _HUNYUAN, _VIDEO, (40, 64), lambda draw: {"pooled_output": draw(1, 32)}),
    "hunyuan_video_i2v": ("HunyuanVideoI2V", "HunyuanVideoI2V", {**_HUNYUAN, "in_channels": 33}, _VIDEO, (40, 64),
                          lambda draw: {"pooled_output": draw(1, 32), "concat_latent_image": draw(1, *_VIDEO)}),
    "hunyuan_video_skyreels": ("HunyuanVideoSkyreelsI2V", "HunyuanVideoSkyreelsI2V", {**_HUNYUAN, "in_channels": 32}, _VIDEO,
                               (40, 64), lambda draw: {"pooled_output": draw(1, 32), "concat_latent_image": draw(1, *_VIDEO)}),
    "hunyuan_video15": ("HunyuanVideo15", "HunyuanVideo15", _HUNYUAN15, (32, 3, 8, 8), (40, 64), _hunyuan15),
    "hunyuan_video15_upscaler": ("HunyuanVideo15_SR_Distilled", "HunyuanVideo15_SR_Distilled", {**_HUNYUAN15, "in_channels": 98},
                                 (32, 3, 8, 8), (40, 64), _hunyuan15_upscaler),
    "cosmos": ("CosmosT2V", "CosmosVideo", _COSMOS, _VIDEO, (40, 64)),
    "cosmos2": ("CosmosT2IPredict2", "CosmosPredict2", _COSMOS2, _VIDEO, (40, 64)),
    "anima": ("Anima", "Anima", {**_COSMOS2, "crossattn_emb_channels": 1024}, (16, 1, 16, 16), (20, 1024), _anima),
    "wan": ("WAN21_T2V", "WAN21", _WAN, _VIDEO, (40, 64)),
    "wan_i2v": ("WAN21_I2V", "WAN21", _I2V, _VIDEO, (40, 64), _start_image),
    "wan_context": ("WAN21_T2V", "WAN21", _WAN, _VIDEO, (40, 64), lambda draw: {"context_latents": [draw(1, 16, 1, 8, 8)]}),
    "wan22": ("WAN22_T2V", "WAN22", {**_WAN, "in_dim": 48, "out_dim": 48}, (48, 3, 8, 8), (40, 64)),
    "wan_flow_rvs": ("WAN21_FlowRVS", "WAN21_FlowRVS", {**_WAN, "model_type": "flow_rvs"}, _VIDEO, (40, 64)),
    "wan_causal": ("WAN21_CausalAR_T2V", "WAN21_CausalAR", _WAN, _VIDEO, (40, 64)),
    "wan_vace": ("WAN21_Vace", "WAN21_Vace", {**_WAN, "model_type": "vace", "num_layers": 6, "vace_layers": 3, "vace_in_dim": 96},
                 _VIDEO, (40, 64), _vace),
    "wan_camera": ("WAN21_Camera", "WAN21_Camera", {**_WAN, "model_type": "camera", "in_dim": 32}, _VIDEO, (40, 64),
                   lambda draw: {**_start_image(draw), "camera_conditions": draw(1, 24, 3, 64, 64)}),
    "wan_humo": ("WAN21_HuMo", "WAN21_HuMo", {**_WAN, "model_type": "humo", "in_dim": 36}, _VIDEO, (40, 64), _humo),
    "wan_s2v": ("WAN22_S2V", "WAN22_S2V", {**_WIDER, "model_type": "s2v", "audio_inject_layers": [0, 4]}, _VIDEO, (40, 64),
                _speech),
    "wan_animate": ("WAN22_Animate", "WAN22_Animate", {**_WIDER, "model_type": "animate", "in_dim": 36}, _VIDEO, (40, 64),
                    _animate),
    "wan_animate2": ("WAN_Animate2", "WAN_Animate2", {**_WAN, "model_type": "animate2", "in_dim": 36}, _VIDEO, (40, 64),
                     _animate2),
    "wan_dancer": ("WAN22_WanDancer", "WAN22_WanDancer",
                   {**_WIDER, "model_type": "wandancer", "in_dim": 36, "audio_inject_layers": [0, 4]}, _VIDEO, (40, 64),
                   lambda draw: {**_start_image(draw), "audio_embed": draw(1, 12, 35)}),
    "wan_scail": ("WAN21_SCAIL", "WAN21_SCAIL", {**_WAN, "model_type": "scail", "in_dim": 20}, _VIDEO, (40, 64), _scail),
    "wan_scail2": ("WAN21_SCAIL2", "WAN21_SCAIL2", {**_WAN, "model_type": "scail2", "in_dim": 20}, _VIDEO, (40, 64), _scail2),
    "kandinsky5": ("Kandinsky5", "Kandinsky5", _KANDINSKY, _VIDEO, (40, 64),
                   lambda draw: {"pooled_output": draw(1, 48)}),
    "kandinsky5_image": ("Kandinsky5Image", "Kandinsky5Image", {**_KANDINSKY, "visual_embed_dim": 64}, (16, 1, 16, 16), (40, 64),
                         lambda draw: {"pooled_output": draw(1, 48)}),
    "cogvideox": ("CogVideoX_T2V", "CogVideoX", _COGVIDEO, _VIDEO, (40, 64)),
    "cogvideox_i2v": ("CogVideoX_I2V", "CogVideoX", {**_COGVIDEO, "in_channels": 32, "ofs_embed_dim": 64}, _VIDEO, (40, 64),
                      lambda draw: {"concat_latent_image": draw(1, *_VIDEO)}),
    "seedvr2": ("SeedVR2", "SeedVR2", _SEEDVR, (16, 3, 16, 16), (58, 5120), lambda draw: {"condition": draw(1, 17, 3, 16, 16)}),
    "minimax_h3": ("MiniMaxH3", "MiniMaxH3", _MINIMAX, ((24, 2, 8, 8), (32, 2, 8)), (30, 64)),
    "minimax_h3_keyframe": ("MiniMaxH3", "MiniMaxH3", _MINIMAX, ((24, 2, 8, 8), (32, 2, 8)), (30, 64), _keyframe),
}  # fmt: skip
