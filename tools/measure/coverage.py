"""Run the tests that show what is routed of each model family, the slow ones too, and write docs/data/coverage.json.

python tools/measure/coverage.py [FILE]
python tools/measure/coverage.py --host FOLDER [FILE]

With --host, only one exact sampling on two ranks of each network that another ComfyUI has, in docs/data/coverage_hosts.json; what
this has of other versions stays. Its Python is that in FOLDER, or in $COMFYUI_PYTHON.

Then python tools/measure/tables.py for the page that shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from asyncdiff_nodes.cli.report import write_json

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "data"
HOST, NETWORKS = "tests/host/run.py", "tests/host/routing/test_any_network.py"
WHAT = ("exact", "async", "lora", "controlnet", "inpaint", "sharded")
# family -> the tests' names of its kinds; those that people use most come first
FAMILIES = {
    "MiniMax-H3": ("minimax_h3", "minimax_h3_keyframe"),
    "Qwen-Image, and its editing models": ("qwen_image", "qwen_image_reference"),
    "LTX-2 (picture and sound)": ("ltx2", "ltx2_raw_prompt"),
    "Wan 2.1, 2.2 14B": ("wan", "wan_i2v", "wan_context", "wan_flow_rvs"),
    "Wan 2.2 5B": ("wan22",),
    "Wan VACE": ("wan_vace",),
    "Wan Camera": ("wan_camera",),
    "Wan S2V (speech)": ("wan_s2v",),
    "Wan HuMo": ("wan_humo",),
    "Wan Animate": ("wan_animate",),
    "Wan Animate 2": ("wan_animate2",),
    "Wan SCAIL, SCAIL 2": ("wan_scail", "wan_scail2"),
    "WanDancer": ("wan_dancer",),
    "Wan, causal": ("wan_causal",),
    "Z-Image": ("z_image", "z_image_omni"),
    "Z-Image in pixel space": ("z_image_pixels",),
    "Krea 2": ("krea2", "krea2_reference"),
    "FLUX.2": ("flux2", "flux2_references"),
    "FLUX.1, LongCat-Image": ("flux", "flux_references", "flux_fill", "long_cat_image"),
    "Chroma": ("chroma",),
    "Chroma Radiance": ("chroma_radiance",),
    "HunyuanVideo": ("hunyuan_video", "hunyuan_video_i2v", "hunyuan_video_skyreels"),
    "HunyuanVideo 1.5": ("hunyuan_video15", "hunyuan_video15_upscaler"),
    "HunyuanImage 2.1": ("hunyuan_image", "hunyuan_image_refiner"),
    "LTX-Video": ("ltxv",),
    "Kandinsky 5": ("kandinsky5", "kandinsky5_image"),
    "CogVideoX": ("cogvideox", "cogvideox_i2v"),
    "Mochi": ("mochi",),
    "Cosmos": ("cosmos",),
    "Cosmos Predict 2": ("cosmos2",),
    "Anima": ("anima",),
    "SeedVR2": ("seedvr2",),
    "SD 1.5": ("sd15", "sd15_inpaint", "instruct_pix2pix", "zero123", "unclip", "lotus"),
    "SD 2.x": ("sd2_v",),
    "SDXL": ("sdxl", "sdxl_inpaint", "sdxl_pix2pix"),
    "SDXL refiner": ("sdxl_refiner",),
    "Segmind Vega": ("vega",),
    "KOALA": ("koala",),
    "SSD-1B": ("ssd_1b",),
    "Playground 2.5": ("playground",),
    "SD x4 upscaler": ("x4_upscaler",),
    "Stable Video Diffusion, SV3D": ("svd", "sv3d_u", "sv3d_p"),
    "AnimateDiff": ("animatediff",),
    "Stable Cascade C, B": ("cascade_c", "cascade_b"),
    "SD 3, 3.5": ("sd3",),
    "AuraFlow": ("aura_flow",),
    "HunyuanDiT": ("hunyuan_dit",),
    "PixArt": ("pixart", "pixart_alpha", "pixart_sigma"),
    "Lumina 2": ("lumina2",),
    "Lens": ("lens",),
    "HiDream": ("hidream", "hidream_edit"),
    "HiDream-O1": ("hidream_o1",),
    "OmniGen 2": ("omnigen2", "omnigen2_reference"),
    "Boogu": ("boogu", "boogu_reference"),
    "MageFlow": ("mage_flow", "mage_flow_reference"),
    "JoyImage": ("joy_image", "joy_image_reference"),
    "Ideogram 4": ("ideogram4",),
    "Ernie Image": ("ernie_image",),
    "PixelDiT": ("pixel_dit",),
    "PiD": ("pid",),
    "Stable Audio": ("stable_audio", "stable_audio3"),
    "ACE-Step": ("ace_step",),
    "ACE-Step 1.5": ("ace_step15", "ace_step15_cover"),
    "MiniMax Music 3": ("minimax_music3",),
    "Hunyuan3D 2": ("hunyuan3d2",),
    "Hunyuan3D 2.1": ("hunyuan3d21",),
    "Trellis 2": ("trellis2_structure", "trellis2_shape", "trellis2_texture"),
    "TripoSplat": ("triposplat",),
}


def covered(command: list[str], **environment: str) -> list[dict[str, Any]]:
    """What the tests that ``command`` runs say that they cover."""
    environment = {**os.environ, **environment}
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "covered.json"
        command = [sys.executable, *command, "-m", "covers", "--covered", str(found)]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        return json.loads(found.read_text(encoding="utf-8"))


def rows_of(backend: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each family that has a test, in the order of the page; a failed test covers nothing."""
    rows = []
    for title, kinds in FAMILIES.items():
        mine = [test for test in found if test["kind"] in kinds]
        tests = {what: [test for test in mine if what in test["what"]] for what in WHAT}
        if mine:
            verdicts = {what: bool(ran) and all(t["passed"] for t in ran) for what, ran in tests.items()}
            names = {what: sorted(t["test"] for t in ran) for what, ran in tests.items() if verdicts[what]}
            facts = {
                "class": sorted({test["class"] for test in mine if "class" in test}),
                "found": any(test.get("found") for test in mine),
                "reason": next((test["reason"] for test in mine if "reason" in test), None),
            }
            rows.append({"family": title, "backend": backend, **facts, **verdicts, "tests": names})
    return rows


def everything(file: Path) -> None:
    """Write what all tests show to ``file``."""
    commands = [
        [HOST, NETWORKS],
        [HOST, "tests/host", "--ignore", NETWORKS],
        ["-m", "pytest", "tests/engine", "tests/test_diffusers.py"],
    ]
    with ThreadPoolExecutor(2) as two:  # at a time
        networks, others, engine = two.map(covered, commands)
    rows = [*rows_of("comfyui", [*networks, *others]), *rows_of("diffusers", engine)]
    write_json(str(file), {"rows": rows}, "python tools/measure/coverage.py")


def on_host(comfyui: Path, file: Path) -> None:
    """Write what each network of this ComfyUI shows to ``file``, in place of what it has of this version."""
    version = runpy.run_path(str(comfyui / "comfyui_version.py"))["__version__"]
    found = covered([HOST, NETWORKS, "-k", "test_exact and -2] or refused"], COMFYUI_PATH=str(comfyui))
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    rows = [
        *(row for row in before if row["comfyui"] != version),
        *({"comfyui": version, **row} for row in rows_of("comfyui", found)),
    ]
    rows.sort(key=lambda row: [int(part) for part in row["comfyui"].split(".")], reverse=True)
    write_json(str(file), {"rows": rows}, "python tools/measure/coverage.py --host FOLDER")


def main() -> None:
    """Run the tests that are asked for."""
    parser = argparse.ArgumentParser(description="Find out what is routed of each model family.")
    parser.add_argument("--host", metavar="FOLDER", type=Path)
    parser.add_argument("file", nargs="?", type=Path)
    given = parser.parse_args()
    if given.host is None:
        everything(given.file or DATA / "coverage.json")
    else:
        on_host(given.host.expanduser().resolve(), given.file or DATA / "coverage_hosts.json")


if __name__ == "__main__":
    main()
