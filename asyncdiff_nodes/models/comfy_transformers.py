"""ComfyUI's diffusion transformers: ``Flux`` (FLUX.1, with what is built like it) and ``WanModel`` (Wan 2.1 and 2.2)."""

from __future__ import annotations

from typing import Any

from torch import nn

from asyncdiff_nodes.engine.family import Family

from .stack import meta, stacked


def _flux_inputs(flux: nn.Module, size: Any = None, batch: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call: ``x`` [B, C, h, w], of 128 x 128 latent pixels by default, and 256 tokens of text."""
    height, width = (size, size) if isinstance(size, int) else size or (128, 128)
    params, dtype = flux.params, flux.dtype
    kwargs = {
        "context": meta(batch, 256, params.context_in_dim, dtype=dtype),
        "y": None if params.vec_in_dim is None else meta(batch, params.vec_in_dim, dtype=dtype),
        "guidance": meta(batch) if params.guidance_embed else None,
        "transformer_options": {},
    }
    return (meta(batch, params.in_channels, height, width, dtype=dtype), meta(batch)), kwargs


FLUX = Family(
    "Flux",
    stacked(("img_in", "txt_in"), ("double_blocks", "single_blocks"), ("final_layer",)),
    sample=(0, "x"),
    timestep=(1, "timestep"),
    example_inputs=_flux_inputs,
)


def _wan_inputs(wan: nn.Module, size: Any = None, batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call: ``x`` [B, C, F, h, w], of 21 latent frames of 60 x 104 by default, and 512 tokens of text."""
    frames, height, width = (21, size, size) if isinstance(size, int) else size or (21, 60, 104)
    dtype, weights = wan.dtype, dict(wan.named_parameters())
    channels, text = weights["patch_embedding.weight"].shape[1], weights["text_embedding.0.weight"].shape[1]
    kwargs = {"context": meta(batch, 512, text, dtype=dtype), "transformer_options": {}}
    return (meta(batch, channels, frames, height, width, dtype=dtype), meta(batch)), kwargs


WAN = Family(
    "WanModel", stacked(("patch_embedding",), ("blocks",), ("head",)), sample=(0, "x"), timestep=(1, "timestep"),
    example_inputs=_wan_inputs,
)  # fmt: skip
