"""Run the tests that show what is routed of each model family, the slow ones too, and write docs/data/coverage.json.

python tools/measure/coverage.py [FILE]

Then python tools/measure/tables.py for the page that shows it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from asyncdiff_nodes.cli.report import write_json

ROOT = Path(__file__).resolve().parents[2]
WHAT = ("exact", "async", "lora", "controlnet", "inpaint", "sharded")
# the tests' names of families, in the order of the page
FAMILIES = {
    "sd15": "SD 1.5",
    "sd15_inpaint": "SD 1.5 inpaint",
    "sd2_v": "SD 2.x",
    "sdxl": "SDXL",
    "sdxl_inpaint": "SDXL inpaint",
    "sdxl_refiner": "SDXL refiner",
    "vega": "Segmind Vega",
    "koala": "KOALA",
    "ssd_1b": "SSD-1B",
    "playground": "Playground 2.5",
    "x4_upscaler": "SD x4 upscaler",
    "svd": "Stable Video Diffusion",
    "animatediff": "AnimateDiff",
    "pixart": "PixArt",
    "sd3": "SD 3, 3.5",
    "flux": "FLUX.1",
    "lumina2": "Lumina 2",
    "z_image": "Z-Image",
    "qwen_image": "Qwen-Image",
    "wan": "Wan 2.1, 2.2 14B",
    "wan_i2v": "Wan 2.1 image to video",
    "hunyuan_video": "HunyuanVideo",
    "ltxv": "LTX-Video",
}


def covered(command: list[str]) -> list[dict[str, Any]]:
    """What the tests that ``command`` runs say that they cover."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "covered.json"
        subprocess.run([sys.executable, *command, "-m", "covers", "--covered", str(found)], cwd=ROOT, check=False)
        return json.loads(found.read_text(encoding="utf-8"))


def rows_of(backend: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each family that has a test, in the order of the page; a failed test covers nothing."""
    rows = []
    for kind, title in FAMILIES.items():
        tests = {what: [t for t in found if t["kind"] == kind and what in t["what"]] for what in WHAT}
        if any(tests.values()):
            verdicts = {what: bool(ran) and all(t["passed"] for t in ran) for what, ran in tests.items()}
            names = {what: sorted(t["test"] for t in ran) for what, ran in tests.items() if verdicts[what]}
            rows.append({"family": title, "backend": backend, **verdicts, "tests": names})
    return rows


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "docs" / "data" / "coverage.json")
    rows = [
        *rows_of("comfyui", covered(["tests/host/run.py"])),
        *rows_of("diffusers", covered(["-m", "pytest", "tests/engine", "tests/test_diffusers.py"])),
    ]
    write_json(path, {"rows": rows}, "python tools/measure/coverage.py")
