"""The input that a later call will have, as far as those of the calls so far tell: what a segment that works ahead is given.

A diffusion model's input is ``scale * (clean + sigma * noise)``. While a sampler goes down in sigma, input / scale follows a
curve that is nearly straight in sigma (quite straight while the model's estimate of the clean sample does not change: a step of
Euler's method, or of DDIM), so that its last two points say where it will be in a few calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

NOTABLE = 0.1  # noise, beside a picture's own deviation of about 1


@dataclass(frozen=True)
class NoiseLevels:
    """Noise in every call of a run, in order: its input is ``scales[k] * (clean + sigmas[k] * noise)``.

    Attributes:
        rest: the sigma that the run ends with.

    Raises:
        ValueError: not one positive scale for each sigma.
    """

    sigmas: tuple[float, ...]
    scales: tuple[float, ...]
    rest: float = 0.0

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.scales) or not all(0 < scale < float("inf") for scale in self.scales):
            raise ValueError(f"{len(self.sigmas)} sigmas and the scales {self.scales}: give one positive scale for each sigma")

    @property
    def leap(self) -> int:
        """Number of the call, counted from the end, that leaps from notable noise to less; 0 if the noise fades out before.

        1 where the last step goes from there to none (the host's ``simple``), 2 where one more call follows, which tidies up
        (DDIM, the host's ``normal``), 3 if that is made of two calls (Heun). Only the last two noises are looked at: schedules
        such as ``karras`` have no leap, nor have runs that leave noise to another model.
        """
        last = list(dict.fromkeys(reversed(self.sigmas)))[:2]
        for n, (noise, rest) in enumerate(zip(reversed(self.sigmas), (self.rest, *reversed(self.sigmas)), strict=False), start=1):
            if noise not in last:
                break
            if noise >= NOTABLE > rest:
                return n
        return 0

    @classmethod
    def unknown(cls, calls: int) -> NoiseLevels:
        """Make those of a run about which nothing is known but its length: straight in the number of the call."""
        return cls(tuple(float(calls - k) for k in range(calls)), (1.0,) * calls)

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Sequence[float]) -> NoiseLevels:
        """Make them of the cumulative alpha of every call; the input is ``sqrt(a) * clean + sqrt(1 - a) * noise``."""
        return cls(tuple((1 / a - 1) ** 0.5 for a in alphas_cumprod), tuple(a**0.5 for a in alphas_cumprod))


class Outlook:
    """Inputs of one stream, as they have been, and will probably be.

    Args:
        levels: of the stream's calls.

    Attributes:
        steady: whether the inputs follow their own direction at all, as far as can be told.
    """

    def __init__(self, levels: NoiseLevels) -> None:
        self.steady = True
        self._levels = levels
        self._points: deque[tuple[float, torch.Tensor]] = deque(maxlen=3)  # sigma, input / scale
        self._call, self._input = -1, torch.empty(0)
        self._still = self._steadiness = torch.empty(0)

    def see(self, call: int, sample: torch.Tensor) -> None:
        """Note the input of ``call``: [B, ..., h, w] or [B, tokens, C]."""
        if self._call >= 0:  # channels that did not change; single elements may be equal by chance
            # pictures, in channels or frames of them, end in rows and columns; sequences [B, tokens, C] in channels
            self._still = (sample == self._input).all(1 if sample.ndim == 3 else (-2, -1), keepdim=True)
        self._call, self._input = call, sample.clone()
        sigma, point = self._levels.sigmas[call], sample.float() / self._levels.scales[call]
        if self._points and self._points[-1][0] == sigma:  # a second evaluation at the same noise: two points make no line
            self._points.pop()
        self._points.append((sigma, point))
        self._steadiness = self._judge()
        self.steady = bool(self._steadiness.mean() >= 0.5)

    def expected(self, call: int) -> torch.Tensor:
        """Make the input expected in ``call``, like the last one seen in shape and type; or return that if it was this call's."""
        if call == self._call or len(self._points) < 2:  # one point makes no line
            return self._input
        sigma, scale = self._levels.sigmas[call], self._levels.scales[call]
        (before, older), (here, point) = list(self._points)[-2:]
        expected = point + self._steadiness * (point - older) * ((sigma - here) / (here - before))
        # what did not change at all, such as the mask of an inpainting model, will not
        return torch.where(self._still, self._input, (expected * scale).to(self._input.dtype))

    def _judge(self) -> torch.Tensor:
        """Judge for each item which part of a predicted step happens: [B, 1, ...], in 0..1, by the last step that can be judged.

        Near 1 for deterministic samplers, small where fresh noise is added. (The least-squares factor between the last step and
        its prediction.)
        """
        if len(self._points) < 3:
            return self._input.new_ones((), dtype=torch.float32)
        (first, a), (second, b), (third, c) = self._points
        predicted, happened = (b - a) * ((third - second) / (second - first)), c - b
        predicted = predicted.masked_fill(self._still, 0)
        factor = (predicted * happened).flatten(1).sum(1) / predicted.square().flatten(1).sum(1).clamp_min(1e-30)
        return factor.clamp(0, 1).reshape(-1, *[1] * (c.ndim - 1))


class Outlooks:
    """The outlook of a sample that may be several tensors, such as a video and its sound."""

    def __init__(self, levels: NoiseLevels) -> None:
        self._levels = levels
        self._each: list[Outlook] = []

    def see(self, call: int, samples: Sequence[torch.Tensor]) -> None:
        """Note the inputs of ``call``; see :meth:`Outlook.see`."""
        self._each = self._each or [Outlook(self._levels) for _ in samples]
        for outlook, sample in zip(self._each, samples, strict=True):
            outlook.see(call, sample)

    @property
    def steady(self) -> bool:
        """Whether all of them can be foreseen."""
        return all(outlook.steady for outlook in self._each)

    def expected(self, call: int) -> list[torch.Tensor]:
        """Make the inputs expected in ``call``; see :meth:`Outlook.expected`."""
        return [outlook.expected(call) for outlook in self._each]
