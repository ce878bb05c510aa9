"""The pack does nothing when ComfyUI imports it, and does not need its optional packages for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, importlib.util, sys, threading
sys.path.insert(0, {host!r})
import comfy.options
from comfy.cli_args import args
args.cpu = True
import comfy_api.latest, comfy.samplers
for name in ("matplotlib", "diffusers", "safetensors", "safetensors.torch", "rich", "psutil", "PIL"):
    sys.modules[name] = None  # importing it fails from here on
before, threads = set(sys.modules), threading.active_count()
name = "/home/an artist/ComfyUI/custom_nodes/My AsyncDiff"  # how the host names the module of a pack
spec = importlib.util.spec_from_file_location(name, {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
pack = importlib.util.module_from_spec(spec)
sys.modules[name] = pack
spec.loader.exec_module(pack)
assert not [module for module in set(sys.modules) - before - {{name}} if module.startswith("asyncdiff")]
extension = asyncio.run(pack.comfy_entrypoint())
nodes = asyncio.run(extension.get_node_list())
schemas = [node.GET_SCHEMA() for node in nodes]
print(len(schemas), not hasattr(pack, "NODE_CLASS_MAPPINGS"), threading.active_count() == threads)
ours = ("asyncdiff_nodes.engine", "asyncdiff_nodes.host")
print(sorted(module for module in set(sys.modules) - before if module.startswith(ours)))
"""


def test_import_does_nothing_and_needs_no_optional_package():
    program = PROGRAM.format(host=os.environ["ASYNCDIFF_HOST_UNDER_TEST"], root=str(ROOT))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    host = "asyncdiff_nodes.host"  # of it what imports nothing
    loaded = [host, f"{host}.choices", f"{host}.page", f"{host}.page.prompt_server"]
    assert found.stdout.splitlines()[-2:] == ["8 True True", str(loaded)]


RANK = """
import inspect, sys
sys.path[:0] = [{host!r}, {root!r}]
from asyncdiff_nodes.host.workers.host_settings import HostSettings
HostSettings({{"cpu": True}})()
import comfy.ldm.modules.diffusionmodules.openaimodel, comfy.ldm.flux.model, torch
inspect.getmodule(torch.nn.Linear)  # goes through all modules
print([name for name in sys.modules if name.startswith("torch._dynamo.")])
{use}
print(torch._dynamo.allow_in_graph is sys.modules["torch._dynamo"].allow_in_graph)
"""


@pytest.mark.parametrize(
    "use", [pytest.param("import torch._dynamo.config", marks=pytest.mark.slow), "torch.compile(torch.sin, backend='eager')"]
)
def test_a_rank_imports_torchs_compiler_when_it_is_used_and_not_before(use):
    """It would make the ranks' start nearly twice as long."""
    program = RANK.format(host=os.environ["ASYNCDIFF_HOST_UNDER_TEST"], root=str(ROOT), use=use)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-2:] == ["[]", "True"]
