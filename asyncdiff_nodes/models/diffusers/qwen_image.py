"""diffusers' ``QwenImageTransformer2DModel``: Qwen-Image and its editing models."""

from __future__ import annotations

from typing import Any

from asyncdiff_nodes.engine.planning.family import Family, HiddenStates
from asyncdiff_nodes.models.network import Network
from asyncdiff_nodes.models.stack import meta, stacked


def example_inputs(transformer: Network, size: int | None = None, batch: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call, for ``size`` latent pixels a side (128 by default), two by two in a token, and 128 tokens of text."""
    config, dtype, side = transformer.config, transformer.dtype, (size or 128) // 2
    kwargs = {
        "hidden_states": meta(batch, side * side, config.in_channels, dtype=dtype),
        "encoder_hidden_states": meta(batch, 128, config.joint_attention_dim, dtype=dtype),
        "timestep": meta(batch, dtype=dtype),
        "img_shapes": [[(1, side, side)]] * batch,
        "return_dict": False,
    }
    return (), kwargs


FAMILY = Family(
    "QwenImageTransformer2DModel",
    stacked(("img_in", "txt_in"), ("transformer_blocks",), ("norm_out", "proj_out")),
    sample=(0, "hidden_states"),
    timestep=(3, "timestep"),
    example_inputs=example_inputs,
    hidden=HiddenStates("transformer_blocks.0", (0, "hidden_states"), {"transformer_blocks": 1}),
)
