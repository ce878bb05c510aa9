"""``asyncdiff demo-comfy``: start an installed ComfyUI with this pack and run the demo workflow through its API."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from asyncdiff_nodes.cli.comfyui import PACK, Server, copy_pictures, find_comfyui, find_python, has_gpu, to_prompt
from asyncdiff_nodes.cli.report import console

WORKFLOW = PACK / "workflows" / "asyncdiff_demo.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("--out", default="out/comfyui", metavar="DIR", help="folder for the pictures and the host's own folders")
    parser.add_argument("--seed", type=int, default=None, help="of the noise; default: the workflow's")
    parser.add_argument("--stay", action="store_true", help="leave ComfyUI running afterwards, until Ctrl-C")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the workflow; returns the pictures and the report."""
    comfyui, out = find_comfyui(), console()
    python = find_python(comfyui) if comfyui else None
    folder = Path(arguments.out).resolve()
    flags = [] if python is None or has_gpu(python) else ["--cpu"]
    out.print(f"Starting ComfyUI: {comfyui}")
    with Server(comfyui, python, folder, flags=flags) as server:
        prompt = to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.get("/object_info"))
        if arguments.seed is not None:
            for node in prompt.values():
                if "seed" in node["inputs"]:
                    node["inputs"]["seed"] = arguments.seed
        history = server.wait(server.queue(prompt))
        if history["status"]["status_str"] != "success":
            raise ValueError(f"the demo workflow failed: {history['status']['messages'][-1]}")
        pictures = copy_pictures(history, folder, folder)
        reporters = [key for key, node in prompt.items() if node["class_type"] == "AsyncDiffReport"]
        report = [line for key in reporters for line in history["outputs"][key]["text"]]
        out.print("\n".join(report), markup=False)
        for picture in pictures:
            out.print(f"Picture: {picture}", markup=False)
        if arguments.stay:
            out.print(f"ComfyUI is at {server.url}/ until you press Ctrl-C")
            server.process.wait()
    return {"pictures": [str(picture) for picture in pictures], "report": report}
