"""``asyncdiff doctor``: what was found, what will be used, what is wrong and how to cure it."""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.table import Table

from asyncdiff_nodes.cli.comfyui import find_comfyui
from asyncdiff_nodes.cli.report import console, machine
from asyncdiff_nodes.engine.rank.transport import LOOPBACK

_PACKAGES = ("diffusers", "safetensors", "numpy", "pillow", "rich", "scikit-image", "psutil")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no options of its own."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the findings; ``failed`` is set if something keeps the pack from working."""
    found = {**machine(), **_found()}
    problems = _problems(found)
    out = console()
    table = Table(title="This machine", show_header=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), str(value))
    out.print(table)
    out.print(f"Will be used: {found['devices_used']}")
    for problem in problems:
        out.print(f"{'ERROR' if problem['fatal'] else 'note'}: {problem['what']} -> {problem['cure']}", markup=False)
    if not problems:
        out.print("Nothing is wrong.")
    return {"found": found, "problems": problems, "failed": any(problem["fatal"] for problem in problems)}


def _found() -> dict[str, Any]:
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    memory = psutil.virtual_memory()
    comfyui = find_comfyui()
    return {
        "free_memory_gib": round(memory.available / 2**30, 1),
        "gpu_free_gib": {name: round(torch.cuda.mem_get_info(i)[0] / 2**30, 1) for i, name in enumerate(gpus)},
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "loopback": _loopback_works(),
        "temporary_folder": _writable(tempfile.gettempdir()),
        "packages": {name: _version(name) for name in _PACKAGES},
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
    if not found["temporary_folder"]:
        add(True, f"the temporary folder {tempfile.gettempdir()} cannot be written", "free disk space, or set TMPDIR")
    gpus = torch.cuda.device_count()
    if gpus == 0:
        add(False, "no CUDA device", "processes on the CPU stand in for devices: right for a try, not for speed")
    elif gpus == 1:
        add(
            False,
            "only 1 GPU is visible",
            "check CUDA_VISIBLE_DEVICES; start ComfyUI on Windows with --cuda-device all --disable-pinned-memory",
        )
    elif not found["nccl"]:
        add(False, "no NCCL", "values between GPUs go through host memory; on Linux install an official CUDA build")
    for name, version in found["packages"].items():
        if version is None:
            add(name in ("diffusers", "safetensors"), f"{name} is missing", f"pip install {name}")
    if found["comfyui"] is None:
        add(False, "no ComfyUI was found", "set COMFYUI_PATH if there is one; the engine works without")
    if found["free_memory_gib"] < 2:
        add(False, f"only {found['free_memory_gib']} GiB of memory are free", "close other programs")
    return problems


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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


def _writable(folder: str) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
    except OSError:
        return False
    return True
