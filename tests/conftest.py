"""What all tests share."""

import json
from pathlib import Path

import pytest
import torch

COVERED = pytest.StashKey[list]()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums over one thread are the same everywhere, so results can be compared bit for bit."""
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--covered", metavar="FILE", help="write what the tests that passed show of which model families")


def pytest_configure(config):
    config.stash[COVERED] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    marker = item.get_closest_marker("covers")
    if marker and report.when == "call" and not report.skipped:
        kind = marker.kwargs.get("kind") or item.callspec.params["kind"]
        row = {"kind": kind, "what": marker.args, "passed": report.passed, "test": item.nodeid}
        item.config.stash[COVERED].append(row)


def pytest_sessionfinish(session):
    if path := session.config.getoption("--covered"):
        Path(path).write_text(json.dumps(session.config.stash[COVERED]), encoding="utf-8")
