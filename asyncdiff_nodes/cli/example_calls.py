"""Arguments of a typical call of diffusers' denoisers, on the meta device: for commands that plan before there is a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.planning.family import listed_family
from asyncdiff_nodes.models import FAMILIES
from asyncdiff_nodes.models.network import Network, meta


def example_call(denoiser: nn.Module, size: int | None = None, batch: int = 2) -> Arguments:
    """Return ``(args, kwargs)`` of one call of a denoiser, whose class is one of :data:`CLASSES`.

    Args:
        size: latent pixels a side; if None, those that the model was made for.
    """
    family = listed_family(denoiser)
    if family is not None and family.example_inputs is not None:
        return family.example_inputs(denoiser, size, batch)
    return (), {**_TRANSFORMERS[type(denoiser).__name__](denoiser, size, batch), "return_dict": False}


def _pixart(net: Network, size: int | None, batch: int) -> dict[str, Any]:
    """120 tokens of text."""
    config, side = net.config, size or net.config.sample_size
    kwargs: dict[str, Any] = {
        "hidden_states": meta(batch, config.in_channels, side, side, dtype=net.dtype),
        "encoder_hidden_states": meta(batch, 120, config.caption_channels or config.cross_attention_dim, dtype=net.dtype),
        "timestep": meta(batch, dtype=torch.long),
    }
    if net.use_additional_conditions:
        sizes = {"resolution": meta(batch, 2, dtype=net.dtype), "aspect_ratio": meta(batch, 1, dtype=net.dtype)}
        kwargs["added_cond_kwargs"] = sizes
    return kwargs


def _sd3(net: Network, size: int | None, batch: int) -> dict[str, Any]:
    """333 tokens of text."""
    config, side = net.config, size or net.config.sample_size
    return {
        "hidden_states": meta(batch, config.in_channels, side, side, dtype=net.dtype),
        "encoder_hidden_states": meta(batch, 333, config.joint_attention_dim, dtype=net.dtype),
        "pooled_projections": meta(batch, config.pooled_projection_dim, dtype=net.dtype),
        "timestep": meta(batch),
    }


def _flux(net: Network, size: int | None, batch: int) -> dict[str, Any]:
    """128 latent pixels a side, two by two in a token, and 512 tokens of text."""
    config, tokens = net.config, ((size or 128) // 2) ** 2
    return {
        "hidden_states": meta(batch, tokens, config.in_channels, dtype=net.dtype),
        "encoder_hidden_states": meta(batch, 512, config.joint_attention_dim, dtype=net.dtype),
        "pooled_projections": meta(batch, config.pooled_projection_dim, dtype=net.dtype),
        "timestep": meta(batch, dtype=net.dtype),
        "img_ids": meta(tokens, 3, dtype=net.dtype),
        "txt_ids": meta(512, 3, dtype=net.dtype),
        "guidance": meta(batch) if config.guidance_embeds else None,
    }


def _qwen_image(net: Network, size: int | None, batch: int) -> dict[str, Any]:
    """128 latent pixels a side, two by two in a token, and 128 tokens of text."""
    config, side = net.config, (size or 128) // 2
    return {
        "hidden_states": meta(batch, side * side, config.in_channels, dtype=net.dtype),
        "encoder_hidden_states": meta(batch, 128, config.joint_attention_dim, dtype=net.dtype),
        "timestep": meta(batch, dtype=net.dtype),
        "img_shapes": [[(1, side, side)]] * batch,
    }


def _wan(net: Network, size: int | None, batch: int) -> dict[str, Any]:
    """21 latent frames of 60 x 104, and 512 tokens of text."""
    config, (height, width) = net.config, (size, size) if size else (60, 104)
    kwargs = {
        "hidden_states": meta(batch, config.in_channels, 21, height, width, dtype=net.dtype),
        "timestep": meta(batch),
        "encoder_hidden_states": meta(batch, 512, config.text_dim, dtype=net.dtype),
    }
    if config.image_dim is not None:
        kwargs["encoder_hidden_states_image"] = meta(batch, 257, config.image_dim, dtype=net.dtype)
    return kwargs


def _hunyuan_video(net: Network, size: int | None, batch: int) -> dict[str, Any]:
    """33 latent frames of 90 x 160, and 256 tokens of text."""
    config, (height, width) = net.config, (size, size) if size else (90, 160)
    return {
        "hidden_states": meta(batch, config.in_channels, 33, height, width, dtype=net.dtype),
        "timestep": meta(batch),
        "encoder_hidden_states": meta(batch, 256, config.text_embed_dim, dtype=net.dtype),
        "encoder_attention_mask": meta(batch, 256, dtype=net.dtype),
        "pooled_projections": meta(batch, config.pooled_projection_dim, dtype=net.dtype),
        "guidance": meta(batch, dtype=net.dtype) if config.guidance_embeds else None,
    }


def _ltx_video(net: Network, size: int | None, batch: int) -> dict[str, Any]:
    """21 latent frames of 16 x 22, and 128 tokens of text."""
    config, (height, width) = net.config, (size, size) if size else (16, 22)
    return {
        "hidden_states": meta(batch, 21 * height * width, config.in_channels, dtype=net.dtype),
        "encoder_hidden_states": meta(batch, 128, config.caption_channels, dtype=net.dtype),
        "timestep": meta(batch),
        "encoder_attention_mask": meta(batch, 128, dtype=net.dtype),
        "num_frames": 21,
        "height": height,
        "width": width,
    }


_TRANSFORMERS: dict[str, Callable[[Network, int | None, int], dict[str, Any]]] = {
    "FluxTransformer2DModel": _flux,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "LTXVideoTransformer3DModel": _ltx_video,
    "PixArtTransformer2DModel": _pixart,
    "QwenImageTransformer2DModel": _qwen_image,
    "SD3Transformer2DModel": _sd3,
    "WanTransformer3DModel": _wan,
}
# diffusers' denoisers that such arguments are known of
CLASSES = sorted([*_TRANSFORMERS, *(name.removeprefix("diffusers.") for name in FAMILIES if name.startswith("diffusers."))])
