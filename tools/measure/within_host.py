"""What several tools share: work that is done inside an installed ComfyUI, by its Python and with its modules."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def asked(description: str, what: str, count: int, file: str) -> argparse.Namespace:
    """The arguments of a tool that does something many times: how often, the seed, and the file for what it found."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(f"--{what}", type=int, default=count, dest="count")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("file", nargs="?", default=str(ROOT / "docs" / "data" / file))
    return parser.parse_args()


def measure(script: str) -> None:
    """Write what ``script`` finds within the host to the file that is named, or to that of the same name in docs/data."""
    from asyncdiff_nodes.cli.report import write_json

    name = Path(script).stem
    file = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "docs" / "data" / f"{name}.json")
    write_json(file, {"rows": found_by(script)}, f"python tools/measure/{name}.py")
    print(f"written: {file}")


def found_by(script: str, *arguments: str) -> Any:
    """The data that ``script`` writes as JSON, started as ``script --inside FILE arguments`` within the host."""
    from asyncdiff_nodes.cli.comfyui import find_comfyui, find_python

    comfyui = find_comfyui()
    python = find_python(comfyui) if comfyui else None
    if python is None:
        sys.exit("no ComfyUI was found: set COMFYUI_PATH, and COMFYUI_PYTHON to the Python that runs it")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        tools = Path(sys.prefix) / "host-tools"  # of tests/host/run.py
        places = os.pathsep.join(map(str, (comfyui, ROOT, ROOT / "tests" / "host", tools)))
        environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
        subprocess.run([python, script, "--inside", str(found), *arguments], env=environment, cwd=ROOT, check=True)
        return json.loads(found.read_text(encoding="utf-8"))


def on_cpu() -> None:
    """To be called inside, before anything of the host is imported: no GPU is used, and one thread, as by a rank."""
    import comfy.options  # noqa: F401  (before the flags)
    from comfy.cli_args import args

    args.cpu = True
    import torch

    torch.set_num_threads(1)
