"""Rows for ``denoisers.py``: what makes sound and shapes."""

from __future__ import annotations

import comfy.ldm.audio.embedders
import torch

try:
    from comfy.ldm.minimax_music.dit import ContinuousTransformer
except ImportError:  # an older host
    pass
else:
    # no argument says how many layers it has, of 2048 channels each; its code does
    _code = ContinuousTransformer.__init__.__code__
    _fewer = tuple(4 if constant == 36 else constant for constant in _code.co_consts)
    ContinuousTransformer.__init__.__code__ = _code.replace(co_consts=_fewer)

_STABLE_AUDIO = {"embed_dim": 128, "depth": 4, "num_heads": 2, "project_cond_tokens": True, "cond_token_dim": 768}
_STABLE_AUDIO3 = {
    **_STABLE_AUDIO, "io_channels": 256, "global_cond_dim": 768, "global_cond_shared_embed": True, "global_cond_type": "adaLN",
    "local_add_cond_dim": 257, "num_memory_tokens": 64, "attn_kwargs": {"qk_norm": "rms", "differential": True},
    "norm_type": "rms_norm", "timestep_features_type": "expo",
}  # fmt: skip
_ACE = {
    "attention_head_dim": 64, "inner_dim": 128, "num_attention_heads": 2, "num_layers": 4, "text_embedding_dim": 64,
    "max_position": 1024, "max_width": 1024, "mlp_ratio": 2.5, "ssl_encoder_depths": [8, 8], "lyric_encoder_vocab_size": 6693,
}  # fmt: skip
_ACE15 = {
    "hidden_size": 64, "text_hidden_dim": 48, "num_dit_layers": 4, "num_lyric_layers": 2, "num_timbre_layers": 2,
    "num_tokenizer_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "intermediate_size": 96, "fsq_dim": 64,
    "encoder_hidden_size": 64, "encoder_intermediate_size": 96, "encoder_num_heads": 2,
}  # fmt: skip
_TRELLIS2 = {"resolution": 64, "init_txt_model": True, "model_channels": 64, "cond_channels": 64, "num_blocks": 3, "num_heads": 2}
_HUNYUAN3D = {
    "guidance_embed": True,
    "context_in_dim": 64,
    "hidden_size": 64,
    "num_heads": 2,
    "depth": 3,
    "depth_single_blocks": 4,
}
_HUNYUAN3D21 = {
    "hidden_size": 64,
    "context_dim": 64,
    "depth": 7,
    "num_heads": 2,
    "num_moe_layers": 2,
    "guidance_cond_proj_dim": None,
}
_TRIPOSPLAT = {"q_token_length": 64, "model_channels": 128, "cond_channels": 64, "num_blocks": 3, "num_refiner_blocks": 1}
_VOXELS = 50


def _seconds(*names: str, **options: str):
    """State dicts of the embedders that are no part of the network."""

    def drawn(draw) -> dict:
        found = {}
        for name in names:
            embedder = comfy.ldm.audio.embedders.NumberConditioner(768, min_val=0, max_val=512, **options)
            state = {key: draw(*value.shape) * 0.1 for key, value in embedder.state_dict().items()}
            found |= {f"conditioner.conditioners.{name}.{key}": value for key, value in state.items()}
        return found

    return drawn


def _voxels(mode: str):
    def drawn(draw) -> dict:
        places = torch.arange(_VOXELS)
        coords = torch.stack([0 * places, places % 5, places // 5 % 5, places // 25], dim=1).int()
        given = {"trellis2_coords": coords, "trellis2_coord_counts": torch.tensor([_VOXELS]), "trellis2_generation_mode": mode}
        if mode == "texture_generation":
            given["trellis2_shape_slat"] = draw(_VOXELS, 32)
        return {"embeds": draw(1, 40, 64), **given}

    return drawn


# columns as in denoisers_pictures.py
ROWS = {
    "stable_audio": ("StableAudio", "StableAudio1", {**_STABLE_AUDIO, "global_cond_dim": 1536}, (64, 16), (40, 768),
                     lambda _: {"seconds_start": 0, "seconds_total": 40}),
    "stable_audio3": ("StableAudio3", "StableAudio3", _STABLE_AUDIO3, (256, 16), (40, 768), lambda _: {"seconds_total": 40}),
    "ace_step": ("ACEStep", "ACEStep", _ACE, (8, 16, 32), (40, 64), lambda draw: {"conditioning_lyrics": draw.ids(6000, 1, 30)}),
    "ace_step15": ("ACEStep15", "ACEStep15", _ACE15, (64, 20), (40, 48), lambda draw: {"conditioning_lyrics": draw(1, 30, 48)}),
    "ace_step15_cover": ("ACEStep15", "ACEStep15", _ACE15, (64, 20), (40, 48),
                         lambda draw: {"conditioning_lyrics": draw(1, 30, 48),
                                       "reference_audio_timbre_latents": [draw(1, 64, 20)]}),
    "minimax_music3": ("MiniMaxMusic3", "MiniMaxMusic3", {}, (128, 16), (8, 32768),
                       lambda _: {"conditioning_scale": torch.ones(1, 1, 1)}),
    "hunyuan3d2": ("Hunyuan3Dv2", "Hunyuan3Dv2", _HUNYUAN3D, (64, 64), (40, 64)),
    "hunyuan3d21": ("Hunyuan3Dv2_1", "Hunyuan3Dv2_1", _HUNYUAN3D21, (64, 64), (40, 64)),
    "trellis2_structure": ("Trellis2", "Trellis2", _TRELLIS2, (32, 16, 16, 16), (40, 64),
                           lambda draw: {"embeds": draw(1, 40, 64)}),
    "trellis2_shape": ("Trellis2", "Trellis2", _TRELLIS2, (32, _VOXELS, 1), (40, 64), _voxels("shape_generation")),
    "trellis2_texture": ("Trellis2", "Trellis2", _TRELLIS2, (32, _VOXELS, 1), (40, 64), _voxels("texture_generation")),
    "triposplat": ("TripoSplat", "TripoSplat", _TRIPOSPLAT, ((64, 16), (1, 5)), (40, 64),
                   lambda draw: {"reference_latents": [draw(1, 128, 6, 6)]}),
}  # fmt: skip
# weights that BaseModel classes take from a checkpoint when they are built
CHECKPOINTS = {
    "stable_audio": _seconds("seconds_start", "seconds_total"),
    "stable_audio3": _seconds("seconds_total", fourier_features_type="expo"),
}
