"""Measure what it gains that the ranks compute ControlNets, too, and write docs/data/control_nets.json.

python tools/measure/control_nets.py [FILE]

An SD 1.5 of true size and a ControlNet for it (random weights: it is about time), 256 px, CFG, inside an installed ComfyUI. Each
device is a core: ranks are pinned to one each, and ComfyUI's own work to the first, where a GPU's would be (Linux only). Then
python tools/measure/tables.py for the page that shows it.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import within_host

STEPS = 14
COUNTED = 5  # of them, the last: by then blocks are where what was measured says
ROUNDS = 2
SD15 = {
    "model_channels": 320,
    "num_res_blocks": [2] * 4,
    "channel_mult": (1, 2, 4, 4),
    "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "context_dim": 768,
}
PLANS = {"segments": {"segments": 2, "warmup": 2, "cooldown": 0}, "branches": {"branches": 2}}


def inside(file: str) -> None:
    """Within the host: seconds per step, unrouted and under each plan, with the ControlNet here or there, in turns."""
    within_host.on_cpu()
    import folder_paths
    import nodes
    import psutil
    import torch

    from asyncdiff_nodes.host.routing.hooks import attach
    from asyncdiff_nodes.host.routing.options import Options
    from asyncdiff_nodes.host.workers.pool import POOL
    from helpers import small

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    folder_paths.user_directory = str(Path(file).parent)  # nothing that was measured is kept
    small.ALL["sd15"][3].update(SD15)
    model, prompts = small.model("sd15", channels=SD15["model_channels"]), [small.conditioning("sd15", seed) for seed in (1, 2)]
    hint = small.hint().repeat(1, 2, 2, 1)
    net = small.control_net("sd15", channels=SD15["model_channels"])
    controlled = nodes.ControlNetApplyAdvanced().apply_controlnet(*prompts, net, hint, 0.9, 0.0, 1.0, None)

    def seconds(model: Any, prompts: Any) -> float:
        """Median of the last steps."""
        ends = []

        def step(*_: Any) -> None:
            ends.append(time.perf_counter())
            for process in multiprocessing.active_children() if len(ends) == 1 else ():
                for thread in psutil.Process(process.pid).threads():
                    os.sched_setaffinity(thread.id, [cores[int(process.name.rpartition("-")[2])]])

        sampler = nodes.comfy.samplers.KSampler(model, STEPS, "cpu", "euler", "normal", model_options=model.model_options)
        latent = torch.zeros(1, 4, 32, 32)
        noise = nodes.comfy.sample.prepare_noise(latent, 5)
        sampler.sample(noise, *prompts, cfg=7.0, latent_image=latent, callback=step)
        return statistics.median(b - a for a, b in itertools.pairwise(ends[-COUNTED - 1 :]))

    taken: dict[tuple[str, str], list[float]] = {}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            taken.setdefault(("one device", "none"), []).append(seconds(model, prompts))
            taken.setdefault(("one device", "fresh"), []).append(seconds(model, controlled))
            for (plan, knobs), where in itertools.product(PLANS.items(), ("fresh", "shared")):
                routed = attach(model, Options("Custom", "cpu,cpu", control_nets=where, **knobs))
                taken.setdefault((plan, where), []).append(seconds(routed, controlled))
                POOL.release()
    one = statistics.median(taken["one device", "fresh"])
    rows = []
    for (plan, where), times in taken.items():
        each = statistics.median(times)
        rows.append({"plan": plan, "control_nets": where, "seconds_per_step": each, "speedup": one / each, "rounds": times})
    Path(file).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    inside(sys.argv[2]) if sys.argv[1:2] == ["--inside"] else within_host.measure(__file__)
