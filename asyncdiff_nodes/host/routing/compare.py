"""Sample one picture twice: as usual, and on all devices."""

from __future__ import annotations

import math
import time
from typing import Any

import nodes
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from asyncdiff_nodes.host.page.report import last_run

from .hooks import attach
from .options import Options

_HOOK = "asyncdiff.compare"


def compare(model: ModelPatcher, options: Options | None, vae: Any, **inputs: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Sample with and without AsyncDiff.

    Args:
        vae: with one, pictures are compared; with None, latents.
        inputs: inputs of the host's KSampler other than the model.

    Returns:
        AsyncDiff's latent, KSampler's latent, and a text that compares them.
    """
    usual, usual_seconds = _sample(model, inputs)
    routed, routed_seconds = _sample(attach(model, options), inputs)
    before, after = (usual["samples"], routed["samples"]) if vae is None else (_pictures(vae, usual), _pictures(vae, routed))
    peak = (before.max() - before.min()).item() if vae is None else 1.0
    error = (before.double() - after.double()).square().mean().item()
    what = "latents" if vae is None else "pictures"
    distance = f"PSNR of the {what}: {10 * math.log10(peak**2 / error):.1f} dB" if error else f"The {what} are the same"
    span = "one step" if inputs["steps"] == 1 else f"steps 2 to {inputs['steps']}"
    lines = [
        distance,
        f"KSampler {usual_seconds:.2f} s, AsyncDiff {routed_seconds:.2f} s for {span}: {usual_seconds / routed_seconds:.2f}x",
        last_run().text(),
    ]
    return routed, usual, "\n".join(lines)


def _sample(model: ModelPatcher, inputs: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The latent, and the seconds from the end of the first step to the end of the sampling, so without loading and starting."""
    marks: list[float] = []

    def timed(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        *before, callback = args[:6]

        def tell(*progress: Any) -> Any:
            marks.append(time.perf_counter())
            return callback(*progress) if callback is not None else None

        marks.append(time.perf_counter())
        result = executor(*before, tell, *args[6:], **kwargs)  # it is on the CPU, so the devices are done
        marks.append(time.perf_counter())
        return result

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _HOOK, timed)
    (latent,) = nodes.KSampler().sample(clone, **inputs)
    return latent, marks[-1] - marks[min(1, len(marks) - 2)] if inputs["steps"] > 1 else marks[-1] - marks[0]


def _pictures(vae: Any, latent: dict[str, Any]) -> torch.Tensor:
    return vae.decode(latent["samples"]).clamp(0, 1)
