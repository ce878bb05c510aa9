"""Where NaN come from is told by name."""

import pytest
import torch

import toys
from asyncdiff_nodes.engine import Plan
from asyncdiff_nodes.engine.rank.finite import is_finite

TIMES = [900, 700, 500, 300]
INFINITE = float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_what_is_finite(dtype):
    largest = torch.finfo(dtype).max
    fine = [torch.full((1000,), largest, dtype=dtype), torch.zeros(0, dtype=dtype), torch.tensor([1, 2]), 3.0]
    assert is_finite(fine)
    for wrong in ([INFINITE, 0.0], [INFINITE, -INFINITE], [float("nan"), 1.0], [largest, -INFINITE]):
        assert not is_finite([*fine, torch.tensor(wrong, dtype=dtype)])


@pytest.fixture
def poisoned(group_of):
    """plan, block -> a group whose block has a weight that is NaN; healed afterwards."""
    changed = []

    def get(plan, block):
        group, net = group_of(plan)
        name = f"{block}.time.bias"
        value = net.get_parameter(name).detach()
        changed.append((group, name, value))
        group.load_weights([(name, torch.full_like(value, float("nan")))])
        return group

    yield get
    for group, name, value in changed:
        group.load_weights([(name, value)])


@pytest.mark.parametrize("plan", [Plan(2, warmup=1), Plan(3, warmup=2), Plan(1, branches=2), Plan(2, stride=2)], ids=toys.label)
@pytest.mark.parametrize("index", [0, 3, -1])
def test_the_block_that_makes_nan_is_named(poisoned, plan, index):
    group = poisoned(plan, toys.block_names(toys.random_net(3))[index])
    block = group.placement.graph.names[index]
    x, kwargs = toys.inputs(0)
    group.begin(TIMES, plan)
    assert group.finite
    group(x, TIMES[0], **kwargs)
    assert not group.finite
    assert group.origin_of_nan(x, TIMES[1], **kwargs) == block


def test_nothing_is_named_without_cause_and_the_next_run_is_unchanged(group_of):
    plan = Plan(2, warmup=1)
    group, _ = group_of(plan)
    group.begin(TIMES, plan)
    expected = toys.denoise(group, TIMES)
    x, kwargs = toys.inputs(0)
    assert group.origin_of_nan(x, 10, **kwargs) is None
    assert group.origin_of_nan(x * torch.nan, 10, **kwargs) is None  # it came with the latent
    group.begin(TIMES, plan)
    assert torch.equal(toys.denoise(group, TIMES), expected) and group.finite
