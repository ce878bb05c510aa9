"""The engine stands on torch and the standard library alone, and importing it does nothing."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("diffusers", "transformers", "comfy", "safetensors", "PIL", "rich", "skimage", "psutil", "ray")


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
    brought = any(requirement.startswith("triton") for requirement in importlib.metadata.requires("torch"))
    # which torch imports by itself where its build brings it
    assert new <= {"asyncdiff_nodes", "torch", *(["triton"] if brought else [])}


def test_a_worker_imports_no_other_layer_and_not_torch_s_compiler():
    """The compiler would double the time that a group takes to start."""
    out = run(
        "import sys, asyncdiff_nodes.engine.rank.message_loop\n"
        "from asyncdiff_nodes.engine.rank import numerics\n"
        "numerics.restore(numerics.snapshot())\n"
        "print(*sys.modules)\n"
    )
    loaded = set(out.split())
    assert "torch" in loaded
    assert {"torch._inductor", "torch._dynamo", "asyncdiff_nodes.cli", "asyncdiff_nodes.diffusers"}.isdisjoint(loaded)
    assert {name.partition(".")[0] for name in loaded}.isdisjoint(FOREIGN)


def test_every_numerical_setting_survives_the_way_to_a_worker():
    out = run(
        "import torch\n"
        "from asyncdiff_nodes.engine.rank import numerics\n"
        "original = numerics.snapshot()\n"
        "torch.set_float32_matmul_precision('high')\n"
        "torch.use_deterministic_algorithms(True, warn_only=True)\n"
        "torch.backends.cudnn.benchmark = True\n"
        "torch.backends.cudnn.deterministic = True\n"
        "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False\n"
        "torch.backends.cuda.enable_cudnn_sdp(False)\n"
        "torch.backends.mkldnn.set_flags(False)\n"
        "changed = numerics.snapshot()\n"
        "for settings in (original, changed, original):\n"
        "    numerics.restore(settings)\n"
        "    assert numerics.snapshot() == settings, (numerics.snapshot(), settings)\n"
        "print(*sorted(name for name in changed if changed[name] != original[name]))\n"
    )
    assert out.split() == [
        "attention",
        "cuda_matmul",
        "cudnn",
        "deterministic",
        "deterministic_warn_only",
        "fp32",
        "mkldnn",
    ]


@pytest.mark.parametrize(
    "change",
    [
        "backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False",
        "set_float32_matmul_precision('medium')",
    ],
)
def test_older_settings_of_float32_can_still_be_read_in_a_worker(change):
    """torch's compiler reads them."""
    ask = "torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32"
    begin = "import pickle, sys, torch\nfrom asyncdiff_nodes.engine.rank import numerics\n"
    end = f"print(pickle.dumps(numerics.snapshot()).hex(), *({ask}))"
    settings, *parents = run(begin + f"torch.{change}\n" + end).split()
    again, *ranks = run(begin + f"numerics.restore(pickle.loads(bytes.fromhex('{settings}')))\n" + end).split()
    assert (again, ranks) == (settings, parents)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this PyTorch has no such settings")
@pytest.mark.parametrize(
    "name", ["fp32_precision", "cudnn.fp32_precision", "cudnn.conv.fp32_precision", "cuda.matmul.fp32_precision"]
)
def test_settings_of_float32_by_kind_of_layer(name):
    """Once one of them was used, the older settings cannot be read any more."""
    run(
        "import torch\n"
        "from asyncdiff_nodes.engine.rank import numerics\n"
        "original = numerics.snapshot()\n"
        f"torch.backends.{name} = 'tf32'\n"
        "changed = numerics.snapshot()\n"
        f"torch.backends.{name} = 'ieee'\n"
        "assert numerics.snapshot() != changed\n"
        "for settings in (original, changed, original):\n"
        "    numerics.restore(settings)\n"
        "    assert numerics.snapshot() == settings, (numerics.snapshot(), settings)\n"
    )
