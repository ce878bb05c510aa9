"""How near pictures are, and which run costs as much as another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from skimage.metrics import peak_signal_noise_ratio

from asyncdiff_nodes.engine import NoiseLevels


def psnr(reference: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """The PSNR of each picture [B, H, W, 3], in dB; identical ones count as 100 dB."""
    with np.errstate(divide="ignore"):
        values = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(reference, pictures, strict=True)]
    return np.minimum(values, 100.0)


def equal_cost(levels: Callable[[str, int], NoiseLevels], scheduler: str, steps: int, cost: float) -> int:
    """Steps of the shortest run whose calls reach ``cost``, at most ``steps``: rounded up, in its favour."""
    return next((fewer for fewer in range(1, steps) if len(levels(scheduler, fewer).sigmas) >= cost), steps)
