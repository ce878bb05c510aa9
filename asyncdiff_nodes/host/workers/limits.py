"""Weights that were too many for a device beside a model's calls: the model's next ranks get fewer there."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from asyncdiff_nodes.engine import Placement

_SHARE = 0.75  # of the weights that were too many

# bytes by latent and device, of each of the host's models
_known: weakref.WeakKeyDictionary[Any, dict[tuple[tuple[int, ...], str], float]] = weakref.WeakKeyDictionary()


class Limits:
    """The limits of one model with latents of one shape.

    Args:
        model: of the host.
        latent: the shape of the sampler's latent.

    Attributes:
        tried: where the weights were meant to be, of the ranks that were started last.
    """

    tried: Placement | None = None

    def __init__(self, model: Any, latent: Sequence[int]) -> None:
        self._limits = _known.setdefault(model, {})
        self._latent = tuple(latent)

    def of(self, devices: Sequence[str], room: Sequence[float]) -> list[float]:
        """Return ``room``, bytes of weights on each of ``devices``, as far as it is not known to be less."""
        return [min(each, self._limits.get((self._latent, device), each)) for device, each in zip(devices, room, strict=True)]

    def lower(self, device: str, weights: float) -> None:
        """Note that so many bytes of weights were too many on ``device``."""
        self._limits[self._latent, device] = _SHARE * weights


def forget() -> None:
    """Forget all limits."""
    _known.clear()
