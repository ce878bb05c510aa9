"""Tests that run inside a real ComfyUI: under its Python, with its modules. ``run.py`` beside this file starts them."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from order import together

ROOT = Path(__file__).resolve().parents[2]
HOST = os.environ.get("ASYNCDIFF_HOST_UNDER_TEST")  # set by run.py

if HOST is None:
    collect_ignore_glob = ["*.py"]
else:
    sys.path[:0] = [HOST, str(ROOT)]
    import comfy.options  # noqa: F401  (before the flags, so that pytest's own command line is not parsed)
    from comfy.cli_args import args

    args.cpu = True
    pytest.register_assert_rewrite("helpers")  # so that a failed assertion says as much there as in a test

    def pytest_collection_modifyitems(items):
        """Run the tests of one kind of model in a file one after the other, so that they share its ranks."""

        def shared(item):
            kind = item.callspec.params.get("kind") if hasattr(item, "callspec") else None
            return item.nodeid if kind is None else (item.path, kind)

        together(items, shared)


@pytest.fixture(scope="session")
def sd15():
    """One model for the tests that do not care which, so that they share its ranks."""
    from helpers import small

    return small.model("sd15", seed=9)


@pytest.fixture(scope="session")
def prompts():
    """Positive and negative CONDITIONING for ``sd15``."""
    from helpers.sampling import prompts_for

    return prompts_for("sd15")


@pytest.fixture(autouse=True)
def cuts_by_macs(request, monkeypatch, tmp_path):
    """Pictures depend on cuts: these follow what was measured only in tests that ask for it, and nothing is kept for others."""
    import folder_paths

    from asyncdiff_nodes.host.workers.block_times import Balance

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    if "measured" not in request.fixturenames:
        monkeypatch.setattr(Balance, "estimate", lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def host_rules():
    """One thread, and no gradients, as in the host's own execution; servers and ranks end with a run that is terminated, too."""

    def end(*_):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # where Python drops what is raised, as in garbage collection: the next one
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    from asyncdiff_nodes.host.workers.pool import POOL

    POOL.release()
