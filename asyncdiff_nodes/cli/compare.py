"""``asyncdiff compare``: what asynchrony does to the pictures, beside the published method and beside fewer steps at equal cost.

Pictures of the demo model, in a single process (the simulator computes what the ranks would). Costs are in full evaluations of
the network per picture, by MACs: see :meth:`~asyncdiff_nodes.engine.Placement.cost`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table
from scipy.stats import t as student
from skimage.metrics import structural_similarity

from asyncdiff_nodes.demo import DemoPipeline
from asyncdiff_nodes.demo.features import features, kernel_distance, training_features
from asyncdiff_nodes.demo.pipeline import SCHEDULERS, WEIGHTS
from asyncdiff_nodes.engine import Placement, Plan, PlanError, Simulator
from asyncdiff_nodes.engine.devices import parse_devices

from .demo import psnr
from .report import console, parse_plans, positive
from .zoo import PUBLISHED_CUTS

METHODS = {"published": "published", "ours": "AsyncDiff, this project", "fewer-steps": "fewer steps"}
_BATCH = 8  # pictures drawn at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument(
        "--plans",
        default="2,1,3,1;3,1,3,1;4,1,3,1;2,2,3,1;3,2,3,1",
        help="segments,stride,warmup,cooldown; separated by semicolons. The published method has no cool-down",
    )
    parser.add_argument(
        "--runs", default="ddim:50,ddim:20,dpmpp_2m:20,euler_a:20", help="sampler:steps or sampler:steps:pairs, comma-separated"
    )
    parser.add_argument("--pairs", type=positive, default=64, help="pictures, of as many prompts of the training set")
    parser.add_argument("--cfg", type=float, default=None, help="guidance scale; default: the model's")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--threads", type=positive, default=1, help="threads of each process on a CPU")
    parser.add_argument("--jobs", type=positive, default=1, help="processes that draw at once")
    parser.add_argument("--html", metavar="FILE", default=None, help="also write a page with plots and pictures, in one file")


@dataclass(frozen=True)
class Job:
    """Pictures to draw: all pairs of prompt and seed of one method; ``plan`` None for the unrouted model."""

    sampler: str
    steps: int
    plan: Plan | None
    pairs: int
    cfg: float | None
    device: str
    threads: int


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns one row per method, plan, sampler and number of steps."""
    plans, cases = parse_plans(arguments.plans), _cases(arguments.runs, arguments.pairs)
    if late := [plan for plan in plans if any(plan.warmup + plan.cooldown >= steps for _, steps, _ in cases)]:
        raise PlanError(
            f"--runs {arguments.runs} leaves no asynchronous step between warm-up and cool-down ({late[0]}): take more"
        )
    if unknown := [plan for plan in plans if plan.segments not in PUBLISHED_CUTS["demo"]]:
        raise PlanError(f"--plans: the published method has no cuts for {unknown[0].segments} segments: choose 2, 3 or 4")
    parse_devices([arguments.device])
    facts = {name: getattr(arguments, name) for name in ("cfg", "device")}

    def job(sampler: str, steps: int, pairs: int, plan: Plan | None = None) -> Job:
        return Job(sampler, steps, plan, pairs, threads=arguments.threads, **facts)

    out = console()
    wanted: list[tuple[dict[str, Any], Job]] = []  # rows, and what to draw for them
    for sampler, steps, pairs in cases:
        case, levels = {"sampler": sampler, "steps": steps}, _pipeline().levels(sampler, steps)
        wanted.append(({"method": "sequential", "plan": None, **case, "cost": steps}, job(sampler, steps, pairs)))
        for plan in plans:
            of = {"plan": f"{plan.segments},{plan.stride},{plan.warmup}", **case}
            published = replace(plan, cuts=PUBLISHED_CUTS["demo"][plan.segments], forecast=0, cooldown=0)
            for method, variant in (("published", published), ("ours", plan)):
                cost = _placement(variant).cost(steps, levels)
                row = {"method": method, **of, "cooldown": variant.at(levels).cooldown, "cost": cost}
                wanted.append((row, job(sampler, steps, pairs, variant)))
            fewer = min(steps, math.ceil(cost))  # as many as ours could pay for, rounded in their favour
            wanted.append(({"method": "fewer-steps", **of, "cost": fewer}, job(sampler, fewer, pairs)))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn) as pool, Progress(console=out, transient=True) as progress:
        jobs = list(dict.fromkeys(todo for _, todo in wanted))
        drawn = dict(zip(jobs, progress.track(pool.map(_draw, jobs), total=len(jobs)), strict=True))
    rows = []
    for row, todo in wanted:
        if row["method"] == "sequential":
            sequential = drawn[todo]
        rows.append({**row, **_distance(sequential, drawn[todo])})
    _print(rows, out)
    if arguments.html:
        from .compare_page import write_page  # here, not above: every command imports this module

        write_page(arguments.html, arguments.invocation, rows, [drawn[todo] for _, todo in wanted], METHODS)
        out.print(f"{arguments.html}: plots and pictures")
    return {"model": "demo", **facts, "rows": rows}


@cache
def _pipeline() -> DemoPipeline:
    return DemoPipeline.load()


@cache
def _placement(plan: Plan) -> Placement:
    with Simulator(_pipeline().unet, plan) as simulator:
        return simulator.placement


def _draw(job: Job) -> np.ndarray:
    """Pictures [seeds * prompts, H, W, 3] in 0..1."""
    pipeline = _pipeline()
    torch.set_num_threads(job.threads)
    for module in (pipeline.unet, pipeline.text_encoder):
        module.to(job.device)
    with ExitStack() as stack:
        options: dict[str, Any] = {} if job.cfg is None else {"cfg": job.cfg}
        if job.plan is not None:
            simulator = stack.enter_context(Simulator(pipeline.unet, job.plan))
            options |= {"unet": simulator, "on_start": simulator.begin}
        draw = partial(pipeline.sample, steps=job.steps, scheduler=job.sampler, output="float", **options)
        prompts = _prompts(job.pairs)
        return np.concatenate([draw(prompts[i : i + _BATCH], seed=i // _BATCH) for i in range(0, job.pairs, _BATCH)])


def _prompts(count: int) -> list[str]:
    """Evenly spread over those of the training set."""
    known = json.loads((WEIGHTS / "prompts.json").read_text(encoding="utf-8"))["training"]
    return [known[index * len(known) // count] for index in range(count)]


def _distance(reference: np.ndarray, pictures: np.ndarray) -> dict[str, Any]:
    """Means over the pairs of pictures, for PSNR with its 95 % interval (Student's t), and the distance to the training set."""
    values = psnr(reference, pictures)
    mean, count = float(values.mean()), len(values)
    half = float(student.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf
    likeness = [structural_similarity(a, b, data_range=1.0, channel_axis=2) for a, b in zip(reference, pictures, strict=True)]
    return {
        "psnr": mean, "psnr_ci": [mean - half, mean + half], "ssim": float(np.mean(likeness)), "pairs": count,
        "kernel_distance": kernel_distance(features(_pipeline(), pictures), training_features()),
    }  # fmt: skip


def _cases(text: str, pairs: int) -> list[tuple[str, int, int]]:
    """Samplers, numbers of steps and of pairs."""
    cases = []
    for word in text.split(","):
        sampler, *numbers = word.strip().split(":")
        if sampler not in SCHEDULERS:
            raise ValueError(f"--runs {text!r}: choose from {', '.join(SCHEDULERS)}, not {sampler!r}")
        try:
            steps, *more = map(positive, numbers)
            (own,) = more or [pairs]
        except (argparse.ArgumentTypeError, ValueError):
            raise ValueError(
                f"--runs {text!r}: write sampler:steps or sampler:steps:pairs, such as ddim:50 or ddim:50:8"
            ) from None
        cases.append((sampler, steps, own))
    return cases


def _print(rows: list[dict[str, Any]], out: Any) -> None:
    table = Table(
        "sampler", "steps", "pairs", "plan", "method", "cost", "PSNR, dB", "95 % interval", "SSIM", "kernel distance",
        title="Distance from the sequential pictures",
    )  # fmt: skip
    for row in rows:
        if row["method"] != "sequential":
            low, high = row["psnr_ci"]
            table.add_row(
                row["sampler"], str(row["steps"]), str(row["pairs"]), row["plan"], METHODS[row["method"]], f"{row['cost']:.1f}",
                f"{row['psnr']:.1f}", f"{low:.1f} to {high:.1f}", f"{row['ssim']:.3f}", f"{row['kernel_distance']:.1f}",
                end_section=row["method"] == "fewer-steps",
            )  # fmt: skip
    out.print(table)
