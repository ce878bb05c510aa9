"""diffusers' ``WanTransformer3DModel``: Wan 2.1 and 2.2, from text and from a picture."""

from __future__ import annotations

from typing import Any

from asyncdiff_nodes.engine.planning.family import Family, HiddenStates
from asyncdiff_nodes.models.network import Network
from asyncdiff_nodes.models.stack import meta, stacked


def example_inputs(transformer: Network, size: int | None = None, batch: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call, for 21 latent frames of 60 x 104, or of ``size`` pixels a side, and 512 tokens of text."""
    config, dtype = transformer.config, transformer.dtype
    height, width = (size, size) if size else (60, 104)
    kwargs = {
        "hidden_states": meta(batch, config.in_channels, 21, height, width, dtype=dtype),
        "timestep": meta(batch),
        "encoder_hidden_states": meta(batch, 512, config.text_dim, dtype=dtype),
        "return_dict": False,
    }
    if config.image_dim is not None:
        kwargs["encoder_hidden_states_image"] = meta(batch, 257, config.image_dim, dtype=dtype)
    return (), kwargs


FAMILY = Family(
    "WanTransformer3DModel",
    stacked(("patch_embedding",), ("blocks",), ("norm_out", "proj_out")),
    sample=(0, "hidden_states"),
    timestep=(1, "timestep"),
    example_inputs=example_inputs,
    hidden=HiddenStates("blocks.0", (0, "hidden_states"), {"blocks": 0}),
)
