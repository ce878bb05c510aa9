"""Transfers between devices wait on these, and the devices wait for them: in no order that could stop two ranks for good."""

import concurrent.futures
import functools
import time

import direct_links
import pytest
import torch
import torch.distributed as dist

import toys
from asyncdiff_nodes.engine import IdleWorkers, Plan, RankOptions, Simulator, WorkerGroup
from asyncdiff_nodes.engine.rank import links
from asyncdiff_nodes.engine.rank.links import RankLocation

TIMESTEPS = [900, 700, 500, 300, 200, 100]
DEVICES = ["sim:0", "sim:1", "sim:2", "sim:0", "sim:1"]
#: Values that go round in a circle: of a network whose first blocks are not computed twice.
ROUND = [
    Plan(segments=2, warmup=2, cuts=("blocks.2", "blocks.5"), forecast=0, cooldown=1),
    Plan(segments=2, warmup=3, cuts=("blocks.2", "blocks.5"), forecast=0, microbatches=2),
    Plan(segments=3, stride=2, warmup=3, cuts=("blocks.1", "blocks.3", "blocks.6"), forecast=0, cooldown=1),
]
FAST = [toys.PLANS[3], toys.PLANS[6]]
BANDED = [Plan(segments=1, bands=2), Plan(segments=2, warmup=3, cooldown=1, bands=2)]
SLOW = [plan for plan in toys.PLANS if plan not in FAST]


@pytest.fixture(scope="module")
def idle():
    processes = IdleWorkers()
    yield processes
    processes.close()


def test_kernels_that_the_host_waits_for_stop_nobody(spawned, monkeypatch):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    net, plan = toys.random_net(3), ROUND[0]
    options = RankOptions(threads_per_rank=1, prepare=direct_links.prepare, call_timeout=10)
    with torch.no_grad(), WorkerGroup(net, plan, DEVICES[:2], family=toys.TOY, ranks=options) as group:
        group.begin(TIMESTEPS)
        assert toys.denoise(group, TIMESTEPS).isfinite().all()


@pytest.mark.parametrize(
    "plan", [*ROUND, *FAST, *BANDED, *(pytest.param(plan, marks=pytest.mark.slow) for plan in SLOW)], ids=toys.label
)
@torch.no_grad()
def test_no_order_of_waiting_stops_the_ranks(plan, idle):
    net = toys.random_net(3)
    with Simulator(net, plan, family=toys.TOY) as simulator:
        simulator.begin(TIMESTEPS)
        expected = toys.denoise(simulator, TIMESTEPS)
    options = RankOptions(threads_per_rank=1, prepare=direct_links.prepare, call_timeout=20, idle=idle)
    with WorkerGroup(net, plan, DEVICES[: plan.world_size], family=toys.TOY, ranks=options) as group:
        for _ in range(2):
            group.begin(TIMESTEPS)
            actual = toys.denoise(group, TIMESTEPS)
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
            group.tidy()
        group.begin(TIMESTEPS)
        toys.denoise(group, TIMESTEPS[:4])  # values of the last call are still on their way
        assert group.stats().bytes_sent > 0
        released = group.release()
    assert len(released._workers) == plan.world_size, "every process is there for another group"
    idle.absorb(released)


FAULTS = {
    "fails": "no shared memory",
    "hangs": "nothing arrived within 1 s",
    "garbles": "other values arrived than were sent",
}


@pytest.mark.parametrize("fault", FAULTS)
@torch.no_grad()
def test_links_that_do_not_work_lead_through_the_hosts_memory(fault, idle):
    """This is found out in a second, named, and need not be found out again."""
    net, plan = toys.random_net(3), ROUND[0]  # with links both ways
    with Simulator(net, plan, family=toys.TOY) as simulator:
        simulator.begin(TIMESTEPS)
        expected = toys.denoise(simulator, TIMESTEPS)

    def run(**more):
        prepare = functools.partial(direct_links.prepare, fault, trial_seconds=1)
        options = RankOptions(threads_per_rank=1, prepare=prepare, call_timeout=20, idle=idle, **more)
        begin = time.monotonic()
        with WorkerGroup(net, plan, DEVICES[: plan.world_size], family=toys.TOY, ranks=options) as group:
            started = time.monotonic() - begin
            group.begin(TIMESTEPS)
            torch.testing.assert_close(toys.denoise(group, TIMESTEPS), expected, atol=1e-5, rtol=1e-5)
            idle.absorb(group.release())
            return group.refusals, started

    refusals, first = run()
    assert refusals == {frozenset(DEVICES[:2]): FAULTS[fault]}
    refusals, second = run(staged=list(refusals))
    assert refusals == {}
    if fault == "hangs":
        assert second < 1 < first < 2.5  # each pair of devices is tried once


def test_a_link_to_somebody_else_is_refused():
    store, here = dist.HashStore(), RankLocation("cpu", "cpu")

    def stranger():
        group = links._host_link(dist.PrefixStore("host", store), 0, here.host, 10)
        group.send([torch.full((1,), 7)], 1, 0).wait()

    with concurrent.futures.ThreadPoolExecutor() as threads:
        other = threads.submit(stranger)
        with pytest.raises(RuntimeError, match="the link from cpu to cpu carries foreign data"):
            links.open_link(store, here, here, sends=False, direct=False, timeout=10)
        other.result(10)
