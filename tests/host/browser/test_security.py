"""What docs/security.md promises of a running server: over the network, and as another site would ask."""

import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from helpers.serving import Page, options, routed_only

SEGMENTS = options("Custom", segments=2)


@pytest.fixture(scope="module")
def watcher(server):
    """A page of its own."""
    return Page(server)


@pytest.fixture
def block_times(watcher):
    """The file of a run with as many asynchronous calls as are timed."""
    assert watcher.run(routed_only(steps=12, chosen=SEGMENTS)).done
    (kept,) = (watcher.server.base / "user").rglob("block_times.json")
    return kept


def status(server, path, data=None, **headers):
    """Of the answer to a request with these headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.url + path, data, named)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_loopback_is_listened_on_and_there_are_no_files_while_ranks_work(watcher):
    seen = set()

    def look(start):
        watcher.wait_for(lambda kind, data: kind == "progress" and data["value"] >= 4, start)
        root = psutil.Process(watcher.server.process.pid)
        for process in [root, *root.children(recursive=True)]:
            seen.update(
                (process.pid, connection.laddr.ip)
                for connection in process.net_connections(kind="inet")
                if connection.status == psutil.CONN_LISTEN or connection.type.name == "SOCK_DGRAM"
            )
        assert not list(Path(tempfile.gettempdir()).glob("asyncdiff-*"))

    run = watcher.run(routed_only(pixels=256, steps=12, chosen=SEGMENTS), meanwhile=look)
    assert run.done and len({pid for pid, _ in seen}) >= 3, "the server and two ranks listen: gloo does"
    assert {ip for _, ip in seen} <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://elsewhere.example"}, {"Sec_Fetch_Site": "cross-site"}],
    ids=["origin", "fetch metadata"],
)
def test_another_site_is_refused(server, headers):
    """By ComfyUI's own rule, which our routes are under."""
    if headers.get("Sec_Fetch_Site") and status(server, "/queue", **headers) != 403:
        pytest.skip("this ComfyUI does not look at fetch metadata")
    for path in ("/asyncdiff/stop", "/asyncdiff/selftest"):
        assert status(server, path, b"{}", Content_Type="application/json", **headers) == 403
    assert status(server, "/asyncdiff/state", **headers) == 403


@pytest.mark.parametrize("query", ["client=../../../../etc/passwd", "client=" + "x" * 4000, "client=%00", "interval=0&client=[]"])
def test_what_a_request_says_is_looked_up_and_no_more(server, query):
    assert status(server, f"/asyncdiff/state?{query}") == 200


def test_block_times_are_not_served(server, block_times):
    assert block_times.parent.name == "__asyncdiff"
    for path in ("__asyncdiff%2Fblock_times.json", "..%2F__asyncdiff%2Fblock_times.json"):
        assert status(server, f"/userdata/{path}") in (400, 403, 404)


@pytest.mark.parametrize("path", ["/asyncdiff/stop", "/asyncdiff/selftest", "/asyncdiff/", "/asyncdiff/state/../../etc/passwd"])
def test_there_is_nothing_else_to_get(server, path):
    assert status(server, path) in (404, 405)
