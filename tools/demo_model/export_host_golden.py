"""Write what the demo model gives in diffusers, for the tests that run it inside ComfyUI, where diffusers is not installed.

    python tools/demo_model/export_host_golden.py

The file holds, for a batch of two at two timesteps: ``x`` [2, 3, 32, 32] (float16, unit noise, as pixels), ``t`` [2],
``context`` [2, 8, 96] (row 0 the empty prompt, row 1 the prompt) and ``v`` [2, 3, 32, 32], the UNet's output, as pixels.
And ``picture`` [32, 32, 3] uint8: the prompt drawn from the noise ``x[0]`` by diffusers' Euler sampler. Prompt, steps
and guidance are the JSON under ``run`` in the metadata.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from asyncdiff_nodes.demo import DemoPipeline

FILE = Path(__file__).resolve().parents[2] / "tests" / "host" / "goldens" / "demo_unet.safetensors"
PROMPT, STEPS, CFG = "red heart", 20, 3.0


def host_euler(pipeline: DemoPipeline) -> EulerDiscreteScheduler:
    """diffusers' Euler sampler at the timesteps of the host's scheduler "simple"."""
    config = pipeline.make_scheduler("euler").config
    return EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing", steps_offset=0)


def draw(pipeline: DemoPipeline, noise: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Picture [3, 32, 32] in [-1, 1] from unit noise [1, 3, 32, 32] and the context [2, L, D]."""
    solver = host_euler(pipeline)
    solver.set_timesteps(STEPS)
    # The host scales the first noise to the variance sigma^2 + 1, diffusers here to sigma^2.
    image = pixel_unshuffle(noise, 2) * (solver.sigmas[0] ** 2 + 1).sqrt()
    for timestep in solver.timesteps:
        scaled = solver.scale_model_input(image, timestep)
        uncond, cond = pipeline.denoiser(torch.cat([scaled, scaled]), timestep, context, return_dict=False)[0].chunk(2)
        image = solver.step(uncond + CFG * (cond - uncond), timestep, image, return_dict=False)[0]
    return pixel_shuffle(image, 2)[0]


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    pipeline = DemoPipeline.load()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).half()
    t = torch.tensor([999, 250])
    context = pipeline.encode(["", PROMPT])
    v = pixel_shuffle(pipeline.denoiser(pixel_unshuffle(x.float(), 2), t, context, return_dict=False)[0], 2)
    picture = draw(pipeline, x[:1].float(), context).add(1).div(2).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    tensors = {"x": x, "t": t, "context": context, "v": v.contiguous(), "picture": picture.contiguous()}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    # One entry, since their order in the file is not fixed.
    save_file(tensors, FILE, metadata={"run": json.dumps({"prompt": PROMPT, "steps": STEPS, "cfg": CFG})})
    FILE.chmod(0o644)  # safetensors writes files that only their owner may read


if __name__ == "__main__":
    main()
