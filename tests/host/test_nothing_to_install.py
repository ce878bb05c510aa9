"""A new user's ComfyUI: the pack runs with what ComfyUI itself installs, and nothing else.

ComfyUI cannot start without scipy and psutil, so these two are hidden from our modules only; the others are hidden from all.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdiff_nodes.cli.comfyui import PACK, Server, failure
from helpers.serving import Page, node, options

HOST = Path(os.environ["ASYNCDIFF_HOST_UNDER_TEST"])

# every Python process imports it when it starts: the server, and each of its ranks
SITECUSTOMIZE = """
import builtins, os, pathlib, sys
for name in ("diffusers", "matplotlib", "skimage", "rich"):
    sys.modules[name] = None  # importing it fails from here on
usual = builtins.__import__
def guarded(name, globals=None, *rest, **more):
    top, whose = name.partition(".")[0], (globals or {}).get("__name__") or ""
    if top in ("scipy", "psutil") and whose.partition(".")[0] == "asyncdiff_nodes":
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return usual(name, globals, *rest, **more)
builtins.__import__ = guarded
(pathlib.Path(__file__).parent / f"{os.getpid()}.pid").touch()
"""
# imports all that the nodes may import
IMPORTS = """
import importlib, pkgutil, sys
sys.path[:0] = [{host!r}, {root!r}]
import comfy.options
from comfy.cli_args import args
args.cpu = True
names = []
for part in ("engine", "models.comfy", "host", "nodes"):
    package = importlib.import_module(f"asyncdiff_nodes.{{part}}")
    names += [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
PROMPTS = {"positive": ["red", 0], "negative": ["empty", 0], "latent_image": ["latent", 0]}
SAMPLER = {"steps": 5, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", **PROMPTS}
ALL_STEPS = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
ROUTED = {"model": ["loader", 0], "options": ["options", 0]}
# every node of the pack, and stock ones that they need
GRAPH = {
    "loader": node("AsyncDiffDemoLoader"),
    "red": node("AsyncDiffDemoTextEncode", text="red heart"),
    "empty": node("AsyncDiffDemoTextEncode", text=""),
    "latent": node("EmptyChromaRadianceLatentImage", width=32, height=32, batch_size=1),
    "options": options("Custom", segments=2),
    "sampler": node("AsyncDiffKSampler", seed=1, denoise=1.0, **SAMPLER, **ROUTED),
    "advanced": node("AsyncDiffKSamplerAdvanced", noise_seed=2, **ALL_STEPS, **SAMPLER, **ROUTED),
    "attached": node("AsyncDiffModel", **ROUTED),
    "stock": node("KSampler", model=["attached", 0], seed=3, denoise=1.0, **SAMPLER),
    "compare": node("AsyncDiffCompare", seed=4, denoise=1.0, vae=["loader", 1], **SAMPLER, **ROUTED),
    "report": node("AsyncDiffReport", latent=["sampler", 0]),
    "timeline": node("PreviewImage", images=["report", 1]),
    "decoded": node("VAEDecode", samples=["advanced", 0], vae=["loader", 1]),
    "picture": node("PreviewImage", images=["decoded", 0]),
    "decoded stock": node("VAEDecode", samples=["stock", 0], vae=["loader", 1]),
    "picture stock": node("PreviewImage", images=["decoded stock", 0]),
}


@pytest.fixture
def hiding(tmp_path, monkeypatch):
    """A folder that is first on the path of every process started here, and holds a file of each of them then."""
    folder = tmp_path / "hiding"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    return folder


def test_every_node_runs(hiding, tmp_path):
    with Server(HOST, sys.executable, tmp_path / "base", flags=["--cpu"]) as server:
        page, infos = Page(server), server.get("/object_info")
        pack = {name for name, info in infos.items() if info["category"] == "AsyncDiff"}
        assert pack == {each["class_type"] for each in GRAPH.values() if each["class_type"] in pack}
        run = page.run(GRAPH)
        assert failure(run.history, infos) is None
        routed = {name for name, text in run.texts if text.startswith("AsyncDiff: 2 segments on cpu, cpu")}
        assert routed == {"sampler", "advanced", "stock", "compare"}
        assert {server.process.pid, *page.ranks()} <= {int(file.stem) for file in hiding.glob("*.pid")}
        assert len(page.ranks()) == 2 and len(run.history["outputs"]["timeline"]["images"]) == 1


def test_every_module_can_be_imported(hiding):
    program = IMPORTS.format(host=str(HOST), root=str(PACK))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 80
