"""Networks that nobody has seen, as a pack might bring them: built with the host's layers. Ranks import this file, too.

Some are built to be wrong if they are split.
"""

from __future__ import annotations

import torch
from torch import nn


class Layer(nn.Module):
    """Attention of tokens [B, T, C] to themselves and to a prompt's, and an MLP."""

    def __init__(self, width, operations, **how):
        super().__init__()
        self.qkv, self.prompt = operations.Linear(width, 3 * width, **how), operations.Linear(width, 2 * width, **how)
        self.out = operations.Linear(width, width, **how)
        self.mlp = nn.Sequential(
            operations.Linear(width, 2 * width, **how), nn.GELU(), operations.Linear(2 * width, width, **how)
        )

    def forward(self, emb, text, hidden):
        q, k, v = self.qkv(hidden + emb[:, None]).chunk(3, -1)
        k2, v2 = self.prompt(text).chunk(2, -1)
        keys, values = torch.cat([k, k2], 1), torch.cat([v, v2], 1)
        hidden = hidden + self.out(torch.nn.functional.scaled_dot_product_attention(q, keys, values))
        return hidden + self.mlp(hidden)


class Transformer(nn.Module):
    """Its layers take the hidden states last."""

    def __init__(self, width=32, depth=6, dtype=None, device=None, operations=None, **_):
        super().__init__()
        how = {"dtype": dtype, "device": device}
        self.dtype = dtype
        self.embed, self.level = operations.Linear(4, width, **how), operations.Linear(2, width, **how)
        self.layers = nn.ModuleList(Layer(width, operations, **how) for _ in range(depth))
        self.head = operations.Linear(width, 4, **how)

    def start(self, x, timestep):
        emb = self.level(torch.stack([(timestep / 100).sin(), (timestep / 1000).cos()], 1).to(x.dtype))
        return emb, self.embed(x.flatten(2).transpose(1, 2))

    def end(self, hidden, x):
        return self.head(hidden).transpose(1, 2).reshape(x.shape)

    def forward(self, x, timestep, context, **kwargs):
        emb, hidden = self.start(x, timestep)
        for layer in self.layers:
            hidden = layer(emb, context, hidden)
        return self.end(hidden, x)


class UNet(nn.Module):
    """Two levels with a skip between them."""

    def __init__(self, width=32, dtype=None, device=None, operations=None, **_):
        super().__init__()
        how = {"dtype": dtype, "device": device}
        self.dtype = dtype
        self.text = operations.Linear(32, width, **how)
        self.stem, self.head = operations.Conv2d(4, width, 3, padding=1, **how), operations.Conv2d(width, 4, 3, padding=1, **how)
        self.down = nn.ModuleList(operations.Conv2d(width, width, 3, padding=1, **how) for _ in range(2))
        self.shrink = operations.Conv2d(width, width, 2, stride=2, **how)
        self.deep = nn.ModuleList(operations.Conv2d(width, width, 3, padding=1, **how) for _ in range(3))
        self.grow = operations.ConvTranspose2d(width, width, 2, stride=2, **how)
        self.up = nn.ModuleList(operations.Conv2d(width, width, 3, padding=1, **how) for _ in range(2))

    def forward(self, x, timestep, context, **kwargs):
        told = self.text(context).mean(1)[:, :, None, None] + (timestep / 1000).sin()[:, None, None, None].to(x.dtype)
        h = self.stem(x) + told
        for layer in self.down:
            h = h + torch.tanh(layer(h))
        skip, h = h, self.shrink(h)
        for layer in self.deep:
            h = h + torch.tanh(layer(h))
        h = self.grow(h) + skip
        for layer in self.up:
            h = h + torch.tanh(layer(h))
        return self.head(h)


class KeepsValues(Transformer):
    """Adds to each call what the call before has made."""

    def forward(self, x, timestep, context, **kwargs):
        out = super().forward(x, timestep, context)
        if hasattr(self, "last"):
            out = out + 0.1 * self.last
        self.last = out
        return out


class Counts(Transformer):
    """Is louder in each call."""

    calls = 0

    def forward(self, x, timestep, context, **kwargs):
        self.calls += 1
        return super().forward(x, timestep, context) * (1 + 0.01 * self.calls)


loudness = 1.0  # a node may set it; ranks do not see that


class ReadsGlobal(Transformer):
    """Is as loud as a variable of its module says."""

    def forward(self, x, timestep, context, **kwargs):
        return super().forward(x, timestep, context) * loudness


class Twice(Transformer):
    """Runs its only layer for as long as others run many."""

    def __init__(self, **how):
        super().__init__(depth=1, **how)

    def forward(self, x, timestep, context, **kwargs):
        emb, hidden = self.start(x, timestep)
        for _ in range(6):
            hidden = self.layers[0](emb, context, hidden)
        return self.end(hidden, x)


class ReadsValues(Transformer):
    """Stops early where the hidden states are large."""

    def forward(self, x, timestep, context, **kwargs):
        emb, hidden = self.start(x, timestep)
        for layer in self.layers:
            hidden = layer(emb, context, hidden)
            if hidden.abs().max().item() > 1e6:
                break
        return self.end(hidden, x)


class ReadsLongPrompts(Transformer):
    """Looks at the values of its hidden states where the prompt is long."""

    def forward(self, x, timestep, context, **kwargs):
        emb, hidden = self.start(x, timestep)
        for layer in self.layers:
            hidden = layer(emb, context, hidden)
            if context.shape[1] > 7 and hidden.abs().max().item() > 1e6:
                break
        return self.end(hidden, x)


class Draws(Transformer):
    """Adds noise."""

    def forward(self, x, timestep, context, **kwargs):
        return super().forward(x, timestep, context) + 0.01 * torch.randn_like(x)


class _InPlace(Layer):
    """Writes to the prompt that it is given."""

    def forward(self, emb, text, hidden):
        text.mul_(0.999)
        return super().forward(emb, text, hidden)


class WritesToPrompt(Transformer):
    """Has layers that change the prompt for those behind them."""

    def __init__(self, **how):
        super().__init__(**how)
        for layer in self.layers:
            layer.__class__ = _InPlace


class HoldsClosure(Transformer):
    """Holds a function that no other process can be sent."""

    def __init__(self, **how):
        super().__init__(**how)
        self.scale = lambda x: 2 * x

    def forward(self, x, timestep, context, **kwargs):
        return self.scale(super().forward(x, timestep, context))
