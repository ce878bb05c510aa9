"""``asyncdiff doctor``: what was found, what will be used, what is wrong and how to cure it.

Needs the standard library and PyTorch only, so that it can say what else is missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch.distributed as dist

from asyncdiff_nodes.cli.comfyui import find_comfyui
from asyncdiff_nodes.cli.machine import machine, memory
from asyncdiff_nodes.cli.packages import EXTRAS, how_to_install, version
from asyncdiff_nodes.engine import accelerator
from asyncdiff_nodes.engine.rank.links import LOOPBACK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no options of its own."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the findings; ``failed`` is set if something keeps the pack from working."""
    found = {**machine(), **_found()}
    problems = _problems(found)
    print("This machine")
    for name, value in found.items():
        if name != "packages":
            print(f"  {name.replace('_', ' '):<16} {'not known' if value is None else value}")
    for extra, packages in EXTRAS.items():
        print(f"Packages of [{extra}]: {how_to_install(extra)}")
        for name, purpose in packages.items():
            print(f"  {name:<24} {found['packages'][name] or 'missing':<12} {purpose}")
    print(f"Will be used: {found['devices_used']}")
    for problem in problems:
        print(f"{'ERROR' if problem['fatal'] else 'note'}: {problem['what']} -> {problem['cure']}")
    if not problems:
        print("Nothing is wrong.")
    return {"found": found, "problems": problems, "failed": any(problem["fatal"] for problem in problems)}


def _found() -> dict[str, Any]:
    gpus = accelerator.all_devices(accelerator.own_kind())
    comfyui, sizes = find_comfyui(), memory()
    return {
        "free_memory_gib": round(sizes[1] / 2**30, 1) if sizes else None,
        "gpu_free_gib": {name: round(accelerator.memory(name)[0] / 2**30, 1) for name in gpus},
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "loopback": _loopback_works(),
        "packages": {name: version(name) for packages in EXTRAS.values() for name in packages},
        "comfyui": f"{comfyui} ({_comfyui_version(comfyui)})" if comfyui else None,
        "devices_used": ",".join(gpus) if len(gpus) > 1 else ",".join([*gpus, "cpu"] if gpus else ["cpu", "cpu"]),
    }


def _problems(found: dict[str, Any]) -> list[dict[str, Any]]:
    problems = []

    def add(fatal: bool, what: str, cure: str) -> None:
        problems.append({"fatal": fatal, "what": what, "cure": cure})

    if not found["gloo"]:
        add(True, "this PyTorch was built without gloo", "install an official PyTorch build")
    if not found["loopback"]:
        add(True, f"ranks cannot reach each other on {LOOPBACK}", "allow loopback connections in the firewall")
    kind = accelerator.own_kind()
    gpus = len(accelerator.all_devices(kind))
    if gpus == 0:
        add(False, "no GPU that can be used", "processes on the CPU stand in for devices: right for a try, not for speed")
    elif gpus == 1:
        add(
            False,
            "only 1 GPU is visible",
            "check CUDA_VISIBLE_DEVICES; start ComfyUI on Windows with --cuda-device all --disable-pinned-memory",
        )
    elif kind == "cuda" and not found["nccl"]:
        add(False, "no NCCL", "values between GPUs go through host memory; on Linux install an official CUDA build")
    if absent := [name for name in EXTRAS["cli"] if found["packages"][name] is None]:
        add(False, f"other commands lack {', '.join(absent)}", how_to_install("cli"))
    if found["comfyui"] is None:
        add(False, "no ComfyUI was found", "set COMFYUI_PATH if there is one; the engine works without")
    if found["free_memory_gib"] is not None and found["free_memory_gib"] < 2:
        add(False, f"only {found['free_memory_gib']} GiB of memory are free", "close other programs")
    return problems


def _comfyui_version(folder: Path) -> str:
    scope: dict[str, str] = {}
    try:
        for line in (folder / "comfyui_version.py").read_text(encoding="utf-8").splitlines():
            if line.startswith("__version__"):
                scope["version"] = line.split("=", 1)[1].strip().strip("\"'")
    except OSError:
        pass
    return scope.get("version", "unknown version")


def _loopback_works() -> bool:
    if not dist.is_gloo_available():
        return False
    try:
        dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)
    except RuntimeError:
        return False
    return True
