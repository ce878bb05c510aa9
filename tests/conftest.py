"""What all tests share, and the two laws that many of them show.

Law 1: exact when synchronous. While every step is synchronous, as with preset Exact, the result is the unrouted model's, bit for
bit, on the same type of device: with every sampler, plan and model. What is the same but for rounding (branches, micro-batches)
is said to be.

Law 2: asynchronous is precisely what the schedule says. Ranks compute what ``asyncdiff_nodes.engine.Simulator`` does, which plays
the same plan through in one process: the same numbers, to rounding (1e-5 in float32 on CPUs, or better). With ``forecast=0`` both
are those of the published implementation, whose recorded runs are in tests/goldens.
"""

import gc
import json
import multiprocessing
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from asyncdiff_nodes.engine.parent import worker_processes

DIFFUSERS = ["diffusers.models.unets.unet_2d_condition", "diffusers.models.transformers.transformer_flux"]
COVERED = pytest.StashKey[list]()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums over one thread are the same everywhere, so results can be compared bit for bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def forked():
    """Ranks are forked from a process that has imported PyTorch and diffusers: they start in a twentieth of the time.

    They differ in nothing else from those that are spawned, as tests of starts and ends have them; see ``spawned``.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        # nothing of a host, whose modules look at settings of each rank; what cannot be imported is left out
        multiprocessing.set_forkserver_preload(["asyncdiff_nodes.engine.rank.message_loop", *DIFFUSERS])
        forkserver.ensure_running()  # before a test looks at the folder in which it has its socket
        worker_processes.CONTEXT = mp.get_context("forkserver")


@pytest.fixture
def spawned(monkeypatch):
    """Ranks are spawned, as users have them."""
    monkeypatch.setattr(worker_processes, "CONTEXT", mp.get_context("spawn"))


def pytest_addoption(parser):
    parser.addoption("--covered", metavar="FILE", help="write what the tests that passed show of which model families")


def pytest_collection_finish():
    """What is imported by now stays: looking for what nobody holds takes a fifth of a second otherwise, each time."""
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    config.stash[COVERED] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    marker = item.get_closest_marker("covers")
    if marker and report.when == "call" and not report.skipped:
        kind = marker.kwargs.get("kind") or item.callspec.params.get("kind") or item.callspec.params["name"]
        row = {"kind": kind, "what": marker.args, "passed": report.passed, "test": item.nodeid, **dict(item.user_properties)}
        item.config.stash[COVERED].append(row)


def pytest_sessionfinish(session):
    if path := session.config.getoption("--covered"):
        Path(path).write_text(json.dumps(session.config.stash[COVERED]), encoding="utf-8")
