"""Networks as wide as those that people run, but with few layers and random weights, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from asyncdiff_nodes.engine import Family

_HEAD = 64  # channels of an attention head, or less where a network is narrow


class Attention(nn.Module):
    """Attention of tokens [B, T, C] to a context [B, S, K]; to themselves without one."""

    def __init__(self, width: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = max(1, width // _HEAD)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(context or width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Return [B, T, C]."""
        key, value = self.key_value(x if context is None else context).chunk(2, -1)
        split = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.query(x), key, value))
        return self.out(functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """Two convolutions of [B, C, h, w] with the timestep's embedding between them."""

    def __init__(self, before: int, width: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, before), nn.SiLU(), nn.Conv2d(before, width, 3, padding=1))
        self.second = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.time, self.skip = nn.Linear(embedding, width), nn.Conv2d(before, width, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Return [B, width, h, w]."""
        return self.skip(x) + self.second(self.first(x) + self.time(embedding)[:, :, None, None])


class CrossLayer(nn.Module):
    """A transformer layer on the pixels of [B, C, h, w], which also looks at the prompt [B, S, K]."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own, self.cross = Attention(width), Attention(width, context)
        self.wide, self.narrow = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Return [B, C, h, w]."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.own(self.norms[0](tokens))
        tokens = tokens + self.cross(self.norms[1](tokens), context)
        value, gate = self.wide(self.norms[2](tokens)).chunk(2, -1)
        tokens = tokens + self.narrow(value * functional.gelu(gate))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.Module):
    """A residual and some layers, at one resolution of a U-Net."""

    def __init__(self, before: int, width: int, layers: int, embedding: int, context: int) -> None:
        super().__init__()
        self.residual = Residual(before, width, embedding)
        self.layers = nn.ModuleList(CrossLayer(width, context) for _ in range(layers))

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Return [B, width, h, w]."""
        x = self.residual(x, embedding)
        for layer in self.layers:
            x = layer(x, context)
        return x


class UNetLike(nn.Module):
    """Stages down and up again, with skips; half the size from one to the next."""

    def __init__(self, widths: Sequence[int], layers: Sequence[int], context: int) -> None:
        super().__init__()
        self.frequencies, embedding = widths[0], 4 * widths[0]
        self.time = nn.Linear(self.frequencies, embedding)
        self.begin = nn.Conv2d(4, widths[0], 3, padding=1)
        before = (widths[0], *widths)
        self.down = nn.ModuleList(Stage(*sizes, embedding, context) for sizes in zip(before, widths, layers, strict=False))
        steps = list(zip((*widths[1:], widths[-1]), widths, layers, strict=True))[::-1]
        self.up = nn.ModuleList(Stage(last + skip, skip, count, embedding, context) for last, skip, count in steps)
        self.end = nn.Conv2d(widths[0], 4, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Predict [B, 4, h, w] from a sample of that shape, a timestep [B] and a prompt [B, S, K]."""
        embedding = self.time(_waves(timestep, self.frequencies, sample.dtype))
        x, skips = self.begin(sample), []
        for stage in self.down:
            x = stage(x, embedding, context)
            skips.append(x)
            x = functional.avg_pool2d(x, 2)
        for stage in self.up:
            skip = skips.pop()
            x = functional.interpolate(x, size=skip.shape[2:])
            x = stage(torch.cat([x, skip], 1), embedding, context)
        return self.end(x)


class StreamLayer(nn.Module):
    """A layer on prompt and picture together, [B, S + T, C]: attention and MLP side by side, as FLUX's single blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 128)
        self.norm, self.modulation = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 3 * width)
        self.wide, self.narrow = nn.Linear(width, 7 * width), nn.Linear(5 * width, width)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Return [B, S + T, C]."""
        shift, scale, gate = self.modulation(functional.silu(embedding))[:, None].chunk(3, -1)
        width = x.shape[-1]
        *qkv, mlp = self.wide(self.norm(x) * (1 + scale) + shift).split([width, width, width, 4 * width], -1)
        split = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in qkv)
        attended = functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        return x + gate * self.narrow(torch.cat([attended, functional.gelu(mlp)], -1))


class FluxLike(nn.Module):
    """Layers on the tokens of prompt and picture."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.frequencies = 256
        self.time, self.prompt = nn.Linear(self.frequencies, width), nn.Linear(context, width)
        self.begin = nn.Conv2d(16, width, 2, stride=2)
        self.layers = nn.ModuleList(StreamLayer(width) for _ in range(layers))
        self.end = nn.ConvTranspose2d(width, 16, 2, stride=2)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Predict [B, 16, h, w] from a sample of that shape, a timestep [B] and a prompt [B, S, K]."""
        embedding = self.time(_waves(timestep, self.frequencies, sample.dtype))
        picture = self.begin(sample)
        x = torch.cat([self.prompt(context), picture.flatten(2).transpose(1, 2)], 1)
        for layer in self.layers:
            x = layer(x, embedding)
        return self.end(x[:, context.shape[1] :].transpose(1, 2).unflatten(2, picture.shape[2:]))


def _waves(timestep: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    frequencies = torch.exp(torch.arange(count // 2, device=timestep.device) * (-9.2 / (count // 2)))
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1).to(dtype)


@dataclass(frozen=True)
class Subject:
    """A network and the inputs of a call.

    Attributes:
        name: of the network whose widths it has.
        build: makes it; widths are multiplied by its argument.
        sample: shape of the sample, without the batch; height and width are multiplied, too.
        context: shape of the prompt, without the batch; the width is multiplied.
    """

    name: str
    build: Callable[[float], nn.Module]
    sample: tuple[int, int, int]
    context: tuple[int, int]

    def network(self, scale: float, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Make the network, with seeded weights that keep values of all sizes finite."""
        torch.manual_seed(0)
        with torch.device("meta"):
            made = self.build(scale).to(dtype).eval().requires_grad_(False)
        made = made.to_empty(device="cpu")
        for name, tensor in made.named_parameters():
            if tensor.ndim > 1:
                tensor.normal_(0, tensor[0].numel() ** -0.5)
            else:
                tensor.fill_(float(name.endswith("weight")))  # norms
        return made.to(device)

    def inputs(self, scale: float, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a sample and a prompt for a batch of one."""
        channels, *size = self.sample
        tokens, width = self.context
        generator = torch.Generator().manual_seed(1)
        shapes = (1, channels, *(int(side * scale) for side in size)), (1, tokens, int(width * scale))
        sample, context = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        return sample, context

    def family(self, scale: float, dtype: torch.dtype) -> Family:
        """Say how it is split."""

        def example(_: nn.Module, size: Any, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            sample, context = self.inputs(scale, dtype, torch.device("meta"))
            return (sample, torch.zeros(1, device="meta"), context), {}

        return Family(self.name, _blocks, timestep=(1, "timestep"), example_inputs=example)


def _blocks(network: nn.Module) -> list[str]:
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, Residual | CrossLayer | StreamLayer) or name in ("begin", "end")
    ]


def _unet(widths: Sequence[int], layers: Sequence[int], context: int) -> Callable[[float], nn.Module]:
    return lambda scale: UNetLike([int(width * scale) for width in widths], layers, int(context * scale))


SUBJECTS = (
    Subject("SD 1.5-like", _unet((320, 640, 1280), (1, 1, 1), 768), (4, 64, 64), (77, 768)),
    Subject("SDXL-like", _unet((320, 640, 1280), (0, 1, 3), 2048), (4, 64, 64), (77, 2048)),
    Subject("FLUX-like", lambda scale: FluxLike(int(3072 * scale), 4, int(4096 * scale)), (16, 64, 64), (256, 4096)),
)
