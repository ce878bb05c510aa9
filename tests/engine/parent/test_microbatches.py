"""Micro-batches: parts of a synchronous call that follow each other through the segments."""

from dataclasses import replace

import pytest
import torch

import golden
import toys
from asyncdiff_nodes.engine import Plan, PlanError, Simulator, place, trace
from reuse import running
from toys import TOY

TIMESTEPS = [980, 860, 740, 620, 500, 380, 260, 140, 20]
PLANS = (
    Plan(segments=3, warmup=3, cooldown=1, microbatches=2),
    Plan(segments=2, stride=2, warmup=3, microbatches=3),
    Plan(segments=2, branches=2, warmup=2, microbatches=2),
    Plan(segments=3, warmup=2, forecast=0, cuts=("blocks.0", "blocks.2", "blocks.5"), microbatches=2),
)


def label(plan):
    return f"{toys.label(plan)}-B{plan.branches}-M{plan.microbatches}"


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("plan", PLANS, ids=label)
def test_group_computes_what_the_simulator_does(plan, batch, group_of):
    group, net = group_of(plan)
    group.begin(TIMESTEPS)
    routed = toys.denoise(group, TIMESTEPS, batch=batch)
    stats = group.stats()
    with Simulator(net, plan, family=TOY) as simulator:
        simulator.begin(TIMESTEPS)
        assert torch.equal(routed, toys.denoise(simulator, TIMESTEPS, batch=batch))
    assert stats.bytes_per_call == stats.planned_bytes
    told = [(record.call, record.rank) for record in stats.records if not record.ahead]
    assert len(told) == len(set(told)), "a call is one, in however many parts"


@pytest.mark.parametrize("plan", PLANS, ids=label)
def test_synchronous_calls_are_exact_for_each_part(plan, group_of):
    group, net = group_of(plan)
    group.begin(TIMESTEPS, replace(plan, warmup=len(TIMESTEPS)))
    x, kwargs = toys.inputs(5, batch=plan.branches * plan.microbatches)
    context = kwargs["context"]
    with torch.no_grad():
        for t in TIMESTEPS:
            expected = torch.cat([net(x[i : i + 1], t, context[i : i + 1]) for i in range(len(x))])
            assert torch.equal(group(x, t, context), expected)
            x = 0.9 * x


@pytest.mark.parametrize("plan", PLANS[:1], ids=label)
def test_a_run_may_have_other_micro_batches_than_the_group(plan, group_of):
    group, net = group_of(plan)
    group.begin(TIMESTEPS, replace(plan, microbatches=1, warmup=2))
    x, kwargs = toys.inputs(5)
    with torch.no_grad():
        assert torch.equal(group(x, 980, **kwargs), net(x, 980, **kwargs))


class Turned(toys.ToyBlock):
    """The first dimension of one of its outputs is not the batch."""

    def forward(self, *args):
        h = super().forward(*args)
        return h, h.mean((0, 1), keepdim=True)


WRAPPED = Plan(segments=2, warmup=2, forecast=0, cuts=("blocks.1", "blocks.3"), microbatches=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "plan"), [(Turned, PLANS[0]), (toys.ToyBlock, WRAPPED)], ids=["not divisible", "nothing to gain"]
)
def test_what_cannot_follow_in_parts_is_computed_whole(block, plan):
    net = toys.chain(toys.ToyBlock, block, *[toys.ToyBlock] * 3)
    with running(net, plan, family=TOY) as group, torch.no_grad():
        x, kwargs = toys.inputs(5)
        assert torch.equal(group(x, 980, **kwargs), net(x, 980, **kwargs))


@pytest.mark.slow
def test_unet_in_micro_batches(start):
    unet = golden.unet("sd15")
    plan = Plan(segments=3, warmup=2, cooldown=1, microbatches=2)
    group = start("sd15", plan, unet)
    embeds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))

    def denoise(call):
        x, found = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), []
        for t in TIMESTEPS[:5]:
            found.append(call(torch.cat([x, x]), t, encoder_hidden_states=embeds, return_dict=False)[0])
            x = x - 0.1 * found[-1].mean(0, keepdim=True)
        return torch.stack(found)

    group.begin(TIMESTEPS[:5])
    routed = denoise(group)
    with Simulator(unet, plan) as simulator:
        simulator.begin(TIMESTEPS[:5])
        assert torch.equal(routed, denoise(simulator))


def test_cost_of_a_warm_up_that_is_parallel_too():
    net = toys.chain(*[toys.ToyBlock] * 8)
    graph = trace(net.to("meta"), TOY, *TOY.example_inputs(net, None, 2))
    plan = Plan(segments=4, warmup=4, fresh_skips=False)
    placement = place(graph, plan)
    assert placement.shares == (0.25,) * 4
    assert placement.cost(4, plan=replace(plan, microbatches=2)) == pytest.approx(4 * 5 / 8)
    wrapped = place(graph, replace(plan, forecast=0, cuts=("blocks.1", "blocks.3", "blocks.5", "blocks.7")))
    assert wrapped.cost(4, plan=replace(plan, microbatches=2)) == 4


@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_impossible_number_is_refused(value):
    with pytest.raises(PlanError, match="microbatches"):
        Plan(microbatches=value)
