"""``asyncdiff demo-comfy``: start an installed ComfyUI with this pack and run the demo workflow through its API."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from asyncdiff_nodes.cli.comfyui import PACK, Server, copy_pictures, failure, find_comfyui, find_python, has_gpu, to_prompt

WORKFLOW = PACK / "workflows" / "asyncdiff_demo.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("--out", default="out/comfyui", metavar="DIR", help="folder for the pictures and the host's own folders")
    parser.add_argument("--seed", type=int, default=None, help="of the noise; default: the workflow's")
    parser.add_argument("--stay", action="store_true", help="leave ComfyUI running afterwards, until Ctrl-C")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the workflow; returns the pictures and the report."""
    comfyui = find_comfyui()
    python = find_python(comfyui) if comfyui else None
    folder = Path(arguments.out).resolve()
    flags = [] if python is None or has_gpu(python) else ["--cpu"]
    print(f"Starting ComfyUI: {comfyui}")
    with Server(comfyui, python, folder, flags=flags) as server:
        nodes = server.get("/object_info")
        prompt = to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), nodes)
        if arguments.seed is not None:
            for node in prompt.values():
                if "seed" in node["inputs"]:
                    node["inputs"]["seed"] = arguments.seed
        history = server.wait(server.queue(prompt))
        if why := failure(history, nodes):
            raise ValueError(f"the demo workflow failed: {why}")
        pictures = copy_pictures(history, folder, folder)
        reporters = [key for key, node in prompt.items() if node["class_type"] == "AsyncDiffReport"]
        report = [line for key in reporters for line in history["outputs"][key]["text"]]
        print("\n".join(report))
        for picture in pictures:
            print(f"Picture: {picture}")
        if arguments.stay:
            print(f"ComfyUI is at {server.url}/ until you press Ctrl-C", flush=True)
            server.process.wait()
    return {"pictures": [str(picture) for picture in pictures], "report": report}
