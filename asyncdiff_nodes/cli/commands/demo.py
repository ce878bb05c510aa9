"""``asyncdiff demo``: the shipped model makes the same pictures sequentially and with AsyncDiff, side by side."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.progress import Progress
from rich.table import Table

from asyncdiff_nodes.cli.arguments import positive
from asyncdiff_nodes.cli.likeness import equal_cost, psnr
from asyncdiff_nodes.cli.tables import MIB, console
from asyncdiff_nodes.demo import DemoPipeline
from asyncdiff_nodes.diffusers import SCHEDULERS
from asyncdiff_nodes.engine import Plan, RankOptions, WorkerGroup, block_seconds, find_family, meta_copy, trace

PROMPTS = ("red heart", "dog face", "pizza", "sunflower", "soccer ball", "strawberry", "octopus", "rocket")
_ZOOM, _GAIN = 4, 4  # picture pixels per model pixel; amplification of the difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("prompts", nargs="*", default=list(PROMPTS), help="one picture each")
    parser.add_argument("--segments", type=int, default=2, metavar="N", help="parts that the network is cut into")
    parser.add_argument("--stride", type=int, default=1, metavar="S", help="steps served by one parallel call, 1 to 4")
    parser.add_argument("--warmup", type=int, default=3, metavar="W", help="synchronous steps at the start")
    parser.add_argument("--cooldown", type=int, default=1, metavar="C", help="synchronous steps at the end")
    parser.add_argument("--steps", type=positive, default=30, metavar="T", help="denoising steps")
    parser.add_argument("--scheduler", default="ddim", help=", ".join(SCHEDULERS))
    parser.add_argument("--cfg", type=float, default=None, help="guidance scale; default: the model's")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise")
    parser.add_argument("--devices", default=None, help="comma-separated, one per rank; default: cpu for each")
    parser.add_argument("--threads", type=positive, default=1, help="threads per device, for both sides of the comparison")
    parser.add_argument("--out", default="out", metavar="DIR", help="folder for the pictures")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the pictures, print the table, write the PNG; returns the table's numbers."""
    plan = Plan(arguments.segments, arguments.stride, arguments.warmup, cooldown=arguments.cooldown)
    devices = arguments.devices.split(",") if arguments.devices else ["cpu"] * plan.world_size
    torch.set_num_threads(arguments.threads)
    out, pipeline = console(), DemoPipeline.load()
    for word in pipeline.unknown_words(arguments.prompts):
        out.print(f"note: the demo model does not know the word {word!r}", markup=False)

    def sample(unet: Callable[..., Any], begin: Callable[..., None], steps: int, advance: Callable[[], None]) -> Any:
        """Pictures [B, H, W, 3] in 0..1, and seconds of each step."""
        times: list[float] = []

        def on_start(*schedule: Any, **levels: Any) -> None:
            begin(*schedule, **levels)
            times.append(time.perf_counter())

        def callback(_: int, __: int) -> None:
            times.append(time.perf_counter())
            advance()

        options = {} if arguments.cfg is None else {"cfg": arguments.cfg}
        pictures = pipeline.sample(
            list(arguments.prompts), steps=steps, scheduler=arguments.scheduler, seed=arguments.seed, denoiser=unet,
            on_start=on_start, callback=callback, output="float", **options,
        )  # fmt: skip
        return pictures, [b - a for a, b in itertools.pairwise(times)]

    rows, pictures, placements = [], {}, {}
    with Progress(console=out, transient=True) as progress:

        def advancing(name: str, steps: int) -> Callable[[], None]:
            task = progress.add_task(name, total=steps)
            return lambda: progress.advance(task)

        total, levels = arguments.steps, pipeline.levels(arguments.scheduler, arguments.steps)
        calls = len(levels.sigmas)
        sequential, times = sample(pipeline.denoiser, _nothing, total, advancing("sequential", calls))
        # the first step pays for one-time preparations on both sides
        rows.append(
            {
                "method": "sequential",
                "steps": total,
                "calls": calls,
                "call_s": statistics.median(times[1:] or times),
                "speedup": 1.0,
            }
        )
        known = _block_costs(pipeline, list(arguments.prompts)), [1.0] * plan.world_size, 0.0  # devices are taken for equal
        ranks = RankOptions(threads_per_rank=arguments.threads)
        for method, variant in (("AsyncDiff", plan), ("plain reuse", replace(plan, forecast=0, cooldown=0))):
            progress.console.print(f"starting {plan.world_size} processes: {', '.join(devices)}")
            with WorkerGroup(pipeline.denoiser, variant, devices, estimate=lambda _: known, ranks=ranks) as group:
                placements[method] = group.placement
                sample(group, group.begin, min(total, plan.warmup + 2), lambda: None)  # one-time preparations
                pictures[method], times = sample(group, group.begin, total, advancing(method, calls))
                stats = group.stats()
            # medians of whole batches, since the later calls of a batch take no time
            some = times[plan.warmup : calls - variant.at(levels).cooldown] or times
            batches = [sum(some[i : i + plan.stride]) / plan.stride for i in range(0, len(some), plan.stride)]
            row = {"method": method, "steps": total, "calls": calls, "call_s": statistics.median(batches)}
            rows.append({**row, "mib_per_call": stats.bytes_per_call / MIB})
        fewer = equal_cost(pipeline.levels, arguments.scheduler, total, placements["AsyncDiff"].cost(calls, levels))
        calls = len(pipeline.levels(arguments.scheduler, fewer).sigmas)
        pictures["fewer steps"], times = sample(pipeline.denoiser, _nothing, fewer, advancing("fewer steps", calls))
        rows.append({"method": "fewer steps", "steps": fewer, "calls": calls, "call_s": statistics.median(times[1:] or times)})
    for row in rows[1:]:
        row["speedup"] = rows[0]["call_s"] * rows[0]["calls"] / (row["call_s"] * row["calls"])
        row["psnr"] = float(psnr(sequential, pictures[row["method"]]).mean())
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo.png"
    _sheet(list(arguments.prompts), sequential, pictures["AsyncDiff"], plan).save(path)
    _print(rows, plan, out)
    out.print(f"{path}: sequential, AsyncDiff, difference x{_GAIN}")
    return {
        "plan": {**asdict(plan), "cuts": placements["AsyncDiff"].cuts},
        "devices": devices, "threads": arguments.threads, "scheduler": arguments.scheduler, "seed": arguments.seed,
        "prompts": list(arguments.prompts), "rows": rows, "picture": str(path),
    }  # fmt: skip


def _nothing(*_: Any, **__: Any) -> None:
    """An unrouted model has nothing to begin."""


def _block_costs(pipeline: DemoPipeline, prompts: list[str]) -> list[float]:
    """Seconds of each block for these prompts, one CFG batch; so small a model is not bound by its MACs."""
    context = pipeline.encode(prompts + prompts)
    sample = pipeline.initial_noise(len(prompts), 0).repeat(2, 1, 1, 1)
    args, kwargs = (sample, 500), {"encoder_hidden_states": context, "return_dict": False}
    graph = trace(meta_copy(pipeline.denoiser), find_family(pipeline.denoiser), args, kwargs)
    return block_seconds(pipeline.denoiser, graph, args, kwargs, repeats=5)


def _sheet(prompts: list[str], sequential: np.ndarray, asynchronous: np.ndarray, plan: Plan) -> Image.Image:
    """One column per prompt: sequential, AsyncDiff, amplified difference."""
    size, gap, label, head = sequential.shape[1] * _ZOOM, 8, 90, 24
    font = ImageFont.load_default(13)
    sheet = Image.new("RGB", (label + len(prompts) * (size + gap), head + 3 * (size + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    difference = np.clip(np.abs(asynchronous - sequential) * _GAIN, 0, 1)
    rows = {
        "sequential": sequential,
        f"AsyncDiff\nN={plan.segments} S={plan.stride}": asynchronous,
        f"difference\nx{_GAIN}": difference,
    }
    for row, (title, pictures) in enumerate(rows.items()):
        top = head + row * (size + gap)
        draw.multiline_text((4, top + size // 2 - 16), title, fill="black", font=font)
        for column, picture in enumerate(pictures):
            left = label + column * (size + gap)
            if row == 0:
                draw.text((left, 4), prompts[column], fill="black", font=font)
            tile = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
            sheet.paste(tile.resize((size, size), Image.Resampling.NEAREST), (left, top))
    return sheet


def _print(rows: list[dict[str, Any]], plan: Plan, out: Any) -> None:
    table = Table(title=f"N={plan.segments}, S={plan.stride}, W={plan.warmup}, C={plan.cooldown}: {plan.world_size} devices")
    for column in ("method", "steps", "s per call", "speed-up", "MiB per call", "PSNR to sequential"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"],
            str(row["steps"]),
            f"{row['call_s']:.4f}",
            f"{row['speedup']:.2f}x",
            f"{row['mib_per_call']:.2f}" if "mib_per_call" in row else "",
            f"{row['psnr']:.1f} dB" if "psnr" in row else "",
        )
    out.print(table)
    out.print("Seconds per asynchronous call, median; speed-up of these calls at the same threads per device.", style="dim")
