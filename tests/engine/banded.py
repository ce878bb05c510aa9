"""Networks for bands: some that can be computed so, and some that need what other ranks have. Ranks import this module, too."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from unlisted import WIDTH, Layer, OddTransformer, OddUNet


class Joint(nn.Module):
    """Two streams, whose tokens attend to each other with positions and a mask; the prompt's comes first there."""

    def __init__(self) -> None:
        super().__init__()
        self.picture, self.prompt = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: torch.Tensor, text: torch.Tensor, where: torch.Tensor, mask: torch.Tensor) -> Any:
        streams = zip(self.prompt(text).chunk(3, -1), self.picture(hidden).chunk(3, -1), strict=True)
        q, k, v = (torch.cat(pair, 1) for pair in streams)
        seen = F.scaled_dot_product_attention(q * where, k * where, v, attn_mask=mask)
        text = text + seen[:, : text.shape[1]]
        hidden = hidden + seen[:, text.shape[1] :]
        return hidden + self.mlp(hidden), text


class JointTransformer(nn.Module):
    """Positions are made in its forward, from the picture's shape, so that only its blocks can be computed in bands."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Joint() for _ in range(4))

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x.flatten(2).transpose(1, 2)) * (t / 1000).cos()[:, None, None]
        where = torch.linspace(0.5, 1.5, text.shape[1] + hidden.shape[1], device=x.device)[None, :, None]
        seen = torch.cat([mask, mask.new_ones(hidden.shape[:2])], 1)
        seen = seen[:, None, :] | ~seen[:, :, None]  # those that are not seen look at all
        for block in self.blocks:
            hidden, text = block(hidden, text, where, seen)
        return self.head(hidden).transpose(1, 2).reshape(x.shape)


class _Mixing(Layer):
    """What some of the tokens need of all others, in a way that is not exchanged."""

    def forward(self, emb: torch.Tensor, text: torch.Tensor, hidden: torch.Tensor) -> Any:
        return self.mixed(super().forward(emb, text, hidden))


class _Mean(_Mixing):
    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden - hidden.mean(1, keepdim=True)


class _Rolled(_Mixing):
    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.roll(1, 1)


class _First(_Mixing):
    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + hidden[:, :1]


class _Summed(_Mixing):
    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ (hidden.transpose(1, 2) @ hidden)


class _Counted(_Mixing):
    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.arange(hidden.shape[1], device=hidden.device)[:, None]


class _Shuffled(_Mixing):
    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.flip(1)


class _Apart(_Mixing):
    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.unbind(1)
        return torch.stack([*tokens[1:], tokens[0]], 1)


class _Strided(_Mixing):
    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + hidden.as_strided(hidden.shape, (0, 0, 1))


class _Picky(_Mixing):
    """Raises what forwards seldom do, where it has not all tokens of a picture."""

    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * {64: 1.0, 72 * 8: 1.0}[hidden.shape[1]]


class _Scaled(_Mixing):
    """As Lumina's proportional attention does."""

    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + F.scaled_dot_product_attention(hidden, hidden, hidden, scale=1 / hidden.shape[1])


class _Averaged(_Mixing):
    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden / hidden.shape[1]


class Marked(nn.Module):
    """A layer that is told by numbers where the prompt's tokens end and the picture's begin, in one sequence of both."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.each = nn.Linear(WIDTH, 3 * WIDTH), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: torch.Tensor, parts: list[tuple[int, int]]) -> torch.Tensor:
        seen = F.scaled_dot_product_attention(*self.qkv(hidden).chunk(3, -1))
        pairs = zip(self.each, parts, strict=True)
        hidden = hidden + torch.cat([layer(seen[:, begin:end]) for layer, (begin, end) in pairs], 1)
        return hidden + self.mlp(hidden)


@dataclass
class Layout:
    """What a network is told by an object of its own."""

    own: int


class MarkedTransformer(nn.Module):
    """The prompt and the picture in one sequence; how much of it is the prompt's is a number, or in an object of its own.

    With the latter it has positions, so that only its layers can be computed in bands.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList(Marked() for _ in range(3))

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, own: int | Layout) -> torch.Tensor:
        hidden = self.embed(x.flatten(2).transpose(1, 2)) * (t / 1000).cos()[:, None, None]
        hidden = torch.cat([text, hidden], 1)
        if isinstance(own, Layout):
            hidden, own = hidden * torch.linspace(0.5, 1.5, hidden.shape[1], device=x.device)[None, :, None], own.own
        parts = [(0, own), (own, hidden.shape[1])]
        for layer in self.layers:
            hidden = layer(hidden, parts)
        return self.head(hidden[:, text.shape[1] :]).transpose(1, 2).reshape(x.shape)


class Reaching(OddUNet):
    """Its first layer looks three rows far."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, WIDTH, 7, padding=3)


class _Paired(_Mixing):
    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        items, tokens, width = hidden.shape
        halves = hidden.reshape(items, 2, tokens // 2, width)
        return (halves + halves.flip(1)).reshape(hidden.shape)


class Slow(_Mixing):
    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        if not hidden.is_meta:
            time.sleep(0.3)
        return hidden


class _Unseen(Layer):
    """Attention that is PyTorch's on meta only, as that of a host may be."""

    def forward(self, emb: torch.Tensor, text: torch.Tensor, hidden: torch.Tensor) -> Any:
        if hidden.is_meta:
            return super().forward(emb, text, hidden)
        q, k, v = self.qkv(hidden + emb[:, None]).chunk(3, -1)
        k2, v2 = self.prompt(text).chunk(2, -1)
        k, v = torch.cat([k, k2], 1), torch.cat([v, v2], 1)
        hidden = hidden + self.out((q @ k.transpose(1, 2) / WIDTH**0.5).softmax(-1) @ v)
        return hidden + self.mlp(hidden)


# what they do -> what is said of it
MIXING = {
    _Mean: "mean of all tokens",
    _Rolled: "roll of all tokens",
    _First: "takes some of the tokens",
    _Summed: "bmm of all tokens",
    _Counted: "makes positions",
    _Shuffled: "flip of all tokens",
    _Apart: "takes another path",
    _Strided: "as_strided of all tokens",
    _Picky: "KeyError: 32",
    _Scaled: "number that depends on how many tokens",
    _Averaged: "number that depends on how many tokens",
}


def mixing(layer: type[nn.Module]) -> nn.Module:
    """A transformer of such layers."""
    net = OddTransformer(depth=0)
    net.layers.extend(layer() for _ in range(4))
    return net
