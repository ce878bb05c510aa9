"""Measured balance: blocks move to the faster rank in mid-run, and what was measured is there for the next group."""

import json

import folder_paths
import pytest
import torch

from asyncdiff_nodes.engine import place
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers import block_times
from asyncdiff_nodes.host.workers.block_times import Balance
from asyncdiff_nodes.host.workers.host_settings import HostSettings
from asyncdiff_nodes.host.workers.pool import POOL
from asyncdiff_nodes.host.workers.user_files import path_of
from helpers import small
from helpers.sampling import ksampler
from helpers.throttled import Throttled

REUSE = {"preset": "Custom", "devices": "cpu,cpu", "segments": 2, "warmup": 2, "forecast": False, "cooldown": 0}


@pytest.fixture
def measured(monkeypatch):
    """Groups that start anew, with a slow rank, and moves that cost nothing."""
    POOL.release()
    settings = HostSettings.current()
    monkeypatch.setattr(HostSettings, "current", lambda: Throttled(settings))
    monkeypatch.setattr(block_times, "_MOVE_SECONDS", 0.0)
    yield
    POOL.release()


@pytest.fixture(scope="module")
def model():
    """One whose blocks are told apart by what they cost."""
    return small.model("sd15", seed=9, channels=64)


def sample(model, prompts, options, steps=14):
    return ksampler(attach(model, options), prompts, steps=steps)


def step_seconds(calls):
    """Median asynchronous step of the last run among ``calls``."""
    records = [r for r in last_run().stats.records if not r.synchronous]
    times = [max(r.end - r.start for r in records if r.call == k) for k in calls]
    return sorted(times)[len(times) // 2]


@pytest.mark.timing
def test_blocks_move_to_the_faster_rank_in_mid_run_and_the_next_group_starts_so(measured, model, prompts):
    sample(model, prompts, Options(**REUSE), steps=20)
    first = last_run().placement
    moved = next(call.call for call in last_run().stats.calls if call.why == "move")
    assert step_seconds(range(moved + 1, 20)) < 0.85 * step_seconds(range(2, moved))
    (entry,) = json.loads(path_of("block_times").read_text()).values()
    assert list(entry["blocks"]) == ["cpu cpu", "cpu cpu (2)"]
    assert set(entry["blocks"]["cpu cpu"]) | set(entry["blocks"]["cpu cpu (2)"]) == set(first)
    assert 0 < entry["pause"] < 0.1
    tracked = sum(rank.loaded_size() for rank in POOL._held[-1].memory)
    assert tracked == sum(first.weight_bytes(d) for d in (0, 1))
    POOL.release()
    sample(model, prompts, Options(**REUSE | {"warmup": 99}), steps=2)  # too short for a move
    assert last_run().placement.cuts != place(first.graph, first.plan).cuts


@pytest.mark.timing
@pytest.mark.slow
def test_a_group_that_is_there_moves_before_the_next_run(measured, model, prompts, monkeypatch):
    """And synchronous runs are exact, wherever the blocks are."""
    options = Options(**REUSE)
    with monkeypatch.context() as context:
        context.setattr(Balance, "learnt", lambda *_: False)
        sample(model, prompts, options)
    before, pids = last_run().placement.cuts, POOL._held[-1].group.pids
    sample(model, prompts, options)
    assert last_run().placement.cuts != before and POOL._held[-1].group.pids == pids
    assert not any(call.why == "move" for call in last_run().stats.calls)
    exact = sample(model, prompts, Options(**REUSE | {"warmup": 99}), steps=4)
    assert POOL._held[-1].group.pids == pids
    assert torch.equal(exact, ksampler(model, prompts))


@pytest.mark.slow
def test_chosen_cuts_stay(measured, model, prompts):
    sample(model, prompts, Options(**REUSE, cuts="input_blocks.0, middle_block.0"), steps=10)
    assert last_run().placement.cuts[0] == "input_blocks.0.0"
    assert not any(call.why == "move" for call in last_run().stats.calls)


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1', "\x00"])
def test_no_picture_is_lost_for_a_bad_file(model, prompts, content, monkeypatch, tmp_path):
    path_of("block_times").parent.mkdir()
    path_of("block_times").write_text(content)
    sample(model, prompts, Options(**REUSE), steps=4)
    assert len(json.loads(path_of("block_times").read_text())) == 1
    monkeypatch.setattr(folder_paths, "user_directory", str(path_of("block_times")))  # no folder can be made there
    sample(model, prompts, Options(**REUSE), steps=4)
