"""``asyncdiff compare``: what asynchrony does to the pictures, beside the published method and beside fewer steps at equal cost.

Pictures of the demo model, in a single process (the simulator computes what the ranks would). Costs are in full evaluations of
the network per picture: ``W + ceil((T - W) / S) * largest share``, shares in MACs.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table
from scipy.stats import t as student
from skimage.metrics import structural_similarity

from asyncdiff_nodes.demo import DemoPipeline
from asyncdiff_nodes.demo.pipeline import SCHEDULERS
from asyncdiff_nodes.engine import PlanError, Simulator
from asyncdiff_nodes.engine.devices import parse_devices

from .demo import PROMPTS, psnr
from .report import console, parse_plans, positive
from .zoo import PUBLISHED_CUTS

METHODS = {"published": "published", "ours": "AsyncDiff, this project", "fewer-steps": "fewer steps"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument(
        "--plans", default="2,1,3;3,1,3;4,1,3;2,2,3;3,2,3", help="segments,stride,warmup; separated by semicolons"
    )
    parser.add_argument("--samplers", default="ddim,dpmpp_2m,euler,euler_a", help="comma-separated")
    parser.add_argument("--steps", default="50,20", help="denoising steps; comma-separated")
    parser.add_argument("--seeds", type=positive, default=8, help=f"seeds; each draws {len(PROMPTS)} prompts")
    parser.add_argument("--cfg", type=float, default=None, help="guidance scale; default: the model's")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads on a CPU")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns one row per method, plan, sampler and number of steps."""
    plans = parse_plans(arguments.plans)
    cases = [(sampler, steps) for sampler in _samplers(arguments.samplers) for steps in _steps(arguments.steps)]
    if late := [plan for plan in plans if any(plan.warmup >= steps for _, steps in cases)]:
        raise PlanError(f"--steps {arguments.steps} leaves no asynchronous step for a warm-up of {late[0].warmup}: take more")
    if unknown := [plan for plan in plans if plan.segments not in PUBLISHED_CUTS["demo"]]:
        raise PlanError(f"--plans: the published method has no cuts for {unknown[0].segments} segments: choose 2, 3 or 4")
    (device,) = parse_devices([arguments.device])
    torch.set_num_threads(arguments.threads)
    pipeline, rows, out = DemoPipeline.load(), [], console()
    for module in (pipeline.unet, pipeline.text_encoder):
        module.to(device)
    options = {} if arguments.cfg is None else {"cfg": arguments.cfg}

    def draw(sampler: str, steps: int, simulator: Simulator | None = None) -> np.ndarray:
        """Pictures [seeds * prompts, H, W, 3] in 0..1."""
        routed: dict[str, Any] = {} if simulator is None else {"unet": simulator, "on_start": simulator.begin}
        found = []
        for seed in range(arguments.seeds):
            found.append(
                pipeline.sample(list(PROMPTS), steps=steps, scheduler=sampler, seed=seed, output="float", **routed, **options)
            )
            progress.advance(task)
        return np.concatenate(found)

    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("", total=arguments.seeds * len(cases) * (1 + len(plans) * len(METHODS)))
        for sampler, steps in cases:
            progress.update(task, description=f"{sampler}, {steps} steps")
            sequential = draw(sampler, steps)
            facts = {"sampler": sampler, "steps": steps}
            rows.append({"method": "sequential", "plan": None, **facts, "cost": steps, **_distance(sequential, sequential)})
            for plan in plans:
                name = f"{plan.segments},{plan.stride},{plan.warmup}"
                published = replace(plan, cuts=PUBLISHED_CUTS["demo"][plan.segments], forecast=0)
                for method, variant in (("published", published), ("ours", plan)):
                    with Simulator(pipeline.unet, variant) as simulator:
                        cost, pictures = simulator.placement.cost(steps), draw(sampler, steps, simulator)
                    rows.append({"method": method, "plan": name, **facts, "cost": cost, **_distance(sequential, pictures)})
                # as many as ours could pay for, rounded in their favour
                fewer = min(steps, math.ceil(cost))
                distance = _distance(sequential, draw(sampler, fewer))
                rows.append({"method": "fewer-steps", "plan": name, **facts, "cost": fewer, **distance})
    _print(rows, out)
    facts = {name: getattr(arguments, name) for name in ("seeds", "cfg", "device")}
    return {"model": "demo", "prompts": list(PROMPTS), **facts, "rows": rows}


def _distance(reference: np.ndarray, pictures: np.ndarray) -> dict[str, Any]:
    """Means over the pairs of pictures and, for PSNR, its 95 % interval (Student's t)."""
    values = psnr(reference, pictures)
    mean, count = float(values.mean()), len(values)
    half = float(student.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf
    likeness = [structural_similarity(a, b, data_range=1.0, channel_axis=2) for a, b in zip(reference, pictures, strict=True)]
    return {"psnr": mean, "psnr_ci": [mean - half, mean + half], "ssim": float(np.mean(likeness)), "pairs": count}


def _samplers(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(SCHEDULERS):
        raise ValueError(f"--samplers {text!r}: choose from {', '.join(SCHEDULERS)}")
    return names


def _steps(text: str) -> list[int]:
    try:
        return [positive(word.strip()) for word in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--steps {text!r}: {error}") from None


def _print(rows: list[dict[str, Any]], out: Any) -> None:
    title = f"Distance from the sequential pictures, {rows[0]['pairs']} pairs"
    table = Table("sampler", "steps", "plan", "method", "cost", "PSNR, dB", "95 % interval", "SSIM", title=title)
    for row in rows:
        if row["method"] != "sequential":
            low, high = row["psnr_ci"]
            table.add_row(
                row["sampler"], str(row["steps"]), row["plan"], METHODS[row["method"]], f"{row['cost']:.1f}",
                f"{row['psnr']:.1f}", f"{low:.1f} to {high:.1f}", f"{row['ssim']:.3f}",
                end_section=row["method"] == "fewer-steps",
            )  # fmt: skip
    out.print(table)
