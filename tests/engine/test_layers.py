"""The engine stands on torch and the standard library alone, and importing it does nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("diffusers", "transformers", "comfy", "safetensors", "PIL", "rich", "skimage", "psutil")


def run(program):
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_engine_imports_nothing_else_and_starts_nothing():
    out = run(
        "import sys, threading, torch, torch.distributed\n"
        "before = set(sys.modules)\n"
        "import asyncdiff_nodes.engine, asyncdiff_nodes.models\n"
        "import multiprocessing\n"
        "assert not multiprocessing.active_children()\n"
        "assert threading.active_count() == 1\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
    )
    new = set(out.split()) - set(sys.stdlib_module_names)
    assert "asyncdiff_nodes" in new
    assert new <= {"asyncdiff_nodes", "torch"}


def test_importing_the_engine_alone_imports_no_library_of_the_other_layers():
    out = run("import sys, asyncdiff_nodes.engine, asyncdiff_nodes.engine.worker\nprint(*sys.modules)\n")
    loaded = {name.partition(".")[0] for name in out.split()}
    assert "torch" in loaded
    assert loaded.isdisjoint(FOREIGN)
    assert "asyncdiff_nodes.cli" not in out.split()
    assert "asyncdiff_nodes.diffusers" not in out.split()


def test_a_worker_does_not_import_torch_s_compiler():
    """It would double the time that a group takes to start."""
    out = run(
        "import sys, asyncdiff_nodes.engine.worker\n"
        "from asyncdiff_nodes.engine import backends\n"
        "backends.restore(backends.snapshot())\n"
        "print(*sys.modules)\n"
    )
    assert {"torch._inductor", "torch._dynamo"}.isdisjoint(out.split())


@pytest.mark.parametrize("deterministic", [(True, False), (True, True)])
def test_deterministic_algorithms_reach_a_worker(deterministic):
    out = run(
        "import torch\n"
        "from asyncdiff_nodes.engine import backends\n"
        "settings = backends.snapshot()\n"
        f"settings['deterministic'], settings['deterministic_warn_only'] = {deterministic}\n"
        "backends.restore(settings)\n"
        "print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())\n"
    )
    assert out.split() == [str(value) for value in deterministic]


def test_every_number_setting_survives_the_way_to_a_worker():
    out = run(
        "import torch\n"
        "from asyncdiff_nodes.engine import backends\n"
        "torch.set_float32_matmul_precision('high')\n"
        "torch.backends.cudnn.benchmark = True\n"
        "torch.backends.cudnn.deterministic = True\n"
        "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False\n"
        "torch.backends.cuda.enable_flash_sdp(False)\n"
        "torch.backends.mkldnn.set_flags(False)\n"
        "changed = backends.snapshot()\n"
        "torch.set_float32_matmul_precision('highest')\n"
        "torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = False\n"
        "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True\n"
        "torch.backends.cuda.enable_flash_sdp(True)\n"
        "torch.backends.mkldnn.set_flags(True)\n"
        "assert backends.snapshot() != changed\n"
        "backends.restore(changed)\n"
        "assert backends.snapshot() == changed, (backends.snapshot(), changed)\n"
    )
    assert out == ""
