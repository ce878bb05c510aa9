"""Asynchronous means precisely stale by one call: real processes compute what a single-process simulation does."""

from dataclasses import replace

import psutil
import pytest
import torch

import toys
from asyncdiff_nodes.engine import NoiseLevels, Plan, Simulator
from asyncdiff_nodes.engine.planning.lookahead import Outlook
from reuse import running
from toys import TOY, ToyBlock

TIMESTEPS = [980, 860, 740, 620, 500, 380, 260, 140, 20]


@pytest.mark.parametrize("steps", [8, 9])
@pytest.mark.parametrize("plan", toys.PLANS, ids=toys.label)
def test_group_computes_what_the_simulator_does(plan, steps, toy_group):
    group, net = toy_group(plan)
    group.begin(TIMESTEPS[:steps])
    routed = toys.denoise(group, TIMESTEPS[:steps])
    with Simulator(net, plan, family=TOY) as simulator:
        simulator.begin(TIMESTEPS[:steps])
        expected = toys.denoise(simulator, TIMESTEPS[:steps])
    with torch.no_grad():
        sequential = toys.denoise(net, TIMESTEPS[:steps])
    assert torch.equal(routed, expected)
    assert (routed[plan.warmup :] - sequential[plan.warmup :]).abs().max() > 1e-4, "or this test proves nothing"


@pytest.mark.parametrize("plan", [plan for plan in toys.PLANS if plan.forecast], ids=toys.label)
def test_inputs_that_follow_their_direction_only_at_times(plan, toy_group):
    """Whether there is work ahead turns from call to call, as with guidance that changes the picture by leaps."""
    group, net = toy_group(plan)
    levels, (x, context) = NoiseLevels.unknown(len(TIMESTEPS)), toys.inputs(0)
    leaps = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1))
    outlook, samples, steady = Outlook(levels), [], []
    for call, leap in enumerate((1, 1, -1, 1, -1, -1, 2, 2, 1)):
        x = x + (leaps[0] * leap if abs(leap) == 1 else leaps[1])
        outlook.see(call, x)
        samples.append(x)
        steady.append(outlook.steady)
    assert steady[2:6] == [False, False, False, True]
    with Simulator(net, plan, family=TOY) as simulator:
        for model in (group, simulator):
            model.begin(TIMESTEPS, levels=levels)
        for sample, t in zip(samples, TIMESTEPS, strict=True):
            assert torch.equal(group(sample, t, **context), simulator(sample, t, **context))


@pytest.mark.parametrize("plan", toys.PLANS, ids=toys.label)
def test_second_run_equals_the_first_and_runs_may_be_abandoned(plan, toy_group):
    group, _ = toy_group(plan)
    group.begin(TIMESTEPS)
    first = toys.denoise(group, TIMESTEPS)
    group.begin(TIMESTEPS)
    abandoned = plan.warmup + 2
    assert torch.equal(toys.denoise(group, TIMESTEPS[:abandoned]), first[:abandoned])
    group.begin(TIMESTEPS)
    assert torch.equal(toys.denoise(group, TIMESTEPS), first)


@pytest.mark.parametrize("plan", toys.PLANS, ids=toys.label)
def test_interleaved_streams_do_not_touch_each_other(plan, toy_group):
    group, _ = toy_group(plan)
    group.begin(TIMESTEPS)
    alone = [toys.denoise(group, TIMESTEPS, seed=batch, batch=batch, stream=batch) for batch in (1, 3)]
    group.begin(TIMESTEPS)
    samples = {batch: toys.inputs(batch, batch) for batch in (1, 3)}
    outputs = {1: [], 3: []}
    for k, t in enumerate(TIMESTEPS):
        for batch in (1, 3) if k % 2 else (3, 1):
            x, kwargs = samples[batch]
            outputs[batch].append(group(x, t, stream=batch, **kwargs))
            samples[batch] = 0.8 * x + 0.3 * outputs[batch][-1], kwargs
    for batch, expected in zip((1, 3), alone, strict=True):
        assert torch.equal(torch.stack(outputs[batch]), expected)


@pytest.mark.parametrize("plan", [plan for plan in toys.PLANS if plan.cooldown], ids=toys.label)
def test_the_cool_down_is_exact(plan, toy_group):
    """What the last calls return for their inputs, however these came about, is the model's own result, bit for bit."""
    group, net = toy_group(plan)
    group.begin(TIMESTEPS)
    seen = []

    def call(x, t, **kwargs):
        with torch.no_grad():
            seen.append(torch.equal(group(x, t, **kwargs), exact := net(x, t, **kwargs)))
        return exact

    toys.denoise(call, TIMESTEPS)
    first, last = plan.warmup, len(TIMESTEPS) - plan.cooldown
    assert all(seen[:first]) and all(seen[last:]) and not any(seen[first:last])


def pieces(net, xs, ts, context):
    """Value of the first block at every call, and the second block with the glue after it."""
    with torch.no_grad():
        embs = [net.embed(x, t) for x, t in zip(xs, ts, strict=True)]
        values = [net.blocks[0](x, emb, context) for x, emb in zip(xs, embs, strict=True)]
    return values, lambda k, value: net.blocks[1](value, embs[k], context) * net.scale


@pytest.mark.parametrize("order", [0, 1])
def test_two_blocks_by_hand_without_a_schedule(order, start):
    """No simulator, no schedule: v1 or v1 + (v1 - v2), written out."""
    net = toys.chain(ToyBlock, ToyBlock)
    (x, kwargs), ts = toys.inputs(1), [700, 500, 300, 100, 1]
    xs = [x * (1 + k / 3) for k in range(len(ts))]
    values, rest = pieces(net, xs, ts, kwargs["context"])
    guesses = [values[0], values[0]]  # one value is all there is at the first asynchronous call
    for k in (2, 3, 4):
        guesses.append(values[k - 1] + (values[k - 1] - values[k - 2]) if order else values[k - 1])
    plan = Plan(cuts=("blocks.0", "blocks.1"))
    group = start("by hand", plan, net, family=TOY)
    group.begin(plan=replace(plan, forecast=order))
    with torch.no_grad():
        for k, guess in enumerate(guesses):
            assert torch.equal(group(xs[k], ts[k], **kwargs), rest(k, guess)), f"call {k}"


@pytest.mark.parametrize("order", [0, 1])
def test_two_blocks_by_hand_at_stride_2(order, start):
    """Reuse: both results of a batch with the value of the batch before. Ahead: with the value for the first of the two."""
    net = toys.chain(ToyBlock, ToyBlock)
    (x, kwargs), ts = toys.inputs(1), [700, 500, 300, 100, 1]
    xs = [x * (1 + k / 3) for k in range(len(ts))]
    values, rest = pieces(net, xs, ts, kwargs["context"])
    _, at_1 = pieces(net, [xs[0], xs[1], xs[1], xs[3], xs[3]], ts, kwargs["context"])
    (_, v2), _ = pieces(net, xs[:2], [ts[0], ts[2]], kwargs["context"])  # the first batch computes on x[1], at t[2]
    if order:  # the inputs lie on a straight line: two of them known, those expected are those that come
        (_, v1), _ = pieces(net, [xs[0]] * 2, ts[:2], kwargs["context"])
        outputs = [rest(k, value) for k, value in enumerate((values[0], v1, v1, values[3], values[3]))]
    else:
        outputs = [at_1(k, value) for k, value in enumerate((values[0], values[0], values[0], v2, v2))]
    plan = Plan(stride=2, cuts=("blocks.0", "blocks.1"))
    group = start("by hand", plan, net, family=TOY)
    group.begin(ts, replace(plan, forecast=order))
    with torch.no_grad():
        for k, output in enumerate(outputs):
            torch.testing.assert_close(group(xs[k], ts[k], **kwargs), output, rtol=0, atol=1e-5, msg=f"call {k}")


def test_group_without_begin_is_a_run_of_its_own():
    """Nothing has to be announced at stride 1; streams may come and go."""
    net = toys.chain(ToyBlock, ToyBlock, ToyBlock)
    with running(net, Plan(warmup=1), family=TOY) as group:
        first = toys.denoise(group, TIMESTEPS)
        second = toys.denoise(group, TIMESTEPS, stream=("a", 1))
        assert torch.equal(first, second)
        group.begin()
        assert torch.equal(first, toys.denoise(group, TIMESTEPS))
        group.begin(TIMESTEPS)
        ahead = toys.denoise(group, TIMESTEPS)
        group.begin(torch.tensor(TIMESTEPS))
        assert torch.equal(ahead, toys.denoise(group, TIMESTEPS)) and not torch.equal(ahead, first)


def test_a_forgotten_stream_takes_its_values_along():
    """Others go on as ever. Each has values of 1 MiB on the other rank."""
    net = toys.chain(ToyBlock, ToyBlock, ToyBlock)
    plan = Plan(warmup=1, cuts=("blocks.0", "blocks.1"), forecast=0)
    large = torch.randn(2, 4, 181, 181)
    with running(net, plan, family=TOY) as group, Simulator(net, plan, family=TOY) as simulator, torch.no_grad():
        group.begin()
        simulator.begin()
        x, kwargs = toys.inputs(0)
        grown = []
        for k in range(120):
            torch.testing.assert_close(group(x + k, k, **kwargs), simulator(x + k, k, **kwargs), rtol=0, atol=1e-5)
            for call in range(2):
                group(large, call, stream=k, **kwargs)
            group.forget(k)
            grown.append(psutil.Process(group.pids[1]).memory_info().rss)
    assert grown[-1] - grown[20] < 30 * 2**20, "100 streams, each of which has 2 MiB of values"
