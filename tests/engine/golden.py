"""The golden runs, and the loop that made them: DDIM, classifier-free guidance as one batch."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from asyncdiff_nodes.engine import Plan

FOLDER = Path(__file__).resolve().parents[1] / "goldens"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
RUNS: dict[str, dict[str, Any]] = MANIFEST["runs"]
ASYNC_RUNS = [name for name, run in RUNS.items() if run["N"] > 1]
LAYOUTS = ("sd15", "sdxl")

# the published placements
CUTS = {
    ("sd15", 2): ("conv_in", "up_blocks.1.attentions.1"),
    ("sd15", 3): ("conv_in", "mid_block", "up_blocks.2.attentions.2"),
    ("sd15", 4): ("conv_in", "down_blocks.2", "up_blocks.1.attentions.1", "up_blocks.3"),
    ("sdxl", 2): ("down_blocks.2", "up_blocks.0.resnets.2"),
    ("sdxl", 3): ("down_blocks.2", "up_blocks.0.attentions.0", "up_blocks.1"),
    ("sdxl", 4): ("down_blocks.1.attentions.0", "mid_block", "up_blocks.0.resnets.1", "up_blocks.1"),
}


def plan_of(name: str) -> Plan:
    run = RUNS[name]
    return Plan(
        segments=run["N"],
        stride=run["S"],
        warmup=run["W"],
        time_shift=run["shift"],
        forecast=0,
        cuts=CUTS[run["layout"], run["N"]],
    )


@functools.cache
def unet(layout: str) -> UNet2DConditionModel:
    model = UNet2DConditionModel.from_config(MANIFEST["layouts"][layout]["config"])
    model.load_state_dict(load_file(FOLDER / f"{layout}_unet.safetensors"))
    return model.eval()


@functools.cache
def inputs(layout: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{layout}_inputs.safetensors")


@functools.cache
def outputs(layout: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{layout}_runs.safetensors")


def conditioning(layout: str) -> dict[str, Any]:
    """Keyword arguments of every call."""
    given = inputs(layout)
    kwargs: dict[str, Any] = {"encoder_hidden_states": given["prompt_embeds"]}
    if layout == "sdxl":
        kwargs["added_cond_kwargs"] = {"text_embeds": given["text_embeds"], "time_ids": given["time_ids"]}
    return kwargs


def scheduler(steps: int) -> DDIMScheduler:
    ddim = DDIMScheduler(**{k: v for k, v in MANIFEST["scheduler"].items() if k not in ("cls", "eta")})
    ddim.set_timesteps(steps)
    return ddim


@torch.no_grad()
def sample(call: Any, layout: str, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All outputs of the network [T, 2, 4, 16, 16] and the final latents of a DDIM loop over ``call``."""
    ddim, x, kwargs = scheduler(steps), inputs(layout)["latents"], conditioning(layout)
    eps = []
    for t in ddim.timesteps:
        eps.append(call(torch.cat([x, x]), t, return_dict=False, **kwargs)[0])
        uncond, cond = eps[-1].chunk(2)
        x = ddim.step(uncond + MANIFEST["guidance_scale"] * (cond - uncond), t, x).prev_sample
    return torch.stack(eps), x
