"""diffusers' ``UNetMotionModel``: AnimateDiff."""

from __future__ import annotations

from typing import Any

import torch

from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.batch import divide as divide_batch
from asyncdiff_nodes.engine.planning.family import Family
from asyncdiff_nodes.models.network import Network, meta

from .unet2d import block_names

_CONTEXT = "encoder_hidden_states"


def example_inputs(unet: Network, size: int | None = None, batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of one call: ``sample`` [B, C, F, h, w] of 16 frames, 64 x 64 latent pixels or ``size`` a side, and a prompt."""
    config, dtype = unet.config, unet.dtype
    size, frames = size or config.sample_size or 64, min(16, config.motion_max_seq_length)
    # a pipeline repeats the prompt for every frame
    kwargs = {_CONTEXT: meta(batch * frames, 77, config.cross_attention_dim, dtype=dtype), "return_dict": False}
    return (meta(batch, config.in_channels, frames, size, size, dtype=dtype), 0), kwargs


def divide(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, parts: int) -> list[Arguments]:
    """Divide as :func:`asyncdiff_nodes.engine.batch.divide`; of a prompt per frame, each part gets that of its videos."""
    context = kwargs.get(_CONTEXT)
    if not isinstance(context, torch.Tensor) or len(context) % batch:
        return divide_batch(args, kwargs, batch, parts)
    calls = divide_batch(args, kwargs | {_CONTEXT: context.unflatten(0, (batch, -1))}, batch, parts)
    return [(own, {**named, _CONTEXT: named[_CONTEXT].flatten(0, 1)}) for own, named in calls]


FAMILY = Family("UNetMotionModel", block_names, timestep=(1, "timestep"), example_inputs=example_inputs, divide=divide)
