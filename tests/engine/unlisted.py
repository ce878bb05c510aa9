"""Networks that no table lists, with arguments in an unusual order, and others that are built to be wrong if they are split.

Ranks import this module, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 16


class Layer(nn.Module):
    """Attention of a picture's tokens [B, T, C] to themselves and to a prompt's, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.prompt, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, emb: torch.Tensor, text: torch.Tensor, hidden: torch.Tensor) -> Any:
        q, k, v = self.qkv(hidden + emb[:, None]).chunk(3, -1)
        k2, v2 = self.prompt(text).chunk(2, -1)
        hidden = hidden + self.out(F.scaled_dot_product_attention(q, torch.cat([k, k2], 1), torch.cat([v, v2], 1)))
        return hidden + self.mlp(hidden)


class OddTransformer(nn.Module):
    """The prompt comes first, the sample last, and the timestep has a name of its own."""

    layer = Layer

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.level = nn.Linear(2, WIDTH)
        self.layers = nn.ModuleList(self.layer() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 4)

    def emb(self, when: torch.Tensor) -> torch.Tensor:
        return self.level(torch.stack([(when / 100).sin(), (when / 1000).cos()], 1))

    def forward(self, text: torch.Tensor, when: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        emb, hidden = self.emb(when), self.embed(picture.flatten(2).transpose(1, 2))
        for layer in self.layers:
            hidden = layer(emb, text, hidden)
        return self.head(hidden).transpose(1, 2).reshape(picture.shape)


class OddUNet(nn.Module):
    """Two levels with a skip between them; the level of noise comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(4, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.shrink, self.grow = nn.Conv2d(WIDTH, WIDTH, 2, stride=2), nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2)
        self.deep = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))

    def forward(self, sigma: torch.Tensor, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image) + (sigma / 1000).sin()[:, None, None, None] + text.mean((1, 2))[:, None, None, None]
        for layer in self.down:
            x = x + torch.tanh(layer(x))
        skip, x = x, self.shrink(x)
        for layer in self.deep:
            x = x + torch.tanh(layer(x))
        x = self.grow(x) + skip
        for layer in self.up:
            x = x + torch.tanh(layer(x))
        return self.head(x)


class TwoSamples(OddTransformer):
    """Denoises a picture and a sound at once, as a list; the timestep is a pair."""

    def forward(self, latents: list[torch.Tensor], times: tuple[torch.Tensor, torch.Tensor], text: torch.Tensor) -> Any:
        picture, sound = latents
        emb, tokens = self.emb(times[0]) + 0.5 * self.emb(times[1]), picture[0, 0].numel()
        hidden = self.embed(torch.cat([picture.flatten(2), sound], 2).transpose(1, 2))
        for layer in self.layers:
            hidden = layer(emb, text, hidden)
        out = self.head(hidden).transpose(1, 2)
        return [out[:, :, :tokens].reshape(picture.shape), out[:, :, tokens:]]


class Masked(OddTransformer):
    """Cuts the prompt off at the first token that a mask leaves out: a path that values decide."""

    def forward(self, text: torch.Tensor, when: torch.Tensor, picture: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(text[:, : int(mask.sum())], when, picture)


class _Expert(Layer):
    """Routes tokens by what they say, and hands on as many."""

    def forward(self, emb: torch.Tensor, text: torch.Tensor, hidden: torch.Tensor) -> Any:
        hidden = super().forward(emb, text, hidden)
        out = torch.zeros_like(hidden)
        loud = hidden.mean(-1) > 0
        for chosen, scale in ((loud, 1.0), (~loud, 0.5)):
            places = chosen.nonzero(as_tuple=True)
            out[places] = hidden[places] * scale
        return out


class Experts(OddTransformer):
    """Mixes experts within its layers."""

    layer = _Expert


class _Aside(Layer):
    """Puts something aside that it does not return."""

    def forward(self, emb: torch.Tensor, text: torch.Tensor, hidden: torch.Tensor) -> Any:
        self.seen = hidden.mean(1)
        return super().forward(emb, text, hidden)


class LooksAside(OddTransformer):
    """Looks at what its layers put aside: what is within these can be placed."""

    layer = _Aside

    def forward(self, text: torch.Tensor, when: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        out = super().forward(text, when, picture)
        return out + sum(layer.seen.mean() for layer in self.layers)


class _Named(Layer):
    """Returns its hidden states with a word about them."""

    def forward(self, emb: torch.Tensor, text: torch.Tensor, hidden: torch.Tensor) -> Any:
        return super().forward(emb, text, hidden), "done"


class ReturnsWords(OddTransformer):
    """Has layers whose output is more than tensors: what is within these can be placed."""

    layer = _Named

    def forward(self, text: torch.Tensor, when: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        emb, hidden = self.emb(when), self.embed(picture.flatten(2).transpose(1, 2))
        for layer in self.layers:
            hidden, _ = layer(emb, text, hidden)
        return self.head(hidden).transpose(1, 2).reshape(picture.shape)


# -- built to break it -----------------------------------------------------------------------------------------------


class KeepsValues(OddTransformer):
    """Adds to each call what the call before has made."""

    def forward(self, text: torch.Tensor, when: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        out = super().forward(text, when, picture)
        if hasattr(self, "last"):
            out = out + 0.1 * self.last
        self.last = out
        return out


class Counts(OddTransformer):
    """Is louder in each call."""

    calls = 0

    def forward(self, text: torch.Tensor, when: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(text, when, picture) * self.calls


class ChangesArguments(OddTransformer):
    """Writes down for the caller how often it was called."""

    def forward(self, text: torch.Tensor, when: torch.Tensor, picture: torch.Tensor, notes: list[int]) -> torch.Tensor:
        notes.append(len(notes))
        return super().forward(text, when, picture) * len(notes)


class Twice(OddTransformer):
    """Runs its only layer for as long as others run many."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, text: torch.Tensor, when: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        emb, hidden = self.emb(when), self.embed(picture.flatten(2).transpose(1, 2))
        for _ in range(6):
            hidden = self.layers[0](emb, text, hidden)
        return self.head(hidden).transpose(1, 2).reshape(picture.shape)


class ReadsValues(OddTransformer):
    """Stops early where the hidden states are small."""

    def forward(self, text: torch.Tensor, when: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        emb, hidden = self.emb(when), self.embed(picture.flatten(2).transpose(1, 2))
        for layer in self.layers:
            hidden = layer(emb, text, hidden)
            if hidden.abs().max().item() > 100:
                break
        return self.head(hidden).transpose(1, 2).reshape(picture.shape)


class Draws(OddTransformer):
    """Adds noise."""

    def forward(self, text: torch.Tensor, when: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        return super().forward(text, when, picture) + 0.01 * torch.randn_like(picture)


class _InPlace(Layer):
    """Writes to the prompt that it is given."""

    def forward(self, emb: torch.Tensor, text: torch.Tensor, hidden: torch.Tensor) -> Any:
        text.mul_(0.9)
        return super().forward(emb, text, hidden)


class WritesToPrompt(OddTransformer):
    """Has layers that change the prompt for those behind them."""

    layer = _InPlace


class HoldsClosure(OddTransformer):
    """Holds a function that no other process can be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = lambda x: 2 * x

    def forward(self, text: torch.Tensor, when: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        return self.scale(super().forward(text, when, picture))


def made(cls: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network with weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls().eval().requires_grad_(False)


def given(cls: type[nn.Module], step: int = 0, steps: int = 6) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of its call ``step``, in its own order; some by keyword."""
    generator = torch.Generator().manual_seed(1)
    picture, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, WIDTH, generator=generator)
    sound = torch.randn(2, 4, 12, generator=generator)
    scale, when = (1 - step / steps) ** 3, torch.full((2,), 900.0 - 100 * step)
    if issubclass(cls, TwoSamples):
        return ([picture * scale, sound * scale], (when, when / 2)), {"text": text}
    if issubclass(cls, OddUNet):
        return (when, text), {"image": picture * scale}
    more = {"mask": torch.tensor([1, 1, 1, 0, 0])} if issubclass(cls, Masked) else {}
    more |= {"notes": []} if issubclass(cls, ChangesArguments) else {}
    return (text, when), {"picture": picture * scale, **more}
