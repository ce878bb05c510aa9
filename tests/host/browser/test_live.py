"""What the server tells a page about a run, and the settings that it reads; over HTTP and the websocket, without a browser."""

import json
import time
import urllib.error
import urllib.request

import pytest

from helpers.serving import Page, alive, options, routed_only, seconds_until_gone

EVENT = "asyncdiff.run"
SEGMENTS = options("Custom", segments=2)


@pytest.fixture(scope="module")
def page(server):
    """What the server sends it stays for all tests."""
    return Page(server)


@pytest.fixture
def watcher(page):
    """A page that has not asked for events, whatever it did in tests before."""
    watch(page, interval=0)
    return page


@pytest.fixture
def no_workers(server):
    """Workers of tests before are gone."""
    server.post("/asyncdiff/stop", {})


@pytest.fixture
def settings(server):
    """Change settings of the pack for one test."""
    defaults = {
        "AsyncDiff.Preset": "Balanced",
        "AsyncDiff.Devices": "auto",
        "AsyncDiff.KeepMinutes": 0,
        "AsyncDiff.Verify": "auto",
    }
    yield lambda **values: server.post("/settings", {f"AsyncDiff.{name}": value for name, value in values.items()})
    server.post("/settings", defaults)


def watch(page, interval=0.05):
    return page.server.get(f"/asyncdiff/state?client=asyncdiff&interval={interval}")


def refusal(server, path, data=None, kind="application/json"):
    """Status and reason with which the server refuses."""
    request = urllib.request.Request(server.url + path, data, {"Content-Type": kind} if data else {})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    return error.value.code, json.load(error.value)["error"]


def test_nothing_is_sent_to_a_page_that_did_not_ask(watcher):
    run = watcher.run(routed_only(steps=8, chosen=SEGMENTS))
    assert run.done and not run.of(EVENT)
    state = watcher.server.get("/asyncdiff/state")
    assert (state["run"]["phase"], state["run"]["step"], state["run"]["steps"]) == ("done", 8, 8)
    assert len(state["run"]["records"]) == 2 * 8 + 1, "rank 0 gets ahead once"
    assert "Plan: 2 segments" in state["report"]
    assert state["workers"][-1]["devices"] == ["cpu", "cpu"]


def test_a_page_that_asked_sees_every_call_of_every_rank(watcher):
    watch(watcher)
    run = watcher.run(routed_only(steps=12, chosen=SEGMENTS))
    events = run.of(EVENT)
    assert events[0]["phase"] == "starting"
    assert events[-1]["phase"] == "done"
    assert {event["number"] for event in events} == {events[0]["number"]}
    records = []
    for event in events:
        if "records" in event:
            assert event["first"] <= len(records), "records are missing"
            records[event["first"] :] = event["records"]
    calls = {rank: [(call, bool(synchronous)) for r, call, synchronous, *_ in records if r == rank] for rank in (0, 1)}
    assert calls[1] == [(call, call < 3) for call in range(12)]
    assert calls[0] == [*calls[1][:3], (2, False), *calls[1][3:]], "after its part of the last synchronous call it gets ahead"
    for rank, call, _, start, end, waits, drift in records:
        assert start < end and all(start <= edge <= end for edge in waits)
        assert drift is None if rank == 0 or call == 0 else drift >= 0, "nothing comes back to the first segment"
    last = events[-1]
    assert last["plan"]["warmup"] == 3 and last["plan"]["segments"] == 2
    assert 1 <= sum(rank["share"] for rank in last["ranks"]) < 1.35, "some blocks are computed on both"
    assert all(used > 50 * 2**20 and total > used for used, total in last["memory"])
    assert last["seconds"] > 0 and last["sequential"] > 0 and last["speedup_so_far"] > 0 and last["bytes_per_step"] > 0


def test_events_are_no_more_frequent_than_asked_for(watcher):
    watch(watcher, interval=30)
    run = watcher.run(routed_only(steps=30, chosen=SEGMENTS))
    assert [event["phase"] for event in run.of(EVENT)] == ["starting", "sampling", "done"]


def test_a_page_that_leaves_is_sent_nothing_more(watcher):
    watch(watcher)
    watch(watcher, interval=0)
    assert not watcher.run(routed_only(chosen=SEGMENTS)).of(EVENT)


def test_a_run_that_is_not_routed_says_why(watcher):
    watch(watcher)
    run = watcher.run(routed_only(chosen=options("Balanced", "cpu")))
    usual = [event for event in run.of(EVENT) if event["phase"] == "usual"]
    assert usual and "names only one device" in usual[0]["notes"][0]
    assert "ranks" not in run.of(EVENT)[-1]


@pytest.mark.parametrize("interval", ["x", "0.01", "nan", "1e9"])
def test_a_bad_interval_is_refused(server, interval):
    status, reason = refusal(server, f"/asyncdiff/state?interval={interval}")
    assert status == 400 and interval in reason


def test_workers_are_stopped_only_when_they_are_idle(watcher):
    answers = []

    def stop(start):
        watcher.wait_for(lambda kind, data: kind == "progress" and data["value"] >= 4, start)
        answers.append(refusal(watcher.server, "/asyncdiff/stop", b"{}"))

    run = watcher.run(routed_only(pixels=256, steps=12, chosen=SEGMENTS), meanwhile=stop)
    assert run.done and answers == [(409, "The workers are sampling: cancel the run first.")]
    ranks = watcher.ranks()
    assert len(alive(ranks)) >= 2
    assert refusal(watcher.server, "/asyncdiff/stop", b"a=b", "application/x-www-form-urlencoded")[0] == 415
    assert watcher.server.post("/asyncdiff/stop", {})["stopped"] >= 2
    seconds_until_gone(ranks, limit=5.0)
    assert watcher.server.get("/asyncdiff/state")["workers"] == []
    assert watcher.run(routed_only(chosen=SEGMENTS)).done


def test_the_self_test_waits_for_the_run_and_runs_once_at_a_time(watcher):
    answers = []

    def ask(start):
        watcher.wait_for(lambda kind, data: kind == "progress" and data["value"] >= 4, start)
        answers.append(refusal(watcher.server, "/asyncdiff/selftest", b"{}"))

    assert watcher.run(routed_only(pixels=256, steps=12, chosen=SEGMENTS), meanwhile=ask).done
    assert answers == [(409, "The workers are sampling: cancel the run first.")]
    assert refusal(watcher.server, "/asyncdiff/selftest", b"a=b", "application/x-www-form-urlencoded")[0] == 415


def test_settings_are_the_defaults_of_samplers_without_options(watcher, settings):
    prompt = routed_only()
    del prompt["routed"]["inputs"]["options"]
    settings(Preset="Exact", Devices="cpu,cpu")
    assert watcher.run(prompt).texts[0][1].startswith("AsyncDiff: 2 segments on cpu, cpu")
    assert watcher.server.get("/asyncdiff/state")["run"]["plan"]["warmup"] is None
    assert watcher.run(prompt).texts == []  # nothing changed: the host keeps the latent
    settings(Preset="Balanced")
    assert watcher.run(prompt).texts, "the host kept the latent of another preset"
    plan = watcher.server.get("/asyncdiff/state")["run"]["plan"]
    assert (plan["warmup"], plan["branches"]) == (3, 2)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"Preset": "Ludicrous"}, "Ludicrous"), ({"Devices": 3}, "Devices is 3"), ({"Devices": "cpu,cuda:7"}, "cuda:7")],
)
def test_a_wrong_setting_is_an_error_that_names_it(watcher, settings, wrong, named):
    settings(**wrong)
    prompt = routed_only()
    del prompt["routed"]["inputs"]["options"]
    run = watcher.run(prompt)
    assert not run.done and named in run.error["exception_message"]
    assert run.error["exception_type"].startswith("asyncdiff_nodes.")


def test_workers_end_when_they_were_kept_for_long_enough(watcher, no_workers, settings):
    settings(KeepMinutes=0.05)
    assert watcher.run(routed_only(chosen=SEGMENTS)).done
    ranks = watcher.ranks()
    assert len(alive(ranks)) == 2
    seconds_until_gone(ranks, limit=15.0)


@pytest.mark.timing
@pytest.mark.slow
def test_watching_costs_less_than_two_per_cent_of_a_step(sd15, prompts):
    """Measured where it happens, in the sampler's thread, on steps of about 0.1 s and events at the highest rate."""
    import nodes

    from asyncdiff_nodes.host.page import progress
    from asyncdiff_nodes.host.routing.hooks import attach
    from asyncdiff_nodes.host.routing.options import Options
    from helpers import small

    spent, tell = [0.0], progress.WATCHERS.tell

    def timed(*args, **keywords):
        began = time.perf_counter()
        tell(*args, **keywords)
        spent[0] += time.perf_counter() - began

    model = attach(sd15, Options("Custom", "cpu,cpu", segments=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.WATCHERS, "tell", timed)
        progress.WATCHERS.watch("a page", 0.05)
        began = time.perf_counter()
        nodes.KSampler().sample(model, 1, 30, 7.0, "euler", "normal", *prompts, small.latent(1, 24, 24))
        whole = sum(r[4] - r[3] for r in progress.current.snapshot()["records"] if r[0] == 0)
    assert time.perf_counter() - began > whole > 0.5
    assert spent[0] < 0.02 * whole, f"{spent[0] / whole:.1%} of {whole:.1f} s"
