"""``asyncdiff plan``: the placement of a model as a table. Loads no weight."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from asyncdiff_nodes.cli.report import console, positive
from asyncdiff_nodes.cli.zoo import NAMES, PUBLISHED_CUTS, find_model
from asyncdiff_nodes.engine import Placement, Plan, PlanError, find_family, place, slowest, trace
from asyncdiff_nodes.engine.compression import COMPRESSIONS

MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("--model", default="sd15", help=f"one of {', '.join(NAMES)}, or a diffusers folder")
    parser.add_argument("--size", type=positive, default=None, metavar="PX", help="picture size; default: the model's own")
    parser.add_argument("--segments", type=int, default=2, metavar="N", help="parts that the network is cut into")
    parser.add_argument("--stride", type=int, default=1, metavar="S", help="steps served by one parallel call, 1 to 4")
    parser.add_argument("--branches", type=int, default=1, metavar="B", help="2: each half of CFG on segments of its own")
    parser.add_argument("--cuts", default=None, help="block names where segments begin, comma-separated; default: automatic")
    parser.add_argument("--forecast", type=int, choices=(0, 1), default=1, help="1: segments work ahead; 0: the published method")
    parser.add_argument(
        "--fresh-skips", action=argparse.BooleanOptionalAction, default=True, help="working ahead, compute full-size blocks anew"
    )
    parser.add_argument("--compression", choices=COMPRESSIONS, default="none", help="of what crosses in asynchronous calls")
    parser.add_argument("--speeds", default=None, help="relative device speeds, such as 1,0.6; default: equal")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the table; returns the same numbers."""
    model = find_model(arguments.model)
    skeleton = model.skeleton(torch.float16)
    family = find_family(skeleton)
    cuts = tuple(c.strip() for c in arguments.cuts.split(",")) if arguments.cuts else None
    names = ("segments", "stride", "forecast", "fresh_skips", "branches", "compression")
    knobs = {name: getattr(arguments, name) for name in names}
    plan = Plan(cuts=cuts, **knobs)
    inputs = family.example_inputs(skeleton, model.latent_size(arguments.size), 2)
    graph = trace(skeleton, family, *family.parts(*inputs, plan.branches)[0])
    speeds = _speeds(arguments.speeds, plan)
    placement = place(graph, plan, speeds)
    result = describe(placement, speeds)
    published = PUBLISHED_CUTS.get(model.name, {}).get(plan.segments)
    if published:
        theirs = Plan(segments=plan.segments, stride=plan.stride, cuts=published, forecast=0, branches=plan.branches)
        result["published"] = describe(place(graph, theirs), speeds)
    result = {"model": model.name, "size": arguments.size, "forecast": plan.forecast, "fresh_skips": plan.fresh_skips, **result}
    _print(result, console())
    return result


def describe(placement: Placement, speeds: Sequence[float] | None = None) -> dict[str, Any]:
    """A placement as plain data; bytes for fp16 weights and activations if the graph was traced so."""
    graph, plan = placement.graph, placement.plan
    speeds = speeds or [1.0] * plan.world_size
    shares, whole = placement.shares, sum(placement.costs)
    segments = []
    for segment in range(plan.segments):
        blocks = [graph.blocks[i] for i in placement.owned(segment)]
        received = placement.incoming(segment)
        sent = sum(
            placement.crossing_bytes(i)
            for rank in range(plan.branch_size)
            for i in placement.incoming(plan.segment_of_rank(rank))
            if placement.segments[i] == segment
        )
        segments.append(
            {
                "segment": segment,
                "ranks": [rank for rank in range(plan.world_size) if plan.segment_of_rank(rank) == segment],
                "blocks": [block.name for block in blocks],
                "ranges": _ranges(graph.names, placement.owned(segment)),
                "gmac": sum(block.macs for block in blocks) / 1e9,
                "share": shares[segment],
                "weight_mib": sum(block.weight_bytes for block in blocks) / MIB,
                "mib_in": placement.received_bytes(segment) / MIB,
                "mib_out": sent / MIB,
                "tensors_in": len(received),
            }
        )
    return {
        "segments_count": plan.segments,
        "stride": plan.stride,
        "branches": plan.branches,
        "devices": plan.world_size,
        "cuts": list(placement.cuts),
        "wrapped": placement.wrapped,
        "gmac": plan.branches * graph.macs / 1e9,
        "max_share": max(shares),
        "mib_per_call": plan.branches * placement.bytes_per_call / MIB,
        # against the whole model on the fastest of the devices
        "predicted_speedup": plan.branches * plan.stride * whole / (slowest(placement, placement.costs, speeds) * max(speeds)),
        "segments": segments,
    }


def _speeds(text: str | None, plan: Plan) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PlanError(f"--speeds {text!r}: give {plan.world_size} numbers separated by commas, such as 1,0.6") from None


def _print(result: dict[str, Any], console: Console) -> None:
    kind = "wrapped" if result["wrapped"] else "linear"
    title = f"{result['segments_count']} segments, stride {result['stride']}, {kind} cuts"
    branches = f"{result['branches']} branches of " if result["branches"] > 1 else ""
    table = Table(title=f"{result['model']}: {branches}{title}")
    for column in ("segment", "blocks", "GMAC", "share", "weights MiB", "MiB in", "MiB out"):
        table.add_column(column, justify="left" if column == "blocks" else "right", no_wrap=True)
    for s in result["segments"]:
        table.add_row(
            f"{s['segment']}" + (f" x{len(s['ranks'])}" if len(s["ranks"]) > 1 else ""),
            "\n".join(s["ranges"]),
            f"{s['gmac']:.1f}",
            f"{s['share']:.3f}",
            f"{s['weight_mib']:.0f}",
            f"{s['mib_in']:.2f}",
            f"{s['mib_out']:.2f}",
        )
    console.print(table)
    line = "largest share {max_share:.3f}, {mib_per_call:.2f} MiB per call, predicted speed-up {predicted_speedup:.2f}x"
    console.print(f"{result['devices']} devices: " + line.format(**result))
    console.print(f"cuts: {' · '.join(result['cuts'])}")
    if "published" in result:
        console.print("published cuts: " + line.format(**result["published"]), style="dim")
    batch = "CFG batch 2, rows for one branch of it" if branches else "CFG batch 2"
    console.print(f"Per call at {batch}, fp16; predicted from MACs, without warm-up and transport.", style="dim")


def _ranges(names: Sequence[str], owned: Sequence[int]) -> list[str]:
    """First and last block of each contiguous run; a wrapped segment has two."""
    starts = [i for i in owned if i - 1 not in owned]
    ends = [i for i in owned if i + 1 not in owned]
    return [names[a] if a == b else f"{names[a]} ... {names[b]}" for a, b in zip(starts, ends, strict=True)]
