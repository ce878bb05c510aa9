"""``asyncdiff plan``: the placement of a model as a table. Loads no weight."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from asyncdiff_nodes.cli.arguments import positive
from asyncdiff_nodes.cli.example_calls import example_call
from asyncdiff_nodes.cli.placements import describe
from asyncdiff_nodes.cli.tables import console
from asyncdiff_nodes.cli.zoo import NAMES, PUBLISHED_CUTS, find_model
from asyncdiff_nodes.engine import Plan, PlanError, family_of, place, trace
from asyncdiff_nodes.engine.compression import COMPRESSIONS


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
    cuts = tuple(c.strip() for c in arguments.cuts.split(",")) if arguments.cuts else None
    names = ("segments", "stride", "forecast", "fresh_skips", "branches", "compression")
    knobs = {name: getattr(arguments, name) for name in names}
    plan = Plan(cuts=cuts, **knobs)
    call = example_call(skeleton, model.latent_size(arguments.size))
    family = family_of(skeleton, *call)
    graph = trace(skeleton, family, *family.parts(*call, plan.branches)[0])
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
