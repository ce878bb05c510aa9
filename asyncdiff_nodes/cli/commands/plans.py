"""``asyncdiff plans``: what each device would hold, compute and send of every model, at its true size. Loads no weight."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.table import Table

from asyncdiff_nodes.cli.example_calls import example_call
from asyncdiff_nodes.cli.placements import describe
from asyncdiff_nodes.cli.tables import MIB, console
from asyncdiff_nodes.cli.zoo import DEMOS, NAMES, find_model
from asyncdiff_nodes.engine import Plan, family_of, place, trace
from asyncdiff_nodes.engine.batch import sample_of

DEVICES = (2, 3, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no options of its own."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the table; returns its rows."""
    rows = []
    for name in NAMES:
        if name in DEMOS:
            continue
        skeleton = find_model(name).skeleton(torch.float16)
        args, kwargs = example_call(skeleton)
        family = family_of(skeleton, args, kwargs)
        graph = trace(skeleton, family, args, kwargs)
        for devices in DEVICES:
            placed = describe(place(graph, Plan(segments=devices)))
            rows.append(
                {
                    "model": name,
                    "input": list(sample_of(args, kwargs, family.sample).shape),
                    "devices": devices,
                    "shares": [segment["share"] for segment in placed["segments"]],
                    "balance": 1 / (devices * placed["max_share"]),
                    "mib_per_call": placed["mib_per_call"],
                    "weights_mib": [segment["weight_mib"] + graph.glue_bytes / MIB for segment in placed["segments"]],
                    "whole_mib": (graph.glue_bytes + sum(block.weight_bytes for block in graph.blocks)) / MIB,
                }
            )
    _print(rows)
    return {"dtype": "float16", "rows": rows}


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Plans of one parallel step: N segments on N equal devices, fp16")
    for column in ("model", "input", "GiB", "N", "balance", "MiB per step", "GiB per device"):
        table.add_column(column, justify="left" if column in ("model", "input") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"],
            " x ".join(map(str, row["input"])),
            f"{row['whole_mib'] / 1024:.1f}",
            str(row["devices"]),
            f"{row['balance']:.0%}",
            f"{row['mib_per_call']:.1f}",
            ", ".join(f"{mib / 1024:.1f}" for mib in row["weights_mib"]),
        )
    console().print(table)
    console().print("GiB are of weights; balance is 1 / (N x the largest share of MACs).", style="dim")
