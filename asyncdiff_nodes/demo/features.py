"""How far a set of pictures is from the set that the demo model was trained on: a kernel distance on features of its own UNet.

The usual extractor, an Inception network, has to be downloaded and has seen photographs; features inside a denoising network tell
pictures apart as well (Tang et al., NeurIPS 2023, *Emergent correspondence from image diffusion*), and this one knows emoji.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from safetensors.torch import load_file

from .pipeline import WEIGHTS, DemoPipeline

TRAINING_SET = WEIGHTS / "training_features.safetensors"  # written by tools/demo_model/features.py


_extractor = cache(DemoPipeline.load)


@torch.no_grad()
def features(pictures: np.ndarray) -> np.ndarray:
    """Features [B, D] of pictures [B, size, size, 3] in 0..1: the UNet's innermost values at timestep 0, averaged over space."""
    pipeline, found = _extractor(), []
    unet = pipeline.denoiser
    images = torch.nn.functional.pixel_unshuffle(torch.from_numpy(pictures).permute(0, 3, 1, 2).mul(2).sub(1), 2)
    handle = unet.mid_block.register_forward_hook(lambda _, __, output: found.append(output.float().mean(dim=(2, 3))))
    try:
        for batch in images.split(64):
            unet(batch, 0, encoder_hidden_states=pipeline.encode([""] * len(batch)), return_dict=False)
    finally:
        handle.remove()
    return torch.cat(found).numpy()


@cache
def training_features() -> np.ndarray:
    """Features [295, D] of the training pictures, which are not part of the package."""
    return load_file(TRAINING_SET)["features"].float().numpy()


def kernel_distance(found: np.ndarray, reference: np.ndarray) -> float:
    """Between two sets of features [n, D] and [m, D]: squared maximum mean discrepancy, times 1000.

    The unbiased estimate with the kernel of the kernel inception distance, (x.y / D + 1)^3 (Binkowski et al., ICLR 2018), on
    features standardised by the reference. It is below zero where each picture has a near copy in the reference, as if a model
    has learnt its pictures by heart. Compare sets of the same prompts and seeds.
    """
    mean, deviation = reference.mean(axis=0), reference.std(axis=0)
    x, y = (found - mean) / deviation, (reference - mean) / deviation

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: np.ndarray) -> float:
        pairs = kernel(a, a)
        return float((pairs.sum() - np.trace(pairs)) / (pairs.size - len(a)))

    return 1000 * (within(x) + within(y) - 2 * float(kernel(x, y).mean()))
