"""Branches: the batch of each call divided over ranks of their own."""

from dataclasses import replace

import pytest
import torch

import toys
from asyncdiff_nodes.engine import Plan, PlanError, Simulator, WorkerGroup, place, trace
from asyncdiff_nodes.engine.batch import divide
from toys import TOY

TIMESTEPS = [980, 860, 740, 620, 500, 380, 260, 140, 20]
PLANS = (
    Plan(segments=1, branches=2, cooldown=1, time_shift=True),
    Plan(segments=2, branches=2, warmup=2, cooldown=1),
    Plan(segments=2, branches=2, warmup=2, forecast=0),
    Plan(segments=2, branches=2, stride=2, warmup=1),
)
WHOLE, AHEAD = PLANS[:2]


def label(plan):
    return f"{toys.label(plan)}-B{plan.branches}"


def by_parts(call, plan):
    """``call`` for each part of a batch by itself."""

    def run(x, t, stream=None, **kwargs):
        parts = divide((x, t), kwargs, x.shape[0], plan.branches)
        return torch.cat([call(*args, **more, stream=(stream, part)) for part, (args, more) in enumerate(parts)])

    return run


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("plan", PLANS, ids=label)
def test_each_part_is_a_run_of_its_own(plan, batch, group_of):
    group, net = group_of(plan)
    group.begin(TIMESTEPS)
    routed = toys.denoise(group, TIMESTEPS, batch=batch)
    if plan is WHOLE:
        with torch.no_grad():
            expected = toys.denoise(by_parts(lambda *args, stream, **more: net(*args, **more), plan), TIMESTEPS, batch=batch)
    else:
        with Simulator(net, replace(plan, branches=1), family=TOY) as simulator:
            simulator.begin(TIMESTEPS)
            expected = toys.denoise(by_parts(simulator, plan), TIMESTEPS, batch=batch)
    assert torch.equal(routed, expected)


@pytest.mark.parametrize("plan", PLANS, ids=label)
def test_group_computes_what_the_simulator_does(plan, group_of):
    group, net = group_of(plan)
    group.begin(TIMESTEPS)
    routed = toys.denoise(group, TIMESTEPS, batch=4)
    with Simulator(net, plan, family=TOY) as simulator:
        simulator.begin(TIMESTEPS)
        assert torch.equal(routed, toys.denoise(simulator, TIMESTEPS, batch=4))


@pytest.mark.parametrize("plan", PLANS, ids=label)
def test_bytes_are_those_of_all_parts(plan, group_of):
    group, _ = group_of(plan)
    for batch, used in ((1, 1), (2, 2), (4, 2)):
        group.begin(TIMESTEPS)
        toys.denoise(group, TIMESTEPS, batch=batch)
        stats = group.stats()
        assert stats.bytes_per_call == stats.planned_bytes
        assert {record.rank // plan.branch_size for record in stats.records} == set(range(used)), "who computed"


@pytest.mark.parametrize("plan", [AHEAD], ids=label)
def test_every_branch_has_the_weights_of_its_own_segments_only(plan, group_of):
    group, net = group_of(plan)
    held = [set(rank.weights) for rank in group.stats().ranks]
    assert held[0] == held[2] and held[1] == held[3] and held[0] | held[1] == set(net.state_dict())
    assert [rank.segment for rank in group.stats().ranks] == [0, 1, 0, 1]
    whole = [set(rank.weights) for rank in group_of(WHOLE)[0].stats().ranks]
    assert whole == [set(net.state_dict())] * 2


@pytest.mark.parametrize("plan", [WHOLE], ids=label)
def test_one_segment_needs_no_schedule_and_follows_none(plan, group_of):
    group, net = group_of(plan)
    group.begin(TIMESTEPS)
    x, kwargs = toys.inputs(1)
    with torch.no_grad():
        for t in (3, 980, 555):  # none of them the next
            expected = torch.cat([net(x[i : i + 1], t, kwargs["context"][i : i + 1]) for i in range(2)])
            assert torch.equal(group(x, t, **kwargs), expected)


def test_run_of_branches_costs_what_their_parts_do():
    net = toys.random_net(3)
    graph = trace(net.to("meta"), TOY, *TOY.example_inputs(net, None, 2))
    whole, half = place(graph, AHEAD), place(graph, replace(AHEAD, branches=1))
    assert whole.cost(20) == half.cost(20) / 2
    assert place(graph, WHOLE).cost(20) == 10
    assert place(graph, WHOLE).shares == (1.0,)
    assert place(graph, WHOLE).span(0) == ("blocks.0", "blocks.6")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": 0}, "branches=0 is out of range: choose 1 or more"),
        ({"branches": "2"}, "branches must be a whole number, not '2'"),
        ({"branches": 2, "segments": 0}, "segments=0 is out of range: choose 1 or more"),
        ({"branches": 2, "segments": 1, "stride": 2}, "stride=2 with segments=1: take 2 segments or more, or stride 1"),
    ],
)
def test_impossible_plan_is_refused(options, message):
    with pytest.raises(PlanError, match=message):
        Plan(**options)


def test_wrong_number_of_devices_is_refused():
    with pytest.raises(Exception, match=r"3 devices for segments=2, stride=1, branches=2: name branches \* .* = 4 devices"):
        WorkerGroup(toys.random_net(3), AHEAD, ["cpu"] * 3, family=TOY)


def test_slowest_branch_counts_in_the_cuts():
    net = toys.chain(*[toys.ToyBlock] * 9)
    graph = trace(net.to("meta"), TOY, *TOY.example_inputs(net, None, 2))
    plan = Plan(branches=2, fresh_skips=False)
    assert place(graph, plan, speeds=[1, 1, 2, 2]).cuts == place(graph, plan).cuts
    assert place(graph, plan, speeds=[2, 1, 2, 1]).shares == place(graph, plan, speeds=[2, 3, 9, 1]).shares
