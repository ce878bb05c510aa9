"""diffusers' ``SD3Transformer2DModel``: Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from asyncdiff_nodes.engine.planning.family import Family, HiddenStates
from asyncdiff_nodes.models.network import Network
from asyncdiff_nodes.models.stack import meta, stacked


def example_inputs(transformer: Network, size: int | None = None, batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call, for ``size`` latent pixels a side (the model's own by default) and 333 tokens of text."""
    config, dtype = transformer.config, transformer.dtype
    size = size or config.sample_size
    kwargs = {
        "hidden_states": meta(batch, config.in_channels, size, size, dtype=dtype),
        "encoder_hidden_states": meta(batch, 333, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": meta(batch, config.pooled_projection_dim, dtype=dtype),
        "timestep": meta(batch),
        "return_dict": False,
    }
    return (), kwargs


FAMILY = Family(
    "SD3Transformer2DModel",
    stacked(("pos_embed", "context_embedder"), ("transformer_blocks",), ("norm_out", "proj_out")),
    sample=(0, "hidden_states"),
    timestep=(3, "timestep"),
    example_inputs=example_inputs,
    hidden=HiddenStates("transformer_blocks.0", (0, "hidden_states"), {"transformer_blocks": 1}),
)
