"""ComfyUI on simulated GPUs: it takes them for MLUs, a kind that it finds through a module of its own.

python tests/host/run.py tests/simulated/host
"""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from asyncdiff_nodes.engine.parent import worker_processes

ROOT = Path(__file__).resolve().parents[3]
HOST = os.environ.get("ASYNCDIFF_HOST_UNDER_TEST")  # set by run.py

if HOST is None:
    collect_ignore_glob = ["*.py"]
else:
    os.environ["ASYNCDIFF_SIM_KIND"] = "mlu"
    sys.path[:0] = [HOST, str(ROOT), str(ROOT / "tests" / "host")]
    import comfy.options  # noqa: F401  (before the flags, so that pytest's own command line is not parsed)
    import sim

    assert sim.KIND == "mlu"


@pytest.fixture(scope="session", autouse=True)
def forked():
    """Ranks are forked from a process that knows the devices, as PyTorch does of those that it loads by itself."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(sim.__file__).parent), os.environ.get("PYTHONPATH", "")])
    multiprocessing.set_forkserver_preload(["asyncdiff_nodes.engine.rank.message_loop", "sim"])
    forkserver.ensure_running()
    worker_processes.CONTEXT = mp.get_context("forkserver")


@pytest.fixture(scope="session", autouse=True)
def host_rules():
    """One thread, and no gradients, as in the host's own execution."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    from asyncdiff_nodes.host.workers.pool import POOL

    POOL.release()


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch, tmp_path):
    """Pictures depend on cuts: these follow MACs, and nothing that was measured is kept."""
    import folder_paths

    from asyncdiff_nodes.host.workers.block_times import Balance

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    monkeypatch.setattr(Balance, "estimate", lambda *_: None)
