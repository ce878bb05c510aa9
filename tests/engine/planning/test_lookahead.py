"""Working ahead: what is expected of an input, and that a group which expects rightly computes as if nothing were stale."""

from dataclasses import replace

import pytest
import torch

import toys
from asyncdiff_nodes.engine import NoiseLevels, Plan, PlanError, ScheduleError, Simulator
from asyncdiff_nodes.engine.planning.lookahead import Outlook
from reuse import running
from toys import TOY, ToyBlock

TIMESTEPS = [900, 700, 500, 350, 250, 150, 80, 30]
ALPHAS = [0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.93, 0.99]
LEVELS = NoiseLevels.variance_preserving(ALPHAS)


def straight(shape=(2, 4, 8, 8)):
    """Inputs of a sampler whose model always says the same: sqrt(a) clean + sqrt(1 - a) noise."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, *shape, generator=generator)
    return [a**0.5 * clean + (1 - a) ** 0.5 * noise for a in ALPHAS]


def seen(levels, samples):
    outlook = Outlook(levels)
    for call, sample in enumerate(samples):
        outlook.see(call, sample)
    return outlook


@pytest.mark.parametrize("known", [2, 3, 5])
def test_a_straight_path_goes_on(known):
    xs = straight()
    outlook = seen(LEVELS, xs[:known])
    for call in range(known - 1, len(xs)):
        torch.testing.assert_close(outlook.expected(call), xs[call])


def test_without_levels_it_is_straight_in_the_number_of_the_call():
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(seen(NoiseLevels.unknown(9), [x, 1.5 * x]).expected(4), 3 * x)


def test_the_only_input_is_all_that_is_known():
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(seen(LEVELS, [x]).expected(3), x)


def test_this_call_s_input_is_no_guess_and_not_the_caller_s_tensor():
    xs = straight()
    outlook = seen(LEVELS, xs[:2])
    expected = xs[1].clone()
    xs[1].zero_()
    assert torch.equal(outlook.expected(1), expected)


def test_what_did_not_change_will_not():
    """An inpainting model's mask is a channel of its input that has no noise."""
    mask = torch.rand(2, 1, 8, 8)
    xs = [torch.cat([x, mask], dim=1) for x in straight()]
    expected = seen(LEVELS, xs[:3]).expected(4)
    assert torch.equal(expected[:, 4:], mask)
    torch.testing.assert_close(expected[:, :4], xs[4][:, :4])


def test_two_calls_at_the_same_noise_count_once():
    """Heun's method: the second is the better one."""
    xs, levels = straight(), NoiseLevels(LEVELS.sigmas[:2] + LEVELS.sigmas[1:], LEVELS.scales[:2] + LEVELS.scales[1:])
    outlook = seen(levels, [xs[0], xs[1] + 1, xs[1]])
    torch.testing.assert_close(outlook.expected(4), xs[3])


def test_fresh_noise_is_not_mistaken_for_a_direction():
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(2, 4, 8, 8, generator=generator)]
    for _ in range(5):
        xs.append(xs[-1] + torch.randn(2, 4, 8, 8, generator=generator))
    outlook = seen(NoiseLevels.unknown(9), xs)
    assert (outlook.expected(6) - xs[-1]).abs().mean() < 0.1
    assert not outlook.steady and seen(LEVELS, straight()[:3]).steady


def test_an_item_is_judged_by_itself():
    generator = torch.Generator().manual_seed(1)
    steady, noisy = straight((1, 4, 8, 8)), [torch.randn(1, 4, 8, 8, generator=generator) for _ in ALPHAS]
    both = seen(LEVELS, [torch.cat(pair) for pair in zip(steady, noisy, strict=True)][:5]).expected(6)
    torch.testing.assert_close(both[:1], seen(LEVELS, steady[:5]).expected(6))
    torch.testing.assert_close(both[1:], seen(LEVELS, noisy[:5]).expected(6))


def test_half_precision_stays_what_it_is():
    xs = [x.half() for x in straight()]
    expected = seen(LEVELS, xs[:4]).expected(5)
    assert expected.dtype == torch.float16
    torch.testing.assert_close(expected, xs[5], rtol=0, atol=0.02)


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("inf")), (1.0, float("nan"))])
def test_levels_that_make_no_sense_are_refused(scales):
    with pytest.raises(ValueError, match=r"2 sigmas and the scales .*: give one positive scale for each sigma"):
        NoiseLevels((2.0, 1.0), scales)


@pytest.mark.parametrize("first", ["blocks.0", "blocks.1"])
@pytest.mark.parametrize("segments", [2, 3])
def test_who_expects_rightly_computes_as_if_nothing_were_stale(segments, first):
    """The law of working ahead, and the reason for it."""
    net = toys.random_net(5)
    net.skips = {4: [0, 1], 6: [0], 7: [2]}
    cuts = (first, "blocks.3", "blocks.5")[:segments]
    plan, xs = Plan(segments=segments, cuts=cuts, warmup=2), straight()
    with running(net, plan, family=TOY) as group, torch.no_grad():
        assert group.placement.wrapped == (first != "blocks.0")
        group.begin(TIMESTEPS, levels=LEVELS)
        kwargs = toys.inputs(0)[1]
        for k, (x, t) in enumerate(zip(xs, TIMESTEPS, strict=True)):
            torch.testing.assert_close(group(x, t, **kwargs), net(x, t, **kwargs), rtol=0, atol=1e-5, msg=f"call {k}")


def test_where_nothing_can_be_foreseen_the_latest_values_are_reused():
    """The published method on this placement, as soon as three inputs show it."""
    net, times = toys.chain(ToyBlock, ToyBlock, ToyBlock), TIMESTEPS
    noisy = torch.randn(len(times), 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context, found = toys.inputs(0)[1], {}
    plan = Plan(segments=3, cuts=("blocks.0", "blocks.1", "blocks.2"), warmup=3)
    with running(net, plan, family=TOY) as group:
        for forecast in (0, 1):
            group.begin(times, replace(plan, forecast=forecast), levels=NoiseLevels.unknown(len(times)))
            found[forecast] = [group(x, t, **context) for x, t in zip(noisy, times, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))


@pytest.fixture(scope="module")
def group():
    with running(toys.chain(ToyBlock, ToyBlock), Plan(warmup=2), family=TOY) as group:
        yield group


def test_a_stream_may_begin_in_the_middle_of_the_schedule(group):
    group.begin(TIMESTEPS, levels=LEVELS)
    late = toys.denoise(group, TIMESTEPS[3:], stream="late")
    group.begin(TIMESTEPS[3:], levels=NoiseLevels(LEVELS.sigmas[3:], LEVELS.scales[3:]))
    assert torch.equal(late, toys.denoise(group, TIMESTEPS[3:]))


def test_a_stream_that_begins_elsewhere_is_refused(group):
    group.begin(TIMESTEPS)
    x, kwargs = toys.inputs(0)
    with pytest.raises(ScheduleError, match="stream None begins at timestep 600, which is none of those"):
        group(x, 600, **kwargs)


@pytest.mark.parametrize("calls", [7, 9])
def test_levels_of_another_number_of_calls_are_refused(group, calls):
    with pytest.raises(ScheduleError, match="levels must be given for the same calls as timesteps"):
        group.begin(TIMESTEPS, levels=NoiseLevels.unknown(calls))
    with pytest.raises(ScheduleError, match="levels must be given"):
        group.begin(levels=LEVELS)


def test_a_synchronous_run_need_not_follow_the_schedule(group):
    """Samplers that call the model twice per step are exact, too."""
    group.begin(TIMESTEPS[:2])
    assert len(toys.denoise(group, [900, 700, 700, 500])) == 4


def test_a_run_may_do_without(group):
    """The published method, on ranks that were started to work ahead."""
    plan = replace(group.plan, forecast=0)
    group.begin(TIMESTEPS, plan)
    found = toys.denoise(group, TIMESTEPS)
    with Simulator(toys.chain(ToyBlock, ToyBlock), replace(plan, cuts=group.placement.cuts), family=TOY) as simulator:
        assert torch.equal(found, toys.denoise(simulator, TIMESTEPS))


@pytest.mark.parametrize("plan", [plan for plan in toys.PLANS if not plan.forecast][:1], ids=toys.label)
def test_ranks_that_were_not_started_to_work_ahead_do_not(plan, toy_group):
    group, _ = toy_group(plan)
    with pytest.raises(PlanError, match="stride and forecast may be lower"):
        group.begin(TIMESTEPS, replace(plan, forecast=1))


def test_calls_may_be_left_out(group):
    """Nodes that cache do so. The value for a call that was not foreseen is on the line through those that are known."""
    net, xs, kwargs = toys.chain(ToyBlock, ToyBlock), straight(), toys.inputs(0)[1]
    group.begin(TIMESTEPS, levels=LEVELS)
    with torch.no_grad():
        for k in (0, 1, 2, 5, 6, 7):
            error = (group(xs[k], TIMESTEPS[k], **kwargs) - net(xs[k], TIMESTEPS[k], **kwargs)).abs().max()
            assert (error < 1e-5) == (k != 5), f"call {k}"


def test_calls_do_not_go_back(group):
    group.begin(TIMESTEPS, levels=LEVELS)
    x, kwargs = toys.inputs(0)
    group(x, TIMESTEPS[2], **kwargs)
    with pytest.raises(ScheduleError, match=r"call 2 has timestep 900, but begin\(\) announced 350"):
        group(x, TIMESTEPS[0], **kwargs)


@pytest.mark.parametrize(
    ("sigmas", "leap", "cooldown"),
    [
        ((3.0, 1.0, 0.5, 0.26), 1, 1),  # and then none
        ((3.0, 1.0, 0.3, 0.03), 2, 2),  # the last call only tidies up
        ((3.0, 0.16, 0.14, 0.04), 2, 2),
        ((0.22, 0.14, 0.09, 0.06, 0.04, 0.03), 0, 0),  # fades out
        ((3.0,), 1, 1),
        ((0.03,), 0, 0),
        ((3.0, 2.0, 2.0, 0.35, 0.35, 0.04, 0.04), 3, 3),  # Heun: the leap is made of two calls, and tidied up by a third
        ((3.0, 1.0, 1.0, 0.3, 0.3), 1, 1),
        ((1.0, 0.2, 0.09, 0.04, 0.04), 0, 0),
    ],
)
def test_the_cool_down_ends_with_the_leap_to_a_clean_picture(sigmas, leap, cooldown):
    levels = NoiseLevels(sigmas, (1.0,) * len(sigmas))
    assert levels.leap == leap
    assert Plan(cooldown=1).at(levels).cooldown == cooldown
    assert Plan(cooldown=2).at(levels).cooldown == (cooldown and cooldown + 1)
    assert Plan().at(levels) == Plan(), "who wants none gets none"
    assert NoiseLevels((3.0, 1.0), (1.0, 1.0), rest=0.3).leap == 0, "what follows makes up for it"
    assert Plan(cooldown=3).at(None).cooldown == 3


@pytest.mark.parametrize(("end", "synchronous"), [([0.93, 0.99], [7]), ([0.93, 0.999], [6, 7]), ([0.995, 0.998], [])])
def test_a_run_cools_down_by_its_levels(group, end, synchronous):
    plan, levels = Plan(warmup=2, cooldown=1), NoiseLevels.variance_preserving([*ALPHAS[:-2], *end])
    group.begin(TIMESTEPS, plan, levels=levels)
    found = toys.denoise(group, TIMESTEPS)
    why = {call.call: call.why for call in group.stats().calls if call.synchronous}
    assert why == {0: "warm-up", 1: "warm-up", **dict.fromkeys(synchronous, "cool-down")}
    with Simulator(toys.chain(ToyBlock, ToyBlock), plan, family=TOY) as simulator:
        simulator.begin(TIMESTEPS, levels)
        assert torch.equal(found, toys.denoise(simulator, TIMESTEPS))
