"""Ranks that free their weights and get them back, while their processes and links stay."""

import psutil
import pytest
import torch

import toys
from asyncdiff_nodes.engine import DeadlineError, Plan, WeightsUnloadedError
from asyncdiff_nodes.engine.tensors import tensors_of
from reuse import running
from toys import TOY

TIMES = [980, 860, 740, 620, 500]
PLANS = [Plan(), Plan(2, branches=2), Plan(2, stride=2)]


def denoise(group, steps=5):
    """The last result of so many calls of a run."""
    group.begin(TIMES)
    return toys.denoise(group, TIMES[:steps])


def noted(net, asked):
    """What to give to ``reload``; notes the names that it was asked for."""

    def give(names):
        asked.append(names)
        return ((name, tensor) for name, tensor in tensors_of(net) if name in names)

    return give


@pytest.mark.parametrize("plan", PLANS, ids=toys.label)
@pytest.mark.parametrize("steps", [5, 3], ids=["after a run", "in mid-run"])
def test_unloaded_weights_come_back_and_the_next_run_is_the_same(plan, steps):
    net, asked = toys.random_net(2), []
    with running(net, plan, family=TOY) as group:
        expected, pids = denoise(group), group.pids
        denoise(group, steps)
        for ranks in ([0], range(plan.world_size)):
            group.unload(ranks, 10)
            assert set(group.unloaded) == set(ranks) == {rank.rank for rank in group.stats().ranks if not rank.weights}
            with pytest.raises(WeightsUnloadedError, match=r"ranks \[0.*reload"):
                denoise(group, 1)
            group.reload(noted(net, asked))
            assert torch.equal(denoise(group), expected) and group.pids == pids and not group.unloaded
    first, all_names = asked
    assert first < all_names == {name for name, _ in tensors_of(net)}, "only what the unloaded ranks lack is sent"


def test_no_more_is_freed_than_must_be_and_only_that_is_sent_again():
    net, asked = toys.random_net(2), []
    with running(net, Plan(), family=TOY) as group:
        expected, held = denoise(group), group.stats().ranks[1].weights
        sizes = sorted(held.values(), reverse=True)
        for least in (sizes[0] - 1, sizes[1]):  # the second on top of the first
            group.unload([1], 10, least)
        assert group.unloaded == {1: sizes[0] + sizes[1]}
        left = group.stats().ranks[1].weights
        assert group.unloaded[1] == sum(held.values()) - sum(left.values())
        with pytest.raises(WeightsUnloadedError, match=r"ranks \[1.*reload"):
            denoise(group, 1)
        group.reload(noted(net, asked))
        assert torch.equal(denoise(group), expected) and group.stats().ranks[1].weights == held
    assert asked == [held.keys() - left.keys()]


def test_a_rank_that_does_not_answer_ends_the_group():
    with running(toys.random_net(2), Plan(), family=TOY) as group:
        denoise(group)
        psutil.Process(group.pids[1]).suspend()
        with pytest.raises(DeadlineError, match="free their weights"):
            group.unload([0, 1], 0.5)
        assert group.closed
