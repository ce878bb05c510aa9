"""``asyncdiff selftest``: whether this machine's devices work together exactly, and how fast.

Needs PyTorch only, so that it runs in ComfyUI's Python; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from asyncdiff_nodes.cli.machine import machine
from asyncdiff_nodes.engine import accelerator
from asyncdiff_nodes.engine.devices import parse_devices
from asyncdiff_nodes.selftest.checks import Checks
from asyncdiff_nodes.selftest.finding import Finding

JSON = "asyncdiff-selftest.json"
_WHERE = "https://github.com/comfyui-asyncdiff/ComfyUI-AsyncDiff/issues/new?template=selftest.yml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("--devices", default=None, help="comma-separated, such as cuda:0,cuda:1; default: those of auto, or CPUs")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Look at everything; ``failed`` is set if something is wrong."""
    checks = Checks(_devices(arguments.devices))
    print(f"Self-test on {', '.join(checks.devices)}. It takes about two minutes.\n")
    print("\n".join(f"{name}: {value}" for name, value in machine().items()))
    print("\n| check | of | seen | verdict |\n|---|---|---|---|")
    findings = list(_printed(checks.run()))
    cures = [f"{finding.check}, {finding.subject}: {finding.cure}" for finding in findings if finding.cure]
    print("\n" + "\n".join(["What to do:", *cures] if cures else ["Nothing is wrong."]))
    print(f"\nPlease send all of this, from the first line on: {_WHERE}")
    wrong = any(finding.verdict == "wrong" for finding in findings)
    return {"devices": list(checks.devices), "findings": list(map(asdict, findings)), "failed": wrong}


def _devices(text: str | None) -> tuple[str, ...]:
    if text:
        return tuple(str(device) for device in parse_devices([name.strip() for name in text.split(",")]))
    kind = accelerator.own_kind()
    return tuple(accelerator.like_the_first(kind)[0]) if kind else ("cpu", "cpu")


def _printed(findings: Iterator[Finding]) -> Iterator[Finding]:
    for finding in findings:
        print(f"| {finding.check} | {finding.subject} | {finding.value} | {finding.verdict} |", flush=True)
        yield finding
