"""``asyncdiff compare``: what asynchrony does to the pictures, beside the published method and beside fewer steps at equal cost.

In a single process (the simulator computes what the ranks would). Costs are in full evaluations of the network per picture, by
MACs: see :meth:`~asyncdiff_nodes.engine.Placement.cost`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table
from scipy.stats import t as student
from skimage.metrics import structural_similarity

from asyncdiff_nodes.cli.arguments import parse_plans, positive
from asyncdiff_nodes.cli.compare_page import write_page
from asyncdiff_nodes.cli.likeness import equal_cost, psnr
from asyncdiff_nodes.cli.subjects import HELP, Subject, find_subject, graph_of
from asyncdiff_nodes.cli.tables import MIB, console, number
from asyncdiff_nodes.diffusers import SCHEDULERS
from asyncdiff_nodes.engine import Plan, PlanError, Simulator, place
from asyncdiff_nodes.engine.compression import COMPRESSIONS
from asyncdiff_nodes.engine.devices import parse_devices

METHODS = {
    "published": "published",
    "ours": "AsyncDiff here",
    "ours-fast": "here, fast cuts",
    "ours-stale": "here, stale hidden states",
    "ours-half": "here, half",
    "ours-int8": "here, int8",
    "fewer-steps": "fewer steps",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument(
        "--plans",
        default="2,1,3,1;3,1,3,1;4,1,3,1;2,2,3,1;3,2,3,1",
        help="segments,stride,warmup,cooldown; separated by semicolons. The published method has no cool-down",
    )
    parser.add_argument(
        "--runs",
        default="ddim:50,ddim:20,dpmpp_2m:20,euler_a:20,heun:10:16",
        help="sampler:steps or sampler:steps:pairs, comma-separated",
    )
    parser.add_argument(
        "--compression",
        nargs="+",
        choices=[how for how in COMPRESSIONS if how != "none"],
        default=[],
        help="also our plans with values that cross compressed in asynchronous calls",
    )
    parser.add_argument("--model", default="demo", help=HELP)
    parser.add_argument("--pairs", type=positive, default=64, help="pictures; the demo models' prompts are of their training set")
    parser.add_argument("--cfg", type=float, default=None, help="guidance scale; default: the model's")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--threads", type=positive, default=1, help="threads of each process on a CPU")
    parser.add_argument("--jobs", type=positive, default=1, help="processes that draw at once")
    parser.add_argument("--html", metavar="FILE", default=None, help="also write a page with plots and pictures, in one file")


@dataclass(frozen=True)
class Job:
    """Pictures to draw: all pairs of prompt and seed of one method; ``plan`` None for the unrouted model."""

    model: str
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
    parse_devices([arguments.device])
    subject = _subject(arguments.model)
    graph = graph_of(subject.denoiser)
    cuts = {plan.segments: subject.published_cuts(graph, plan.segments) for plan in plans}
    facts = {name: getattr(arguments, name) for name in ("model", "cfg", "device")}

    def job(sampler: str, steps: int, pairs: int, plan: Plan | None = None) -> Job:
        return Job(sampler=sampler, steps=steps, plan=plan, pairs=pairs, threads=arguments.threads, **facts)

    out = console()
    wanted: list[tuple[dict[str, Any], Job]] = []  # rows, and what to draw for them
    for sampler, steps, pairs in cases:
        case, levels = {"sampler": sampler, "steps": steps}, subject.levels(sampler, steps)
        calls = len(levels.sigmas)
        wanted.append(({"method": "sequential", "plan": None, **case, "cost": calls}, job(sampler, steps, pairs)))
        for plan in plans:
            of = {"plan": f"{plan.segments},{plan.stride},{plan.warmup}", **case}
            published = replace(plan, cuts=cuts[plan.segments], forecast=0, cooldown=0)
            variants = {"published": published, "ours": plan, "ours-fast": replace(plan, fresh_skips=False)}
            placements = {method: place(graph, variant) for method, variant in variants.items()}
            if placements["ours-fast"].starts == placements["ours"].starts:
                del variants["ours-fast"]  # there is nothing to make fresh
            if placements["ours"].hidden:  # the same cuts, but for the embedding, which is then the first segment's alone
                variants["ours-stale"] = replace(plan, cuts=(graph.names[0], *placements["ours"].cuts[1:]))
            variants |= {f"ours-{how}": replace(plan, compression=how) for how in arguments.compression}
            placements |= {method: place(graph, variant) for method, variant in variants.items() if method not in placements}
            for method, variant in variants.items():
                placement = placements[method]
                row = {"method": method, **of, "cooldown": variant.at(levels).cooldown, "cost": placement.cost(calls, levels)}
                row["mib_per_call"] = placement.bytes_per_call / MIB
                wanted.append((row, job(sampler, steps, pairs, variant)))
            fewer = equal_cost(subject.levels, sampler, steps, placements["ours"].cost(calls, levels))
            cost = len(subject.levels(sampler, fewer).sigmas)
            wanted.append(({"method": "fewer-steps", **of, "cost": cost}, job(sampler, fewer, pairs)))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn) as pool, Progress(console=out, transient=True) as progress:
        jobs = list(dict.fromkeys(todo for _, todo in wanted))
        drawn = dict(zip(jobs, progress.track(pool.map(_draw, jobs), total=len(jobs)), strict=True))
    rows = []
    for row, todo in wanted:
        if row["method"] == "sequential":
            sequential = drawn[todo]
        rows.append({**row, **_distance(subject, sequential, drawn[todo])})
    _print(rows, out)
    if arguments.html:
        write_page(arguments.html, arguments.invocation, rows, [drawn[todo] for _, todo in wanted], METHODS)
        out.print(f"{arguments.html}: plots and pictures")
    return {**facts, "rows": rows}


_subject = cache(find_subject)


def _draw(job: Job) -> np.ndarray:
    """Pictures [pairs, H, W, 3] in 0..1."""
    subject = _subject(job.model)
    torch.set_num_threads(job.threads)
    subject.to(job.device)
    prompts, size = subject.prompts(job.pairs), subject.batch
    with nullcontext() if job.plan is None else Simulator(subject.denoiser, job.plan) as simulator:
        how = {"steps": job.steps, "scheduler": job.sampler, "cfg": job.cfg, "simulator": simulator}
        return np.concatenate([subject.draw(prompts[i : i + size], seed=i // size, **how) for i in range(0, job.pairs, size)])


def _distance(subject: Subject, reference: np.ndarray, pictures: np.ndarray) -> dict[str, Any]:
    """Means over the pairs of pictures, for PSNR with its 95 % interval (Student's t), and the distance from the training set."""
    values = psnr(reference, pictures)
    mean, count = float(values.mean()), len(values)
    half = float(student.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf
    likeness = [structural_similarity(a, b, data_range=1.0, channel_axis=2) for a, b in zip(reference, pictures, strict=True)]
    return {
        "psnr": mean, "psnr_ci": [mean - half, mean + half], "ssim": float(np.mean(likeness)), "pairs": count,
        "kernel_distance": subject.kernel_distance(pictures),
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
        "sampler", "steps", "plan", "method", "cost", "MiB per call", "PSNR, dB", "95 % interval", "SSIM", "kernel distance",
        title="Distance from the sequential pictures",
    )  # fmt: skip
    for row in rows:
        if row["method"] != "sequential":
            low, high = row["psnr_ci"]
            table.add_row(
                row["sampler"], str(row["steps"]), row["plan"], METHODS[row["method"]], f"{row['cost']:.1f}",
                number(row.get("mib_per_call"), 2), f"{row['psnr']:.1f}", f"{low:.1f} to {high:.1f}", f"{row['ssim']:.3f}",
                number(row["kernel_distance"], 1),
                end_section=row["method"] == "fewer-steps",
            )  # fmt: skip
    out.print(table)
