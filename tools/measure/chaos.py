"""Inject faults into a group of ranks inside an installed ComfyUI, one after the other, and write docs/data/faults.json.

python tools/measure/chaos.py [--faults 500] [--seed 1] [FILE]

What is injected, and what must come of it, is in tests/host/helpers/faults.py. Linux; as root, since a full disk is a small one
that is mounted for it. About five seconds a fault on two cores. Then python tools/measure/tables.py for the page that shows it.
"""

from __future__ import annotations

import collections
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import within_host

COUNTED = ("wrong", "late", "orphans", "leaked_files")
EDGE = 50  # faults at the beginning and at the end whose medians are compared


def main() -> None:
    """Have the host's Python break things, and count."""
    from asyncdiff_nodes.cli.report import write_json

    given = within_host.asked("Inject faults into ranks and see what is left.", "faults", 500, "faults.json")
    found = within_host.found_by(__file__, str(given.count), str(given.seed))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for fault in found["faults"]:
        groups[fault["phase"], fault["kind"]].append(fault)
    rows = [{"phase": phase, "kind": kind, **counts(group)} for (phase, kind), group in sorted(groups.items())]
    result = {
        "seed": given.seed,
        "seconds": found["seconds"],
        "total": counts(found["faults"]),
        "growth": growth(found["states"]),
        "rows": rows,
        "failed": [fault for fault in found["faults"] if any(fault[what] for what in COUNTED)],
        "memory": [state["memory"] for state in found["states"]],
    }
    write_json(given.file, result, f"python tools/measure/chaos.py --faults {given.count} --seed {given.seed}")
    print(f"{result['total']}\n{result['growth']}\nwritten: {given.file}")


def counts(faults: list[dict[str, Any]]) -> dict[str, Any]:
    """Of these faults: how many, how they ended, and what was wrong."""
    ends = collections.Counter(fault["how"] for fault in faults)
    slowest = max(fault["seconds"] for fault in faults)
    return {
        "injected": len(faults),
        **{what: sum(fault[what] for fault in faults) for what in COUNTED},
        "ends": dict(sorted(ends.items())),
        "slowest": slowest,
    }


def growth(states: list[dict[str, int]]) -> dict[str, float]:
    """From the median of the first states to that of the last."""
    edge = min(EDGE, len(states) // 2)
    return {
        what: statistics.median(s[what] for s in states[-edge:]) - statistics.median(s[what] for s in states[:edge])
        for what in states[0]
    }


def inside(file: str, count: int, seed: int) -> None:
    """Within the host: one fault after the other."""
    within_host.on_cpu()
    import torch

    from helpers.faults import Chaos, drawn

    begin, found, states = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        broken = Chaos(Path(folder))
        with broken.ready():
            for number, fault in enumerate(drawn(count, seed), 1):
                outcome = broken.inject(fault)
                states.append(broken.state())
                found.append({**asdict(fault), **asdict(outcome)})
                bad = any(getattr(outcome, what) for what in COUNTED)
                print(f"{number}/{count} {'BAD ' * bad}{fault} {outcome}", flush=True)
    told = {"faults": found, "states": states, "seconds": time.monotonic() - begin}
    Path(file).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    inside(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])) if sys.argv[1:2] == ["--inside"] else main()
