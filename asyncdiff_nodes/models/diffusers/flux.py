"""diffusers' ``FluxTransformer2DModel``: FLUX.1 dev, schnell, Fill, Depth and others of its build."""

from __future__ import annotations

from typing import Any

from asyncdiff_nodes.engine.planning.family import Family, HiddenStates
from asyncdiff_nodes.models.network import Network
from asyncdiff_nodes.models.stack import meta, stacked


def example_inputs(transformer: Network, size: int | None = None, batch: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call, for ``size`` latent pixels a side (128 by default), two by two in a token, and 512 tokens of text."""
    config, dtype, tokens = transformer.config, transformer.dtype, ((size or 128) // 2) ** 2
    kwargs = {
        "hidden_states": meta(batch, tokens, config.in_channels, dtype=dtype),
        "encoder_hidden_states": meta(batch, 512, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": meta(batch, config.pooled_projection_dim, dtype=dtype),
        "timestep": meta(batch, dtype=dtype),
        "img_ids": meta(tokens, 3, dtype=dtype),
        "txt_ids": meta(512, 3, dtype=dtype),
        "guidance": meta(batch) if config.guidance_embeds else None,
        "return_dict": False,
    }
    return (), kwargs


FAMILY = Family(
    "FluxTransformer2DModel",
    stacked(("x_embedder", "context_embedder"), ("transformer_blocks", "single_transformer_blocks"), ("norm_out", "proj_out")),
    sample=(0, "hidden_states"),
    timestep=(3, "timestep"),
    example_inputs=example_inputs,
    hidden=HiddenStates("transformer_blocks.0", (0, "hidden_states"), {"transformer_blocks": 1, "single_transformer_blocks": 1}),
)
