"""One server and one browser for all tests of the page; a page for each file of tests."""

import os
import sys
from pathlib import Path

import pytest

HOST = os.environ.get("ASYNCDIFF_HOST_UNDER_TEST")

if HOST is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from frontend import CHROMIUM, PACK_FOLDER, Frontend, launch, serve

    from asyncdiff_nodes.cli.comfyui import PACK


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A ComfyUI that sees no GPU, with this pack and the test pack."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        packs = {PACK_FOLDER: PACK, "asyncdiff tests": Path(__file__).parents[1] / "pack"}
        with serve(Path(HOST), sys.executable, tmp_path_factory.mktemp("page"), packs) as server:
            yield server


@pytest.fixture(scope="session")
def chromium(server):
    """The browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch(playwright.chromium)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def frontend(server, chromium):
    """A page that the tests of one file share."""
    frontend = Frontend(server, chromium)
    yield frontend
    frontend.close()


@pytest.fixture
def choose(frontend):
    """Choose settings of the page, by their ids, for one test."""
    before = {}

    def choose(name, value):
        before.setdefault(name, frontend.setting(name))
        frontend.choose(name, value)

    yield choose
    for name, value in before.items():
        frontend.choose(name, value)


@pytest.fixture(scope="session")
def chinese(server, chromium):
    """A page in Chinese; those that open later are in English again."""
    frontend = Frontend(server, chromium, Comfy_Locale="zh")
    server.post("/settings", {"Comfy.Locale": "en"})
    yield frontend
    frontend.close()
