"""Calls that leave blocks out, as those without a ControlNet do, among calls that have them."""

from dataclasses import replace

import pytest
import torch

import toys
from asyncdiff_nodes.engine import Plan, Simulator, UnsupportedModelError
from toys import TOY, ToyBlock

TIMESTEPS = [980, 860, 740, 620, 500, 380, 260, 140]
PLANS = [
    Plan(segments=2, warmup=2, cuts=("blocks.0", "blocks.3")),
    Plan(segments=2, warmup=2, cuts=("blocks.0", "blocks.3"), forecast=0),
    Plan(segments=3, warmup=2, cuts=("blocks.1", "blocks.2", "blocks.4")),  # one of them has side blocks only
    Plan(segments=2, warmup=3, cuts=("blocks.0", "blocks.3"), stride=2),
    Plan(segments=2, warmup=2, cuts=("blocks.0", "blocks.3"), microbatches=2),
]


class SideNet(toys.ToyNet):
    """Blocks 2 and 3 make up a side path from the sample, whose result is added before blocks 4 and 5, if asked for."""

    def forward(self, sample, timestep, context=None, side=True, shortcut=False):
        emb, context = self.embed(sample, timestep), torch.zeros(1, device=sample.device)  # of each item by itself
        run = [lambda x, block=block: block(x, emb, context) for block in self.blocks]
        first = run[0](sample)
        hidden = first if shortcut else run[1](first)
        for index, aside in enumerate((run[2](sample), run[3](sample * 2)) if side else (), 4):
            hidden = run[index](hidden + aside)
        return hidden if side else run[5](run[4](hidden))


def side_net():
    torch.manual_seed(0)
    return SideNet([ToyBlock(4, 3) for _ in range(6)]).eval()


@pytest.fixture
def side_group(start):
    """plan -> a shared group of the network."""
    sample, given = toys.inputs(0)
    return lambda plan: start("side", replace(plan, microbatches=1), side_net(), family=TOY, example_inputs=((sample, 5), given))


def both(call):
    """Runs of a stream with the side path and of one without, in turns."""
    samples, outputs = {side: toys.inputs(int(side)) for side in (True, False)}, {True: [], False: []}
    for t in TIMESTEPS:
        for side, (x, kwargs) in samples.items():
            outputs[side].append(call(x, t, stream=side, side=side, **kwargs))
            samples[side] = 0.8 * x + 0.3 * outputs[side][-1], kwargs
    return [torch.stack(each) for each in outputs.values()]


@pytest.mark.parametrize("plan", PLANS, ids=toys.label)
def test_synchronous_calls_are_exact_and_asynchronous_ones_the_simulators(plan, side_group):
    net, group = side_net(), side_group(plan)
    with torch.no_grad():
        sequential = both(lambda *args, stream, **kwargs: net(*args, **kwargs))
    with Simulator(net, plan, family=TOY) as simulator:
        group.begin(TIMESTEPS, plan)
        simulator.begin(TIMESTEPS)
        for found, expected, exact in zip(both(group), both(simulator), sequential, strict=True):
            assert torch.allclose(found, expected, atol=1e-6)
            assert torch.allclose(found[: plan.warmup], exact[: plan.warmup], atol=1e-6)
            assert not torch.allclose(found[plan.warmup :], exact[plan.warmup :], atol=1e-4)
        assert group.stats().records


def test_a_net_that_stops_in_mid_run(side_group):
    """What goes on without it is another stream, which begins there."""
    net, group = side_net(), side_group(PLANS[0])
    x, kwargs = toys.inputs(0)
    with Simulator(net, PLANS[0], family=TOY) as simulator, torch.no_grad():
        group.begin(TIMESTEPS)
        for side, half in ((True, TIMESTEPS[:4]), (False, TIMESTEPS[4:])):
            simulator.begin(half)
            for t in half:
                found = group(x, t, stream=side, side=side, **kwargs)
                assert torch.allclose(found, simulator(x, t, side=side, **kwargs), atol=1e-6)
                x = 0.8 * x + 0.3 * found


def test_a_path_that_was_not_planned_is_refused_and_the_group_lives_on(side_group):
    net, group = side_net(), side_group(PLANS[0])
    x, kwargs = toys.inputs(0)
    group.begin()
    with pytest.raises(UnsupportedModelError, match="another path through the model"):
        group(x, 5, shortcut=True, **kwargs)
    with torch.no_grad():
        assert torch.equal(group(x, 5, stream="other", side=False, **kwargs), net(x, 5, side=False, **kwargs))
