"""Numbers on disk with where they come from, and the arguments that several commands share."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from asyncdiff_nodes.engine import Plan, PlanError


def console() -> Console:
    """For tables; wide enough for them where the output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120)


def machine() -> dict[str, Any]:
    """What a reader needs to judge a number measured here."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_json(path: str, result: dict[str, Any], invocation: str) -> None:
    """Write ``result`` with the command, the commit and the machine it was made by."""
    record = {"command": invocation, "commit": _commit(), "machine": machine(), **result}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def parse_plans(text: str) -> list[Plan]:
    """Plans written as ``N,S,W`` or ``N,S,W,C``, ``2xN,S,W`` for two branches, and separated by semicolons."""
    plans = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        try:
            branches, _, numbers = part.rpartition("x")
            segments, stride, warmup, *more = (int(number) for number in numbers.split(","))
            (cooldown,), branches = more or [0], int(branches or 1)
        except ValueError:
            raise PlanError(
                f"--plans: {part!r} is not a plan: write segments,stride,warmup such as 2,1,1 or with a cool-down 2,1,3,1"
            ) from None
        plans.append(Plan(segments, stride, warmup, cooldown=cooldown, branches=branches))
    if not plans:
        raise PlanError(f"--plans: no plan in {text!r}: write segments,stride,warmup such as '2,1,1;3,1,1'")
    return plans


def number(value: float | None, digits: int) -> str:
    """``value`` with so many digits, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def positive(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return number


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if changed.stdout.strip() else "")
