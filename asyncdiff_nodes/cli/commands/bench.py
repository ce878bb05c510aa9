"""``asyncdiff bench``: the speed of plans against the unrouted model, measured where this machine has the devices for them.

For more devices than there are, each block, the link between two ranks and the caller's round trip are measured, and the rest is
the engine's clock (``engine/planning/clock.py``). Measured plans are projected as well, which says how far to trust it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
from rich.box import SIMPLE
from rich.progress import Progress
from rich.table import Table

from asyncdiff_nodes.cli.arguments import parse_plans, positive
from asyncdiff_nodes.cli.machine import cores
from asyncdiff_nodes.cli.measure import Setting
from asyncdiff_nodes.cli.round_trip import measure_round_trip
from asyncdiff_nodes.cli.suite import Results, Subject, suite
from asyncdiff_nodes.cli.tables import console, number
from asyncdiff_nodes.cli.zoo import NAMES, find_model
from asyncdiff_nodes.engine import PlanError, accelerator
from asyncdiff_nodes.engine.devices import parse_devices
from asyncdiff_nodes.selftest.link_trial import try_link


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("--suite", action="store_true", help="all models, sizes and plans of the README's table instead")
    parser.add_argument("--model", default="sd15", help=f"one of {', '.join(NAMES)}, or a diffusers folder (random weights)")
    parser.add_argument("--size", type=positive, default=256, metavar="PX", help="picture size")
    parser.add_argument("--plans", default="2,1,1", help="segments,stride,warmup; several separated by semicolons")
    parser.add_argument("--steps", type=positive, default=13, metavar="T", help="denoising steps per plan")
    parser.add_argument("--batch", type=positive, default=2, help="batch of a call; 2 is one picture with CFG")
    parser.add_argument("--devices", default=None, help="comma-separated, such as cuda:0,cuda:1; default: all GPUs, else cpu")
    parser.add_argument("--threads", type=positive, default=1, help="threads per CPU rank, and of the unrouted model")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="weights and activations")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns one row per model, size and plan."""
    subjects = suite() if arguments.suite else (_subject(arguments),)
    devices = _devices(arguments.devices, arguments.threads)
    out = console()
    with Progress(console=out, transient=True) as progress:
        todo = progress.add_task("links", total=len(subjects) + 1)
        pair = (devices * 2)[:2]
        link, round_trip = try_link(pair).link, measure_round_trip(pair)
        setting = Setting(arguments.batch, getattr(torch, arguments.dtype), devices, arguments.threads, link, round_trip)
        found = Results(setting)
        for subject in subjects:
            progress.update(todo, advance=1, description=f"{subject.model}, {subject.size} px")
            found.add(subject)
    facts = {name: getattr(arguments, name) for name in ("batch", "threads", "dtype")}
    _print(facts, found.rows, out)
    measured = {"link": asdict(link), "round_trip_s": round_trip, "profiles": found.profiles}
    return {**facts, "local_devices": list(devices), **measured, "rows": found.rows}


def _subject(arguments: argparse.Namespace) -> Subject:
    plans = parse_plans(arguments.plans)
    if late := [plan for plan in plans if plan.warmup >= arguments.steps]:
        name = f"{late[0].segments},{late[0].stride},{late[0].warmup}"
        raise PlanError(f"--steps {arguments.steps} leaves no asynchronous step for plan {name}: take more than its warm-up")
    find_model(arguments.model).latent_size(arguments.size)  # bad values before anything is measured
    return Subject(arguments.model, arguments.size, tuple(plans), steps=arguments.steps)


def _devices(text: str | None, threads: int) -> tuple[str, ...]:
    if text:
        return tuple(str(device) for device in parse_devices([name.strip() for name in text.split(",")]))
    return tuple(accelerator.all_devices(accelerator.own_kind())) or ("cpu",) * max(1, cores() // threads)


def _print(facts: dict[str, Any], rows: list[dict[str, Any]], out: Any) -> None:
    table = Table(
        title="batch {batch}, {dtype}, {threads} thread(s) per CPU rank".format(**facts), box=SIMPLE, padding=(0, 1, 0, 0)
    )
    for column in ("model", "plan N,S,W"):
        table.add_column(column, no_wrap=True)
    for column in ("MACs", "speed-up", "clock", "ideal", "of ideal", "MiB/step", "weights GiB", "paper", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        table.add_row(
            f"{r['model']} {r['size']}",
            (f"{r['branches']} x " if r["branches"] > 1 else "")
            + r["plan"]
            + ("" if r["fresh_skips"] or r["segments"] == 1 else " fast"),
            f"{r['predicted_speedup']:.2f}",
            f"{r['speedup']:.2f}x",
            f"{r['projected_speedup']:.2f}",
            f"{r['ideal']:.2f}",
            f"{r['share_of_ideal']:.0%}",
            f"{r['mib_per_call'] / r['stride']:.1f}",
            " ".join(f"{mib / 1024:.1f}" for mib in r["weights_mib"]),
            number(r["published"], 1),
            f"{'projected' if r['projected'] else 'measured'} {r['what']}",
        )
    out.print(table)
    out.print(
        "Speed-up over the unrouted model: measured, medians of interleaved runs; or projected by the engine's clock to equal "
        "devices, from seconds of every block and of transfers. MACs: predicted from these alone. Paper: arXiv 2406.06911, whole "
        "runs of 50 steps. fast: cuts without fresh skips.",
        style="dim",
    )
