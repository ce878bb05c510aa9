"""diffusers' ``UNet2DConditionModel``: SD 1.5, SD 2.x, SDXL, their inpaint variants and other widths and depths."""

from __future__ import annotations

from typing import Any

import torch

from asyncdiff_nodes.engine.planning.family import Family
from asyncdiff_nodes.models.network import Network, meta

_LAYER_LISTS = ("resnets", "attentions", "motion_modules", "downsamplers", "upsamplers")
DEEP = 3  # transformer layers from which a block is too large to be placed as a whole; SDXL's have up to ten


def block_names(unet: Network) -> list[str]:
    """Every resnet, attention, motion module, down- and upsampler, ``conv_in`` and the output layer's norm and convolution.

    Deep attentions are listed layer by layer; time and added embeddings are not: they are cheap and computed by every rank.
    """
    names = ["conv_in"]
    for stage in ("down_blocks", "mid_block", "up_blocks"):
        root = getattr(unet, stage)
        for prefix, block in root.named_children() if stage != "mid_block" else [("", root)]:
            where = f"{stage}.{prefix}" if prefix else stage
            for layers in _LAYER_LISTS:
                # None where a stage has no such layers; a list of None where some are missing
                for index, layer in enumerate(getattr(block, layers, None) or ()):
                    if layer is not None:
                        names += layer_names(f"{where}.{layers}.{index}", layer)
    return names + [name for name in ("conv_norm_out", "conv_out") if getattr(unet, name, None) is not None]


def layer_names(name: str, layer: Network) -> list[str]:
    """``name``, or the names of what ``layer`` is made of if it is a deep transformer."""
    depth = len(getattr(layer, "transformer_blocks", ()))
    if depth < DEEP:
        return [name]
    return [f"{name}.{part}" for part in ("norm", "proj_in", *(f"transformer_blocks.{i}" for i in range(depth)), "proj_out")]


def example_inputs(unet: Network, size: int | None = None, batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call: ``sample`` [B, C, h, w] in latent pixels, ``encoder_hidden_states`` [B, 77, D], and SDXL's extras."""
    config, dtype = unet.config, next(unet.parameters()).dtype
    size = size or config.sample_size

    height, width = (size, size) if isinstance(size, int) else size
    context = config.encoder_hid_dim or config.cross_attention_dim
    kwargs: dict[str, Any] = {
        "encoder_hidden_states": meta(batch, 77, context if isinstance(context, int) else context[0], dtype=dtype),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        kwargs["added_cond_kwargs"] = {"text_embeds": meta(batch, pooled, dtype=dtype), "time_ids": meta(batch, 6, dtype=dtype)}
    if config.num_class_embeds is not None:
        kwargs["class_labels"] = meta(batch, dtype=torch.long)
    return (meta(batch, config.in_channels, height, width, dtype=dtype), 0), kwargs


FAMILY = Family("UNet2DConditionModel", block_names, timestep=(1, "timestep"), example_inputs=example_inputs)
