"""Noise schedule, loss weighting and learning-rate schedule of the demo model's training."""

from __future__ import annotations

import math
import time

import torch

#: Stable Diffusion's betas, so that stock discrete samplers fit the model.
SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


class DiffusionTable:
    """Precomputed signal and noise scales and min-SNR weights for all timesteps."""

    def __init__(self, gamma: float, device: str) -> None:
        count = SCHEDULER_CONFIG["num_train_timesteps"]
        start, end = SCHEDULER_CONFIG["beta_start"] ** 0.5, SCHEDULER_CONFIG["beta_end"] ** 0.5
        betas = torch.linspace(start, end, count, dtype=torch.float64) ** 2
        signal = torch.cumprod(1.0 - betas, 0)
        snr = signal / (1.0 - signal)
        weight = snr.clamp(max=gamma) / (snr + 1.0) if gamma > 0 else torch.ones_like(snr)
        # Mean 1, so that gamma does not change the effective learning rate.
        self.weight = (weight / weight.mean()).float().to(device)
        self.signal = signal.sqrt().float().to(device)
        self.noise = (1.0 - signal).sqrt().float().to(device)

    def corrupt(
        self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy images, v-prediction targets (both like ``clean``) and loss weights [B]."""
        a = self.signal[timesteps].view(-1, 1, 1, 1)
        s = self.noise[timesteps].view(-1, 1, 1, 1)
        return a * clean + s * noise, a * noise - s * clean, self.weight[timesteps]


def cosine_lr(peak: float, fraction: float, warmup: float) -> float:
    """Learning rate after ``fraction`` of the budget (0..1); ``warmup`` (0..1) scales the start."""
    return peak * warmup * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, fraction))))


def wall_fraction(origin: float, deadline: float | None) -> float:
    """Share of the time between ``origin`` and ``deadline`` that has passed; 0 without a deadline."""
    if deadline is None:
        return 0.0
    return (time.time() - origin) / max(1.0, deadline - origin)
