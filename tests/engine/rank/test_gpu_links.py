"""Transfers between GPUs wait on these, and GPUs wait for them: in no order that could stop two ranks for good."""

import pytest
import torch

import strict_gpus
import toys
from asyncdiff_nodes.engine import IdleWorkers, Plan, RankOptions, Simulator, WorkerGroup

TIMESTEPS = [900, 700, 500, 300, 200, 100]
IDLE = IdleWorkers()
#: Values that go round in a circle: of a network whose first blocks are not computed twice.
ROUND = [
    Plan(segments=2, warmup=2, cuts=("blocks.2", "blocks.5"), forecast=0, cooldown=1),
    Plan(segments=2, warmup=3, cuts=("blocks.2", "blocks.5"), forecast=0, microbatches=2),
    Plan(segments=3, stride=2, warmup=3, cuts=("blocks.1", "blocks.3", "blocks.6"), forecast=0, cooldown=1),
]
SLOW = [plan for plan in toys.PLANS if plan not in (toys.PLANS[3], toys.PLANS[6])]


@pytest.fixture(scope="module", autouse=True)
def processes():
    yield
    IDLE.close()


@pytest.mark.parametrize(
    "plan",
    [*ROUND, toys.PLANS[3], toys.PLANS[6], *(pytest.param(plan, marks=pytest.mark.slow) for plan in SLOW)],
    ids=toys.label,
)
def test_no_order_of_waiting_stops_the_ranks(plan):
    net = toys.random_net(3)
    with Simulator(net, plan, family=toys.TOY) as simulator:
        simulator.begin(TIMESTEPS)
        expected = toys.denoise(simulator, TIMESTEPS)
    devices = ["cpu"] * plan.world_size
    ranks = RankOptions(threads_per_rank=1, prepare=strict_gpus.prepare, call_timeout=20, idle=IDLE)
    group = WorkerGroup(net, plan, devices, family=toys.TOY, ranks=ranks)
    with group:
        group.begin(TIMESTEPS)
        actual = toys.denoise(group, TIMESTEPS)
        assert group.stats().bytes_sent > 0
        IDLE.absorb(group.release())
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
