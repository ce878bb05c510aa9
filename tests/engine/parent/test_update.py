"""A running group: weights replaced, another plan for one run; and what may be told to it before it starts."""

import os
from functools import partial

import pytest
import torch

import toys
from asyncdiff_nodes.engine import Plan, PlanError, RankOptions, Simulator, WorkerError, WorkerGroup
from asyncdiff_nodes.engine.tensors import meta_copy, tensors_of
from reuse import running

TIMES = [900, 700, 500, 300, 100, 50]


@pytest.fixture(scope="module")
def wide():
    """A group with room for stride 2, and its network."""
    net = toys.random_net(3)
    with running(net, Plan(segments=2, stride=2), family=toys.TOY) as group:
        yield group, net


def run(call, plan, begin):
    begin(TIMES, plan)
    return toys.denoise(call, TIMES)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(segments=2, warmup=2),
        Plan(segments=2, warmup=1, time_shift=True),
        Plan(segments=2, stride=2, warmup=3),
        Plan(segments=2, warmup=2, cooldown=2),
        Plan(segments=2, warmup=99),
    ],
    ids=toys.label,
)
def test_a_run_may_have_its_own_plan(wide, plan):
    """Also with a smaller stride than the group's, where the last rank only listens; the next run is the group's own again."""
    group, net = wide
    found = run(group, plan, group.begin)
    cuts = group.placement.cuts
    with Simulator(net, Plan(**{**vars(plan), "cuts": cuts}), family=toys.TOY) as simulator:
        expected = run(simulator, plan, lambda times, _: simulator.begin(times))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with Simulator(net, Plan(**{**vars(group.plan), "cuts": cuts}), family=toys.TOY) as simulator:
        expected = run(simulator, None, lambda times, _: simulator.begin(times))
    torch.testing.assert_close(run(group, None, group.begin), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("plan", [Plan(segments=3), Plan(stride=3), Plan(cuts=("a", "b")), Plan(fresh_skips=False)])
def test_a_plan_for_other_ranks_is_refused(wide, plan):
    group, _ = wide
    with pytest.raises(PlanError, match="does not fit a group that was started with"):
        group.begin(TIMES, plan)


def test_weights_are_replaced_in_the_running_ranks(wide):
    group, net = wide
    pids, plan = group.pids, Plan(segments=2, warmup=99)
    before = run(group, plan, group.begin)
    other = toys.random_net(3)
    changed = [name for name, _ in other.named_parameters()][::3]
    with torch.no_grad():
        for name in changed:
            other.get_parameter(name).add_(0.1)
    group.load_weights((name, other.get_parameter(name)) for name in changed)
    found = run(group, plan, group.begin)
    assert torch.equal(found, toys.denoise(other, TIMES)) and not torch.equal(found, before)
    group.load_weights(tensors_of(net))
    assert torch.equal(run(group, plan, group.begin), before)
    assert group.pids == pids


def test_a_failing_update_closes_the_group():
    net = toys.random_net(4)

    def weights():
        yield next(tensors_of(net))
        raise OSError("the file has gone")

    with running(net, Plan(), family=toys.TOY) as group:
        with pytest.raises(OSError, match="the file has gone"):
            group.load_weights(weights())
        assert group.closed


def tell(path):
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")


def test_start_from_a_skeleton_with_weights_given(own_tmp):
    """Nothing of the module's own weights is needed; every rank is prepared first; the placement is known before any starts."""
    net, told, events = toys.random_net(5), own_tmp / "told", []
    with WorkerGroup(
        meta_copy(net),
        Plan(warmup=99),
        family=toys.TOY,
        weights=((name, tensor) for name, tensor in tensors_of(net)),
        ranks=RankOptions(threads_per_rank=1, prepare=partial(tell, told)),
        on_placed=lambda placement: events.append((placement.weight_bytes(0), placement.weight_bytes(1), told.exists())),
    ) as group:
        assert torch.equal(run(group, None, group.begin), toys.denoise(net, TIMES))
        assert sorted(map(int, told.read_text().split())) == sorted(group.pids)
        assert events == [(*(rank.weight_bytes for rank in group.stats().ranks), False)]


def test_a_missing_weight_is_named():
    net = toys.random_net(5)
    some = list(tensors_of(net))[:-1]
    with pytest.raises(WorkerError, match="no value was received"):
        WorkerGroup(meta_copy(net), Plan(), family=toys.TOY, weights=some)
