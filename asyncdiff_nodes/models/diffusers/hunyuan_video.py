"""diffusers' ``HunyuanVideoTransformer3DModel``: HunyuanVideo, from text and from a picture."""

from __future__ import annotations

from typing import Any

from asyncdiff_nodes.engine.planning.family import Family, HiddenStates
from asyncdiff_nodes.models.network import Network
from asyncdiff_nodes.models.stack import meta, stacked


def example_inputs(transformer: Network, size: int | None = None, batch: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call, for 33 latent frames of 90 x 160, or of ``size`` pixels a side, and 256 tokens of text."""
    config, dtype = transformer.config, transformer.dtype
    height, width = (size, size) if size else (90, 160)
    kwargs = {
        "hidden_states": meta(batch, config.in_channels, 33, height, width, dtype=dtype),
        "timestep": meta(batch),
        "encoder_hidden_states": meta(batch, 256, config.text_embed_dim, dtype=dtype),
        "encoder_attention_mask": meta(batch, 256, dtype=dtype),
        "pooled_projections": meta(batch, config.pooled_projection_dim, dtype=dtype),
        "guidance": meta(batch, dtype=dtype) if config.guidance_embeds else None,
        "return_dict": False,
    }
    return (), kwargs


FAMILY = Family(
    "HunyuanVideoTransformer3DModel",
    stacked(("x_embedder", "context_embedder"), ("transformer_blocks", "single_transformer_blocks"), ("norm_out", "proj_out")),
    sample=(0, "hidden_states"),
    timestep=(1, "timestep"),
    example_inputs=example_inputs,
    hidden=HiddenStates("transformer_blocks.0", (0, "hidden_states"), {"transformer_blocks": 0, "single_transformer_blocks": 0}),
)
