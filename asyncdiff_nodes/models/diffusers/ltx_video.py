"""diffusers' ``LTXVideoTransformer3DModel``: LTX-Video."""

from __future__ import annotations

from typing import Any

from asyncdiff_nodes.engine.planning.family import Family, HiddenStates
from asyncdiff_nodes.models.network import Network
from asyncdiff_nodes.models.stack import meta, stacked


def example_inputs(transformer: Network, size: int | None = None, batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call, for 21 latent frames of 16 x 22, or of ``size`` pixels a side, and 128 tokens of text."""
    config, dtype = transformer.config, transformer.dtype
    height, width = (size, size) if size else (16, 22)
    kwargs = {
        "hidden_states": meta(batch, 21 * height * width, config.in_channels, dtype=dtype),
        "encoder_hidden_states": meta(batch, 128, config.caption_channels, dtype=dtype),
        "timestep": meta(batch),
        "encoder_attention_mask": meta(batch, 128, dtype=dtype),
        "num_frames": 21,
        "height": height,
        "width": width,
        "return_dict": False,
    }
    return (), kwargs


FAMILY = Family(
    "LTXVideoTransformer3DModel",
    stacked(("proj_in",), ("transformer_blocks",), ("norm_out", "proj_out")),
    sample=(0, "hidden_states"),
    timestep=(2, "timestep"),
    example_inputs=example_inputs,
    hidden=HiddenStates("transformer_blocks.0", (0, "hidden_states"), {"transformer_blocks": 0}),
)
