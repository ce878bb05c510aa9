"""Small networks whose blocks, edges and misbehaviour a test can choose. Ranks import this module, too."""

from __future__ import annotations

import multiprocessing
import random
import time
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine import Family, Plan
from asyncdiff_nodes.engine.planning.family import HiddenStates
from slowed import throttled


class ToyBlock(nn.Module):
    """A convolution that knows the time; ``pair`` makes its output a tuple of two tensors."""

    def __init__(self, channels: int, kernel: int, pair: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.time = nn.Linear(8, channels)
        self.pair = pair
        self.register_buffer("gain", torch.tensor(1.5))

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> Any:
        h = torch.tanh(self.conv(x) * self.gain + self.time(emb)[:, :, None, None] + context.mean())
        return (h, h.mean(1, keepdim=True)) if self.pair else h


class Trap(ToyBlock):
    """Raises once a context above 100 arrives."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> Any:
        if not context.is_meta and context.max() > 100:
            raise ArithmeticError("the trap has sprung")
        return super().forward(x, emb, context)


class Slow(Trap):
    """Takes ``seconds`` in every call of two items."""

    seconds = 0.0

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> Any:
        if not context.is_meta:
            time.sleep(self.seconds * len(x) / 2)
        return super().forward(x, emb, context)


class Throttled(ToyBlock):
    """Takes ``SECONDS`` in every call, twice that on rank 1."""

    SECONDS = 0.02
    forward = throttled(ToyBlock.forward, SECONDS)


class Telltale(ToyBlock):
    """Adds one where it is compiled."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> Any:
        output = super().forward(x, emb, context)
        return output + 1 if torch.compiler.is_compiling() else output


class Unloadable(ToyBlock):
    """Cannot be unpickled in a worker process."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        if multiprocessing.parent_process() is not None:
            raise ArithmeticError("not in a worker")
        super().__setstate__(state)


class ToyNet(nn.Module):
    """A chain of blocks with skips: block i reads block i - 1 and, added to it, the blocks ``skips[i]``.

    ``skips[len(blocks)]`` are read by the output. Weights that belong to no block: ``time``, ``scale``.
    """

    def __init__(self, blocks: list[ToyBlock], skips: dict[int, list[int]] | None = None, channels: int = 4) -> None:
        super().__init__()
        self.time = nn.Linear(2, 8)
        self.blocks = nn.ModuleList(blocks)
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.skips = skips or {}
        self.channels = channels

    def embed(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        t = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32).reshape(-1).expand(sample.shape[0])
        return self.time(torch.stack([(t / 100).sin(), (t / 1000).cos()], dim=1).to(sample.dtype))

    def forward(self, sample: torch.Tensor, timestep: Any, context: torch.Tensor, doubled: bool = False) -> torch.Tensor:
        emb, outputs, x = self.embed(sample, timestep), [], sample
        for index, block in enumerate(self.blocks):
            x = block(self._joined(x, index, outputs), emb, context)
            outputs.append(x)
        x = self._joined(x, len(outputs), outputs) * self.scale
        return x * 2 if doubled else x

    def _joined(self, x: Any, index: int, outputs: list[Any]) -> torch.Tensor:
        joined = sum(x) if isinstance(x, tuple) else x
        for source in self.skips.get(index, ()):
            value = outputs[source]
            joined = joined + 0.5 * (sum(value) if isinstance(value, tuple) else value)
        return joined


def block_names(net: nn.Module) -> list[str]:
    return [f"blocks.{i}" for i in range(len(net.blocks))]


def example_inputs(net: nn.Module, size: int | None, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dtype = net.scale.dtype
    sample = torch.empty(batch, net.channels, size or 8, size or 8, dtype=dtype, device="meta")
    return (sample, 0), {"context": torch.empty(batch, 3, dtype=dtype, device="meta")}


class Adding(nn.Module):
    """Adds to hidden states [B, T, C] something of its own, and ``mix`` times something made of them."""

    def __init__(self, mix: float) -> None:
        super().__init__()
        self.own, self.inner, self.mix = nn.Parameter(torch.randn(8)), nn.Linear(8, 8), mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.own + self.mix * torch.tanh(self.inner(x) + self.inner(x.mean(1, keepdim=True)))


class TwoStreams(nn.Module):
    """The same for the prompt's and the sample's hidden states, both in place, as hosts do."""

    def __init__(self, mix: float) -> None:
        super().__init__()
        self.text, self.picture = Adding(mix), Adding(mix)

    def forward(self, context: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat((context, x), 1)
        context += self.text(both)[:, : context.shape[1]] - context
        x += self.picture(both)[:, context.shape[1] :] - x
        return context, x


class ToyTransformer(nn.Module):
    """Three blocks with a stream for the prompt and one for the sample, then three with both in one tensor."""

    def __init__(self, mix: float = 0.5) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
        self.two = nn.ModuleList(TwoStreams(mix) for _ in range(3))
        self.one = nn.ModuleList(Adding(mix) for _ in range(3))
        self.requires_grad_(False).eval()

    def forward(self, sample: torch.Tensor, timestep: Any, context: torch.Tensor) -> torch.Tensor:
        x, context = self.embed(sample) * 2, context + 0.001 * timestep  # glue
        for block in self.two:
            context, x = block(context, x=x)
        x = torch.cat((context, x), 1)
        for block in self.one:
            x = block(x)
        return self.head(x[:, context.shape[1] :])


def transformer_inputs(net: nn.Module, size: int | None, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.empty(batch, size or 6, 4, device="meta"), 0), {"context": torch.empty(batch, 3, 8, device="meta")}


TRANSFORMER = Family(
    "ToyTransformer",
    lambda net: ["embed", *(f"{name}.{i}" for name in ("two", "one") for i in range(len(getattr(net, name)))), "head"],
    timestep=(1, "timestep"),
    example_inputs=transformer_inputs,
    hidden=HiddenStates("two.0", (1, "x"), {"two": 1, "one": 0}),
)
TOY = Family("ToyNet", block_names, timestep=(1, "timestep"), example_inputs=example_inputs)


def chain(*blocks: type[ToyBlock], channels: int = 4) -> ToyNet:
    """A network of these blocks, with seeded weights."""
    torch.manual_seed(0)
    return ToyNet([block(channels, 3) for block in blocks], channels=channels).eval()


def slow_net(seconds: float) -> ToyNet:
    """Two blocks, the first of which takes ``seconds`` and raises when the context says so."""
    net = chain(Slow, ToyBlock)
    net.blocks[0].seconds = seconds
    return net


def random_net(seed: int, depth: int = 7) -> ToyNet:
    """Random kernels, skips and pairs."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    blocks = [ToyBlock(4, rng.choice((1, 3, 5)), pair=rng.random() < 0.25) for _ in range(depth)]
    skips = {i: rng.sample(range(i - 1), rng.randint(0, min(2, i - 1))) for i in range(2, depth + 1)}
    return ToyNet(blocks, skips).eval()


def inputs(seed: int, batch: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A sample [B, 4, 8, 8] and the keyword arguments of a call."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.rand(batch, 3, generator=generator) * 0.1
    return torch.randn(batch, 4, 8, 8, generator=generator), {"context": context}


def denoise(call: Any, timesteps: list[int], seed: int = 0, batch: int = 2, **kwargs: Any) -> torch.Tensor:
    """Outputs [T, B, C, h, w] of a little loop in which each sample depends on the output before."""
    x, given = inputs(seed, batch)
    outputs = []
    for t in timesteps:
        outputs.append(call(x, t, **given, **kwargs))
        x = 0.8 * x + 0.3 * outputs[-1]
    return torch.stack(outputs)


# a spread over all options; blocks.1 or later as the first cut makes a placement wrapped
PLANS = (
    Plan(segments=2, warmup=2, cuts=("blocks.2", "blocks.5"), forecast=0, time_shift=True),
    Plan(segments=3, warmup=3, cuts=("blocks.1", "blocks.3", "blocks.6")),
    Plan(segments=4, warmup=2, cuts=("blocks.2", "blocks.3", "blocks.5", "blocks.6"), forecast=0, cooldown=1),
    Plan(segments=4, warmup=2, cuts=("blocks.0", "blocks.2", "blocks.4", "blocks.5")),
    Plan(segments=2, stride=2, warmup=4),
    Plan(segments=2, stride=3, warmup=1, forecast=0),
    Plan(segments=2, stride=4, warmup=2, cuts=("blocks.3", "blocks.5")),
    Plan(segments=3, warmup=2, cuts=("blocks.1", "blocks.3", "blocks.6"), cooldown=2),
    Plan(segments=3, stride=2, warmup=3, cuts=("blocks.0", "blocks.2", "blocks.5"), time_shift=True),
    Plan(segments=2, warmup=3, cuts=("blocks.0", "blocks.4")),
)
BATCHES, PLAIN = PLANS[-2:]


def label(plan: Plan) -> str:
    """A short name for test reports."""
    kind = "auto" if plan.cuts is None else "linear" if plan.cuts[0] in ("blocks.0", "conv_in") else "wrapped"
    shift = "-shift" * plan.time_shift
    cooldown = f"-C{plan.cooldown}" if plan.cooldown else ""
    return f"N{plan.segments}-S{plan.stride}-W{plan.warmup}{cooldown}-{kind}-forecast{plan.forecast}{shift}"
