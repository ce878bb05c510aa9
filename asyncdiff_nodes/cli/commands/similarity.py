"""``asyncdiff similarity``: how alike each block's output is from one denoising step to the next (paper section 3.2, figure 3).

Asynchrony lives on this likeness, and it is not the same everywhere: the heat map shows where a value of the step before is as
good as new, and where it is not. Below the blocks of a model that is sampled sequentially are its results: without and with the
prompt, the guidance direction between them, and what classifier-free guidance makes of them, which is all the sampler sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import nn

from asyncdiff_nodes.cli.arguments import positive
from asyncdiff_nodes.cli.subjects import HELP, find_subject, graph_of
from asyncdiff_nodes.cli.tables import console
from asyncdiff_nodes.diffusers import SCHEDULERS
from asyncdiff_nodes.engine import BlockGraph
from asyncdiff_nodes.engine.devices import parse_devices
from asyncdiff_nodes.engine.trees import flatten


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("--model", default="demo", help=HELP)
    parser.add_argument("--pairs", type=positive, default=8, help="pictures, drawn at once, to take means over")
    parser.add_argument("--sampler", default="ddim", help=f"one of {', '.join(SCHEDULERS)}")
    parser.add_argument("--steps", type=positive, default=50, help="denoising steps, two or more")
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance scale")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads")
    parser.add_argument("--picture", default="out/similarity.png", metavar="FILE", help="where to put the heat map")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sample, write the heat map, print the table; returns one row per block."""
    if not arguments.cfg > 1:
        raise ValueError(f"--cfg {arguments.cfg:g}: choose more than 1, since without guidance there is no direction to look at")
    if arguments.steps < 2:
        raise ValueError(f"--steps {arguments.steps}: there is nothing to compare with less than 2")
    parse_devices([arguments.device])
    torch.set_num_threads(arguments.threads)
    subject, out = find_subject(arguments.model), console()
    subject.to(arguments.device)
    graph, prompts = graph_of(subject.denoiser), subject.prompts(arguments.pairs)
    how = {"steps": arguments.steps, "scheduler": arguments.sampler, "seed": arguments.seed, "cfg": arguments.cfg}
    with _watched(subject.denoiser, graph, arguments.cfg) as found:
        subject.draw(prompts, **how)
    readers = {p: [graph.names[c] for q, c in sorted(graph.edges) if q == p] for p, _ in graph.edges}
    rows = [
        {"block": name, "readers": readers.get(index, []), **{kind: values[name] for kind, values in found.items()}}
        for index, name in enumerate((*graph.names, *_RESULTS))
    ]
    path = Path(arguments.picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    _heat_map(rows, f"{arguments.model}, {arguments.sampler}, {arguments.steps} steps").savefig(path, dpi=110)
    _print(rows, out)
    out.print(f"{path}: cosine similarity and relative change, per block and step")
    facts = {name: getattr(arguments, name) for name in ("model", "sampler", "steps", "cfg", "seed")}
    return {**facts, "prompts": prompts, "rows": rows}


_RESULTS = ("result, no prompt", "result, prompt", "guidance direction", "result after CFG")
Found = dict[str, dict[str, list[float]]]


@contextmanager
def _watched(denoiser: nn.Module, graph: BlockGraph, cfg: float) -> Iterator[Found]:
    """Within it, every call adds each block's likeness to its call before: kind -> block -> [steps - 1], means over the batch.

    The batch is taken for the half without the prompt and the half with it, in this order.
    """
    names = (*graph.names, *_RESULTS)
    found: Found = {kind: {name: [] for name in names} for kind in ("cosine", "change")}
    before: dict[str, torch.Tensor] = {}

    def watch(name: str, output: Any) -> None:
        value = torch.cat([leaf.flatten(1) for leaf in flatten(output)[0]], dim=1)
        if name in before:
            old = before[name]
            found["cosine"][name].append(round(torch.cosine_similarity(old, value, dim=1).mean().item(), 5))
            found["change"][name].append(round(((value - old).norm(dim=1) / old.norm(dim=1)).mean().item(), 5))
        before[name] = value.clone()

    def watch_results(_: nn.Module, __: Any, output: Any) -> None:
        without, prompted = output[0].chunk(2)
        direction = prompted - without
        for name, value in zip(_RESULTS, (without, prompted, direction, without + cfg * direction), strict=True):
            watch(name, value)

    handles = [
        denoiser.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: watch(name, output))
        for name in graph.names
    ]
    handles.append(denoiser.register_forward_hook(watch_results))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _heat_map(rows: list[dict[str, Any]], title: str) -> Figure:
    figure = Figure(figsize=(14, 10), layout="constrained")
    figure.suptitle(title)
    for axes, (kind, label) in zip(
        figure.subplots(1, 2, sharey=True), (("cosine", "cosine similarity"), ("change", "relative change")), strict=True
    ):
        limits = {"vmin": 0.5, "vmax": 1, "cmap": "viridis"} if kind == "cosine" else {"vmin": 0, "cmap": "magma_r"}
        picture = axes.imshow([row[kind] for row in rows], aspect="auto", interpolation="nearest", **limits)
        axes.set_title(f"{label} to the step before")
        axes.set_xlabel("step")
        axes.set_yticks(range(len(rows)), [row["block"] for row in rows], fontsize=7)
        figure.colorbar(picture, ax=axes)
    return figure


def _print(rows: list[dict[str, Any]], out: Any) -> None:
    steps = len(rows[0]["cosine"])
    marks = sorted({0, steps // 4, steps // 2, 3 * steps // 4, steps - 1})
    table = Table(
        "block", *(f"step {mark + 1}" for mark in marks), title="Cosine similarity (relative change) to the step before"
    )
    for row in rows:
        table.add_row(row["block"], *(f"{row['cosine'][mark]:.3f} ({row['change'][mark]:.2f})" for mark in marks))
    out.print(table)
