"""diffusers' ``PixArtTransformer2DModel``: PixArt-alpha and -sigma, and the demo's diffusion transformer."""

from __future__ import annotations

from typing import Any

import torch

from asyncdiff_nodes.engine.planning.family import Family, HiddenStates
from asyncdiff_nodes.models.network import Network


def block_names(transformer: Network) -> list[str]:
    """List the patch embedding, every transformer block, and the output projection.

    Time, size and caption embeddings are not listed: they are cheap and computed by every rank.
    """
    return ["pos_embed", *(f"transformer_blocks.{i}" for i in range(len(transformer.transformer_blocks))), "proj_out"]


def example_inputs(transformer: Network, size: int | None = None, batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call: ``hidden_states`` [B, C, h, w] in latent pixels, ``encoder_hidden_states`` [B, 120, D]."""
    config, dtype = transformer.config, next(transformer.parameters()).dtype
    size = size or config.sample_size

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    kwargs: dict[str, Any] = {
        "encoder_hidden_states": empty(batch, 120, config.caption_channels or config.cross_attention_dim),
        "timestep": torch.zeros(batch, dtype=torch.long, device="meta"),
        "return_dict": False,
    }
    if transformer.use_additional_conditions:
        kwargs["added_cond_kwargs"] = {"resolution": empty(batch, 2), "aspect_ratio": empty(batch, 1)}
    return (empty(batch, config.in_channels, size, size),), kwargs


FAMILY = Family(
    "PixArtTransformer2DModel",
    block_names,
    sample=(0, "hidden_states"),
    timestep=(2, "timestep"),
    example_inputs=example_inputs,
    hidden=HiddenStates("transformer_blocks.0", (0, "hidden_states"), {"transformer_blocks": 0}),
)
