"""Measure how long it takes from the start of a sampling to the end of its first step, and write docs/data/start.json.

python tools/measure/start.py [FILE]

Inside an installed ComfyUI, two segments on two CPU ranks, of a small network and of an SD 1.5 of true size (random weights,
float32, 256 px): with no ranks there, in the processes of a group with other cuts, and in the same group again.
Then python tools/measure/tables.py for the page that shows it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import within_host
from control_nets import SD15

ROUNDS = 5
CUTS = {"": "input_blocks.0.0, middle_block.0", "other cuts": "input_blocks.0.0, output_blocks.0.0"}


def inside(file: str) -> None:
    """Within the host: seconds to the end of the first step, in turns."""
    within_host.on_cpu()
    import folder_paths
    import nodes
    import torch

    from asyncdiff_nodes.host.routing.hooks import attach
    from asyncdiff_nodes.host.routing.options import Options
    from asyncdiff_nodes.host.workers.pool import POOL
    from helpers import small

    folder_paths.user_directory = str(Path(file).parent)  # nothing that was measured is kept
    prompts = [small.conditioning("sd15", seed) for seed in (1, 2)]

    def first_step(model: Any) -> float:
        ends = []
        sampler = nodes.comfy.samplers.KSampler(model, 2, "cpu", "euler", "normal", model_options=model.model_options)
        latent = torch.zeros(1, 4, 32, 32)
        noise = nodes.comfy.sample.prepare_noise(latent, 5)
        begin = time.perf_counter()
        sampler.sample(noise, *prompts, cfg=7.0, latent_image=latent, callback=lambda *_: ends.append(time.perf_counter()))
        return ends[0] - begin

    rows = []
    with torch.inference_mode():
        for name in ("small", "SD 1.5"):
            if name == "SD 1.5":
                small.ALL["sd15"][3].update(SD15)
            model = small.model("sd15", channels=SD15["model_channels"] if name == "SD 1.5" else 64)
            mine, other = (attach(model, Options("Custom", "cpu,cpu", segments=2, cuts=cuts)) for cuts in CUTS.values())
            taken: dict[str, list[float]] = {}
            first_step(model)
            for _ in range(ROUNDS):
                taken.setdefault("one device", []).append(first_step(model))
                POOL.release()
                taken.setdefault("none", []).append(first_step(other))
                taken.setdefault("of another plan", []).append(first_step(mine))
                taken.setdefault("of the same plan", []).append(first_step(mine))
            POOL.release()
            rows += [{"model": name, "ranks": ranks, "seconds": statistics.median(s), "rounds": s} for ranks, s in taken.items()]
    Path(file).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    inside(sys.argv[2]) if sys.argv[1:2] == ["--inside"] else within_host.measure(__file__)
