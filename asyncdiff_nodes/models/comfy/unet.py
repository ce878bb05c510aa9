"""ComfyUI's ``UNetModel``: SD 1.5, SD 2.x, SDXL, inpaint models, Stable Video Diffusion, and whatever else is built from it."""

from __future__ import annotations

from typing import Any

import torch

from asyncdiff_nodes.engine.planning.family import Family
from asyncdiff_nodes.models.diffusers.unet2d import layer_names
from asyncdiff_nodes.models.network import Network


def block_names(unet: Network) -> list[str]:
    """Every layer of the input, middle and output blocks (resnets, transformers, resamplers, first convolution), and the head.

    Deep transformers are listed layer by layer; time and label embeddings are not: they are cheap and computed by every rank.
    """
    return [*layers_of(unet, "input_blocks", "output_blocks"), "id_predictor" if unet.predict_codebook_ids else "out"]


def layers_of(net: Network, *stages: str) -> list[str]:
    """Names of the layers of each group in these lists of groups, and in the middle."""
    groups = [(f"{stage}.{index}", layers) for stage in stages for index, layers in enumerate(getattr(net, stage))]
    if net.middle_block is not None:
        groups.append(("middle_block", net.middle_block))
    return [
        name for group, layers in groups for index, layer in enumerate(layers) for name in layer_names(f"{group}.{index}", layer)
    ]


def example_inputs(unet: Network, size: Any = None, batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call: ``x`` [B, C, h, w] in latent pixels (64 x 64 by default), ``timesteps`` [B], ``context`` [B, 77, D].

    Of a video model, the batch are the frames of two videos.
    """
    height, width = (size, size) if isinstance(size, int) else size or (64, 64)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=unet.dtype, device="meta")

    widths = [layer.weight.shape[1] for name, layer in unet.named_modules() if name.endswith("attn2.to_k")]
    kwargs: dict[str, Any] = {"context": empty(batch, 77, widths[0]) if widths else None, "transformer_options": {}}
    if unet.use_temporal_resblocks:
        kwargs["num_video_frames"] = batch // 2
    if unet.num_classes == "sequential":
        kwargs["y"] = empty(batch, unet.get_submodule("label_emb.0.0").weight.shape[1])
    elif unet.num_classes is not None:
        kwargs["y"] = torch.empty(batch, dtype=torch.long, device="meta")
    return (empty(batch, unet.in_channels, height, width), torch.empty(batch, device="meta")), kwargs


FAMILY = Family("UNetModel", block_names, sample=(0, "x"), timestep=(1, "timesteps"), example_inputs=example_inputs)
