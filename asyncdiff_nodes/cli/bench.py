"""``asyncdiff bench``: plans measured with real processes, in one run with the unrouted model.

Cuts balance the block times that the unrouted model measures first. Then rounds alternate between one unrouted copy alone, two
unrouted copies at once (how much the machine's devices slow each other down: its scaling), and a burst of asynchronous calls of
the group, so that a noisy machine disturbs all three alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import psutil
import torch
from rich.progress import Progress
from rich.table import Table

from asyncdiff_nodes.engine import DeviceError, Plan, PlanError, WorkerGroup, find_family
from asyncdiff_nodes.engine.inputs import Inputs

from .baseline import Baseline
from .plan import MIB
from .report import console, parse_plans, positive
from .zoo import NAMES, Model, find_model

BURST = 3  # asynchronous computing calls per round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("--model", default="sd15", help=f"one of {', '.join(NAMES)}, or a diffusers folder (random weights)")
    parser.add_argument("--size", type=positive, default=256, metavar="PX", help="picture size")
    parser.add_argument("--plans", default="2,1,1", help="segments,stride,warmup; several separated by semicolons")
    parser.add_argument("--steps", type=positive, default=13, metavar="T", help="denoising steps per plan")
    parser.add_argument("--batch", type=positive, default=2, help="batch of a call; 2 is one picture with CFG")
    parser.add_argument("--devices", default=None, help="comma-separated, such as cuda:0,cuda:1; default: all GPUs, else cpu")
    parser.add_argument("--threads", type=positive, default=1, help="threads per CPU rank, and of the unrouted model")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="weights and activations")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns one row per plan."""
    plans, model = parse_plans(arguments.plans), find_model(arguments.model)
    if late := [_name(plan) for plan in plans if plan.warmup >= arguments.steps]:
        raise PlanError(f"--steps {arguments.steps} leaves no asynchronous step for plan {late[0]}: take more than its warm-up")
    dtype = getattr(torch, arguments.dtype)
    devices = _devices(arguments.devices, arguments.threads)
    inputs = _inputs(model, model.latent_size(arguments.size), arguments.batch, dtype)
    out = console()
    _check_memory(model, dtype, devices)
    rows = []
    with ExitStack() as stack, Progress(console=out, transient=True) as progress:
        todo = progress.add_task("unrouted model", total=len(plans) * arguments.steps)
        copies = [
            stack.enter_context(closing(Baseline(model, dtype, device, arguments.threads, inputs)))
            for device in (devices * 2)[:2]
        ]
        # both measure their blocks at once, as the ranks will run at once
        costs, _ = [copy.block_seconds() for copy in copies]
        unet = model.with_random_weights(dtype)
        for plan in plans:
            progress.update(todo, description=f"plan {_name(plan)}")
            projected = plan.world_size > len(devices)
            placed = (devices * plan.world_size)[: plan.world_size]
            with WorkerGroup(
                unet,
                plan,
                placed,
                threads_per_rank=arguments.threads,
                costs=costs,
                example_inputs=inputs,
                call_timeout=1800,
            ) as group:
                measure = _project if projected else _measure
                row = measure(group, plan, arguments.steps, inputs, copies, lambda n: progress.advance(todo, n))
            rows.append({"plan": _name(plan), "projected": projected, "devices": plan.world_size, **row})
    facts = {name: getattr(arguments, name) for name in ("model", "size", "steps", "batch", "threads", "dtype")}
    _print(facts, rows, out)
    return {**facts, "rows": rows}


def _measure(group: WorkerGroup, plan: Plan, steps: int, inputs: Any, copies: list[Baseline], advance: Any) -> dict[str, Any]:
    """Real speed, with as many devices as ranks."""
    warm, bursts, alone, both = [], [], [], []
    _prime(group, steps, inputs)
    group.begin(_schedule(steps))
    done = 0
    while done < steps:
        first = done < plan.warmup
        length = min((plan.warmup - done) if first else BURST * plan.stride, steps - done)
        begin = time.perf_counter()
        for _ in range(length):
            _call(group, done, steps, inputs)
            done += 1
        group.stats()  # waits until every rank is done: the next burst must not profit from a slower rank's rest
        per_step = (time.perf_counter() - begin) / length
        # a shorter last burst would count its ranks' rest in full: leave it out
        if first:
            warm.append(per_step)
        elif length == BURST * plan.stride or not bursts:
            bursts.append(per_step)
            alone.append(_timed(copies[:1]))
            both.append(_timed(copies))
        advance(length)
    unrouted, scaling = statistics.median(alone), 2 * statistics.median(alone) / statistics.median(both)
    # every rank profits or suffers from its neighbours as the two copies do
    ideal = scaling / 2 * plan.stride / max(group.placement.shares)
    row = _row(group, unrouted, statistics.median(warm), statistics.median(bursts), ideal)
    return {**row, "scaling": scaling, "step_s_all": bursts, "unrouted_s_all": alone}


def _project(group: WorkerGroup, plan: Plan, steps: int, inputs: Any, copies: list[Baseline], advance: Any) -> dict[str, Any]:
    """More ranks than devices: each segment's time measured while it runs alone, in synchronous calls."""
    alone, times = [], []
    computes: dict[int, list[float]] = {rank: [] for rank in range(plan.segments)}
    _prime(group, steps, inputs)
    for _ in range(BURST):
        group.begin(_schedule(steps))
        begin = time.perf_counter()
        _call(group, 0, steps, inputs)
        times.append(time.perf_counter() - begin)
        alone.append(_timed(copies[:1]))
        for record in group.stats().records:
            if record.rank in computes:
                computes[record.rank].append(record.compute)
    advance(steps)
    segments = [statistics.median(values) for values in computes.values()]
    ideal = plan.stride / max(group.placement.shares)
    row = _row(group, statistics.median(alone), statistics.median(times), max(segments) / plan.stride, ideal)
    return {**row, "segment_s": segments}


def _row(group: WorkerGroup, unrouted: float, warmup_step: float, step: float, ideal: float) -> dict[str, Any]:
    stats = group.stats()
    records = stats.records
    asynchronous = [r for r in records if not r.synchronous] or records
    return {
        "cuts": list(group.placement.cuts),
        "max_share": max(group.placement.shares),  # of measured block time
        "unrouted_s": unrouted,
        "warmup_step_s": warmup_step,
        "step_s": step,
        "speedup": unrouted / step,
        "ideal": ideal,
        "share_of_ideal": unrouted / step / ideal,
        "mib_per_call": stats.bytes_per_call / MIB,
        "planned_mib_per_call": stats.planned_bytes / MIB,
        "wait_share": sum(r.wait for r in asynchronous) / sum(r.end - r.start for r in asynchronous),
    }


def _call(group: WorkerGroup, index: int, steps: int, inputs: Any) -> None:
    taken = Inputs.take(*inputs, group.family.timestep)
    args, kwargs = replace(taken, timestep=taken.timestep_like(_schedule(steps)[index])).arguments()
    group(*args, **kwargs)


def _prime(group: WorkerGroup, steps: int, inputs: Any) -> None:
    """One call of each kind: the first ones pay for the trace and for memory."""
    group.begin(_schedule(steps))
    for index in range(min(steps, group.plan.warmup + 1)):
        _call(group, index, steps, inputs)


def _schedule(steps: int) -> list[int]:
    return [round(999 * (1 - i / steps)) for i in range(steps)]


def _timed(copies: list[Baseline]) -> float:
    for copy in copies:
        copy.start()
    return max([copy.wait() for copy in copies])


def _inputs(model: Model, size: int, batch: int, dtype: torch.dtype) -> Any:
    skeleton = model.skeleton(dtype)
    generator = torch.Generator().manual_seed(0)

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if not leaf.is_floating_point():
            return torch.zeros(leaf.shape, dtype=leaf.dtype)
        return torch.randn(leaf.shape, generator=generator).to(leaf.dtype)

    return torch.utils._pytree.tree_map(real, find_family(skeleton).example_inputs(skeleton, size, batch))


def _devices(text: str | None, threads: int) -> list[str]:
    if text:
        return [name.strip() for name in text.split(",")]
    if torch.cuda.device_count():
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu"] * max(1, (psutil.cpu_count(logical=False) or psutil.cpu_count() or 1) // threads)


def _check_memory(model: Model, dtype: torch.dtype, devices: list[str]) -> None:
    weights = sum(p.numel() * dtype.itemsize for p in model.skeleton(dtype).parameters())
    on_cpu = 1 + sum(d == "cpu" for d in (devices * 2)[:2]) + int("cpu" in devices)  # ours, the two copies, the group
    free = psutil.virtual_memory().available
    if weights * on_cpu * 1.1 > free:
        raise DeviceError(
            f"bench of {model.name} in {dtype} needs about {weights * on_cpu * 1.1 / 2**30:.0f} GiB of memory, "
            f"{free / 2**30:.0f} GiB are free: choose a smaller model or --dtype float16"
        )


def _name(plan: Plan) -> str:
    return f"{plan.segments},{plan.stride},{plan.warmup}"


def _print(facts: dict[str, Any], rows: list[dict[str, Any]], out: Any) -> None:
    table = Table(title="{model}, {size} px, batch {batch}, {dtype}, {threads} thread(s) per CPU rank".format(**facts))
    for column in (
        "plan N,S,W",
        "unrouted s",
        "warm-up s",
        "async s",
        "speed-up",
        "ideal",
        "of ideal",
        "MiB/call",
        "waiting",
        "",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        table.add_row(
            r["plan"],
            f"{r['unrouted_s']:.3f}",
            f"{r['warmup_step_s']:.3f}",
            f"{r['step_s']:.3f}",
            f"{r['speedup']:.2f}x",
            f"{r['ideal']:.2f}x",
            f"{r['share_of_ideal']:.0%}",
            f"{r['mib_per_call']:.2f}",
            f"{r['wait_share']:.1%}",
            "projected" if r["projected"] else "measured",
        )
    out.print(table)
    out.print("Seconds per denoising step, medians. Projected: from each segment's time measured alone.", style="dim")
