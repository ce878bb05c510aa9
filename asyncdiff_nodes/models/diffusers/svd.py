"""diffusers' ``UNetSpatioTemporalConditionModel``: Stable Video Diffusion."""

from __future__ import annotations

from typing import Any

from asyncdiff_nodes.engine.planning.family import Family
from asyncdiff_nodes.models.network import Network, meta

from .unet2d import block_names


def example_inputs(unet: Network, size: int | None = None, batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call: ``sample`` [B, F, C, h, w], 72 x 128 latent pixels or ``size`` a side, and one token of its picture."""
    config, dtype = unet.config, unet.dtype
    height, width = (size, size) if size else (72, 128)
    context = config.cross_attention_dim
    kwargs = {
        "encoder_hidden_states": meta(batch, 1, context if isinstance(context, int) else context[0], dtype=dtype),
        "added_time_ids": meta(
            batch, config.projection_class_embeddings_input_dim // config.addition_time_embed_dim, dtype=dtype
        ),
        "return_dict": False,
    }
    return (meta(batch, config.num_frames, config.in_channels, height, width, dtype=dtype), 0), kwargs


FAMILY = Family("UNetSpatioTemporalConditionModel", block_names, timestep=(1, "timestep"), example_inputs=example_inputs)
