"""Networks of true width with random weights, calls of them, and the sampler's loop: what tools/measure/bands.py times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.cli.zoo import find_model

Size = tuple[int, ...]
UNET, FLUX, WAN = "UNet2DConditionModel", "FluxTransformer2DModel", "WanTransformer3DModel"


@dataclass(frozen=True)
class Network:
    """A network at the sizes that it is measured at.

    Attributes:
        kind, config: diffusers' class, and how to make it.
        call, half, run: sizes of a call, of the half of it that one of two ranks computes, and of a call of whole runs. Of a
            UNet: rows, columns. Of a transformer: frames, rows and columns of tokens, tokens of the prompt.
    """

    name: str
    kind: str
    config: dict[str, Any]
    call: Size
    half: Size
    run: Size

    @property
    def has_peer(self) -> bool:
        """Whether diffusers can compute a call of it on several devices, too."""
        return self.kind != UNET

    def words(self, size: Size) -> str:
        """What a size is, for readers."""
        if self.kind == UNET:
            return f"{8 * size[1]} px"
        frames, rows, columns, prompt = size
        return f"{frames * rows * columns} + {prompt} tokens"

    def module(self) -> nn.Module:
        """Make it, with the same random weights in every process."""
        import diffusers

        torch.manual_seed(0)
        return getattr(diffusers, self.kind).from_config(self.config).eval().requires_grad_(False)

    def inputs(self, size: Size) -> tuple[torch.Tensor, dict[str, Any]]:
        """The latent that a run begins with, and the arguments that stay as they are: the same ones in every process."""
        torch.manual_seed(1)
        return _INPUTS[self.kind](size)

    def arguments(self, x: torch.Tensor, fixed: dict[str, Any], time: float) -> dict[str, Any]:
        """Of a call with latent ``x``, at a ``time`` from 1 to 0."""
        sample = "sample" if self.kind == UNET else "hidden_states"
        return {sample: x, "timestep": self.timestep(time), "return_dict": False, **fixed}

    def timestep(self, time: float) -> torch.Tensor:
        """As the network takes it."""
        return torch.tensor([time if self.kind == FLUX else round(999 * time)])


def times(steps: int) -> list[float]:
    """When the calls of a run are."""
    return [1 - step / steps for step in range(steps)]


def euler(compute: Callable[[torch.Tensor, float], torch.Tensor], x: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Yield the latent after each step of a run; ``compute`` is called with the latent and the time."""
    for time in times(steps):
        x = x + compute(x, time) / steps
        yield x


def _unet(size: Size) -> tuple[torch.Tensor, dict[str, Any]]:
    return torch.randn(1, 4, *size), {"encoder_hidden_states": torch.randn(1, 77, 768)}


def _flux(size: Size) -> tuple[torch.Tensor, dict[str, Any]]:
    _, rows, columns, prompt = size
    places = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.randn(1, rows * columns, 64), {
        "encoder_hidden_states": torch.randn(1, prompt, 4096),
        "pooled_projections": torch.randn(1, 768),
        "img_ids": torch.stack([torch.zeros(rows, columns), *places], -1).reshape(-1, 3),
        "txt_ids": torch.zeros(prompt, 3),
    }


def _wan(size: Size) -> tuple[torch.Tensor, dict[str, Any]]:
    frames, rows, columns, prompt = size
    return torch.randn(1, 16, frames, 2 * rows, 2 * columns), {"encoder_hidden_states": torch.randn(1, prompt, 4096)}


_INPUTS = {UNET: _unet, FLUX: _flux, WAN: _wan}
_SD15, _FLUX, _WAN = find_model("sd15").config, {"num_layers": 1, "num_single_layers": 1}, {"num_layers": 2}

# whole runs of the transformers are of fewer tokens: 32 calls under each of five plans would take hours
NETWORKS = (
    Network("SD 1.5", UNET, _SD15, (64, 64), (32, 64), (64, 64)),
    Network("FLUX-like", FLUX, _FLUX, (1, 64, 64, 512), (1, 32, 64, 256), (1, 24, 32, 96)),
    Network(
        "Wan-like", WAN, {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960},
        (4, 32, 32, 512), (4, 16, 32, 512), (1, 32, 32, 128),
    ),
)  # fmt: skip

# as many layers, but narrow: they show in minutes that all of it works
QUICK = (
    Network(
        "SD 1.5", UNET, {**_SD15, "block_out_channels": (32, 64, 128, 128), "norm_num_groups": 8},
        (32, 32), (16, 32), (32, 32),
    ),
    Network(
        "FLUX-like", FLUX, {**_FLUX, "num_attention_heads": 4, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)},
        (1, 32, 32, 128), (1, 16, 32, 64), (1, 16, 16, 32),
    ),
    Network(
        "Wan-like", WAN, {**_WAN, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512},
        (4, 16, 16, 128), (4, 8, 16, 128), (1, 16, 16, 32),
    ),
)  # fmt: skip
