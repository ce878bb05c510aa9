"""The model of time: against closed forms worked out by hand, and against real groups whose blocks sleep."""

import itertools
import statistics
import time
from dataclasses import replace

import pytest

import toys
from asyncdiff_nodes.engine import Block, BlockGraph, Kind, Plan, PlanError, place
from asyncdiff_nodes.engine.planning.clock import simulate, step_seconds
from asyncdiff_nodes.engine.planning.run_times import Costs, Link
from asyncdiff_nodes.engine.tensors import TensorMeta
from reuse import running

KB = TensorMeta((250,), (1,), toys.torch.float32)  # 1000 bytes


def graph_of(blocks, skips=()):
    """A chain of ``blocks`` blocks, the output of each 1000 bytes, and ``skips`` (producer, consumer)."""
    edges = {*itertools.pairwise(range(blocks)), *skips}
    return BlockGraph(tuple(Block(f"b.{i}", (KB,), None, 1, 0) for i in range(blocks)), frozenset(edges), 0, 0)


def placed(cuts, blocks=4, skips=(), **knobs):
    plan = Plan(segments=len(cuts), cuts=tuple(f"b.{cut}" for cut in cuts), **knobs)
    return place(graph_of(blocks, skips), plan)


def results(placement, calls, costs, plan=None, **options):
    return [call.result for call in simulate(placement, plan or placement.plan, calls, costs, **options).calls]


@pytest.mark.parametrize("forecast", [0, 1])
@pytest.mark.parametrize("cuts", [(0, 2), (1, 3), (0, 1, 2), (1, 2, 3)])
def test_synchronous_calls_take_the_sum(cuts, forecast):
    placement = placed(cuts, warmup=9, forecast=forecast, skips={(0, 3)})
    assert results(placement, 3, Costs((1, 2, 4, 8))) == [15, 30, 45]


def test_asynchronous_calls_take_the_slowest_segment():
    placement = placed((0, 1, 3), warmup=1, forecast=0)
    assert results(placement, 5, Costs((2, 3, 4, 6))) == [15, 21, 28, 35, 42]  # rank 2 once does not wait for rank 1: 6, then 7
    assert step_seconds(placement, Costs((2, 3, 4, 6))) == 7
    assert step_seconds(placement, Costs((9, 3, 4, 6))) == 9
    assert step_seconds(placement, Costs((2, 3, 4, 9))) == 9


def test_a_wrapped_segment_sends_round_the_circle():
    """Rank 1 owns blocks 3 and 0: in synchronous calls it begins and ends the call."""
    placement = placed((1, 3), warmup=2, forecast=0)
    timeline = simulate(placement, placement.plan, 4, Costs((1, 2, 4, 8)))
    assert [call.result for call in timeline.calls] == [15, 30, 39, 48]
    first, second = timeline.ranks
    assert (first.busy, second.busy) == (4 * 6, 4 * 9)
    assert (first.waiting, second.waiting) == (1 + 1, 6 + 6)


def test_working_ahead_begins_with_the_warm_ups_end():
    """Rank 0 works ahead from 3 on, for call 1; rank 1 waits for that in call 1, since nothing newer is on its way."""
    placement = placed((0, 2), warmup=1)
    timeline = simulate(placement, placement.plan, 4, Costs((1, 2, 4, 4)))
    assert [call.kind for call in timeline.calls] == [Kind.SYNCHRONOUS] + [Kind.ASYNCHRONOUS] * 3
    assert [call.result for call in timeline.calls] == [11, 19, 27, 35]
    # with three segments, ranks 0 and 1 fill the pipeline behind the call: rank 0 is done at 6, rank 1 at 1 + 2 + 4 + 4
    assert results(placed((0, 1, 2), blocks=3, warmup=1), 3, Costs((1, 2, 4))) == [7, 11, 15]
    assert results(placed((0, 1, 2), blocks=3, warmup=1), 3, Costs((4, 2, 1))) == [7, 11, 15]


def test_again_computed_blocks_take_their_time_on_every_rank():
    placement = placed((1, 2), blocks=3, skips={(0, 2)}, warmup=1)
    assert placement.owned(1) == (0, 2)
    assert step_seconds(placement, Costs((3, 1, 2))) == 5
    assert results(placement, 2, Costs((3, 1, 2)))[0] == 3 + 1 + 2, "rank 1 computes block 0 while it would wait"


def test_transfers_hold_up_synchronous_calls_and_hide_behind_asynchronous_ones_if_there_is_room():
    placement = placed((0, 2), warmup=2, forecast=0)
    link = Link(latency=0.25, bandwidth=2000)  # 1000 bytes pass in 0.5 s and are there 0.25 s later
    # segments of equal length: rank 1 wants at once what rank 0 made last, so that half of each transfer shows
    assert results(placement, 6, Costs((1, 1, 1, 1), link=link)) == [4.75, 9.5, 11.5, 14.25, 16.25, 19]
    assert step_seconds(placement, Costs((1, 1, 1, 1), link=link)) == 2.375
    assert step_seconds(placement, Costs((0.5, 0.75, 1, 1), link=link)) == 2, "rank 0 is done early enough"
    # direct links: from the end of both, so that all of each transfer shows
    direct = replace(link, direct=True)
    assert results(placement, 6, Costs((1, 1, 1, 1), link=direct)) == [4.75, 9.5, 11.5, 14.25, 17, 19.75]
    assert step_seconds(placement, Costs((0.5, 0.75, 1, 1), link=direct)) == 2.75
    # 1000 bytes in 6 s: no more than one value every 6 s
    slow = Costs((1, 1, 1, 1), link=Link(bandwidth=1000 / 6))
    assert results(placement, 2, slow) == [10, 20]
    assert step_seconds(placement, slow) == pytest.approx(6)


def test_a_link_carries_one_value_after_the_other():
    placement = placed((0, 2), skips={(0, 2)}, warmup=1, forecast=0)
    slow = Costs((1, 1, 1, 1), link=Link(bandwidth=250))
    assert results(placement, 1, slow) == [1 + 4 + 4 + 2]
    assert step_seconds(placement, slow) == 8


def test_a_segment_that_has_something_else_to_do_first_does_not_wait_for_a_transfer():
    """Rank 1 computes block 0 again, by which time the value of block 1 is there."""
    placement = placed((1, 2), blocks=3, skips={(0, 2)}, warmup=1)
    assert step_seconds(placement, Costs((1, 1, 1), link=Link(latency=1))) == 2
    assert step_seconds(placement, Costs((1, 1, 1), link=Link(latency=2))) == 2.5


def test_unequal_ranks():
    placement = placed((0, 2), warmup=1, forecast=0)
    costs = Costs((1, 1, 1, 1), glue=0.5)
    assert results(placement, 1, costs, speeds=[1, 0.5]) == [2.5 + 4]  # the other's glue was done while it waited
    assert step_seconds(placement, costs, speeds=[1, 0.5]) == 5
    assert step_seconds(placement, costs, speeds=[0.25, 1]) == 10
    assert costs.unrouted == 4.5


def test_stride_2():
    """Ranks 0 and 1 are the segments, rank 2 serves the first step of each pair."""
    placement = placed((0, 2), warmup=1, stride=2, forecast=0)
    timeline = simulate(placement, placement.plan, 8, Costs((1, 1, 1.5, 1.5)))
    assert [call.kind.value for call in timeline.calls[:4]] == ["synchronous", "asynchronous", "prefetched", "asynchronous"]
    assert [call.result for call in timeline.calls] == [5, 8, 8, 11, 11, 14, 14, 17]
    assert step_seconds(placement, Costs((1, 1, 1.5, 1.5))) == 1.5
    assert timeline.ranks[2].busy == 4 * 3
    # the replica is fast: its step comes early, and the caller waits for the pair's other one
    assert results(placement, 3, Costs((1, 1, 1.5, 1.5)), speeds=[1, 1, 3]) == [5, 6, 8]


def test_an_even_warm_up_repeats_a_result_at_once():
    placement = placed((0, 2), warmup=2, stride=2, forecast=0)
    assert results(placement, 4, Costs((1, 1, 1, 1))) == [4, 8, 8, 10]


def test_the_cool_down_is_synchronous_and_waits_for_ranks_that_are_late():
    placement = placed((0, 2), warmup=1, cooldown=2, forecast=0)
    assert results(placement, 5, Costs((1, 1, 1, 1))) == [4, 6, 8, 12, 16]
    # rank 0 takes 4 a call: it is done with the last asynchronous one at 2 + 4 * 3 = 14
    assert results(placement, 5, Costs((2, 2, 1, 1))) == [6, 8, 12, 20, 26]


def test_the_callers_own_time_hides_behind_ranks_that_it_does_not_wait_for():
    placement = placed((0, 2), warmup=1, forecast=0)
    outside = {"round_trip": 0.25, "caller": 0.5}
    balanced, last_is_fast = Costs((1, 1, 1, 1), **outside), Costs((1, 1, 0.5, 0.5), **outside)
    assert results(placement, 3, balanced) == [4.25, 4.25 + 2.75, 4.25 + 2 * 2.75], "a call of the last segment, and the caller"
    assert step_seconds(placement, balanced) == 2.75
    assert step_seconds(placement, last_is_fast) == 2, "the caller comes back while the first segment still computes"
    pairs = placed((0, 2), warmup=1, stride=2, forecast=0)
    assert step_seconds(pairs, balanced) == (2 + 0.25 + 2 * 0.5) / 2, "one round trip for two steps"


@pytest.mark.parametrize("segments", [2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("forecast", [0, 1])
def test_agrees_with_the_plans_cost(segments, stride, forecast):
    """A formula for free links, in which every step costs as much as those of a run without end: up to one too many."""
    for seed, cooldown in itertools.product(range(3), (0, 2)):
        rng = toys.random.Random(seed)
        graph, seconds = graph_of(9, {(0, 8), (2, 6)}), [rng.uniform(0.5, 2) for _ in range(9)]
        placement = place(graph, Plan(segments, stride, 1 + stride, forecast=forecast, cooldown=cooldown), costs=seconds)
        total, slowest = simulate(placement, placement.plan, 20, Costs(seconds)).seconds / sum(seconds), max(placement.shares)
        assert -1e-9 < placement.cost(20) - total < slowest
        assert step_seconds(placement, Costs(seconds)) == pytest.approx(sum(seconds) * slowest / stride, rel=0.01)


@pytest.mark.parametrize("cuts", [None, ("b.1", "b.4", "b.6")])
@pytest.mark.parametrize("forecast", [0, 1])
def test_agrees_with_the_plans_cost_on_unequal_devices(forecast, cuts):
    for seed in range(5):
        rng = toys.random.Random(seed)
        graph, seconds = graph_of(9, {(0, 8), (2, 6)}), [rng.uniform(0.5, 2) for _ in range(9)]
        speeds = [rng.uniform(0.5, 2) for _ in range(3)]
        placement = place(graph, Plan(3, warmup=2, forecast=forecast, cuts=cuts), speeds, seconds)
        total = simulate(placement, placement.plan, 20, Costs(seconds), speeds).seconds
        alone = sum(seconds) / max(speeds)  # on the fastest of them
        slowest = step_seconds(placement, Costs(seconds), speeds)
        assert -1e-9 < placement.cost(20) * alone - total < slowest


def test_micro_batches_follow_each_other():
    placement = placed((0, 2), warmup=2, cooldown=1, microbatches=2, forecast=0)
    assert results(placement, 4, Costs((1, 1, 1, 1))) == [3, 6, 8, 11]
    assert results(placement, 1, Costs((2, 2, 1, 1))) == [2 + 2 + 1]
    # a value of 1000 bytes takes a second, half of it half of one: 2 + 0.5 + 1, if rank 1 has the second half in time
    assert results(placement, 1, Costs((1, 1, 1, 1), link=Link(bandwidth=1000))) == [1 + 0.5 + 1 + 1]
    assert results(placement, 1, Costs((1, 1, 1, 1), link=Link(bandwidth=250))) == [1 + 2 + 2 + 1]
    wrapped = placed((1, 3), warmup=2, microbatches=2, forecast=0)
    assert results(wrapped, 2, Costs((1, 1, 1, 1))) == [4, 8]


@pytest.mark.parametrize("microbatches", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_micro_batches_agree_with_the_plans_cost(stride, microbatches):
    for seed in range(3):
        rng = toys.random.Random(seed)
        graph, seconds = graph_of(9, {(0, 8), (2, 6)}), [rng.uniform(0.5, 2) for _ in range(9)]
        placement = place(graph, Plan(3, stride, microbatches=microbatches), costs=seconds)
        plan = replace(placement.plan, warmup=5)
        total = simulate(placement, plan, 5, Costs(seconds)).seconds / sum(seconds)
        assert placement.cost(5, plan=plan) == pytest.approx(total, rel=0.1)


def test_a_run_may_have_another_plan_than_the_group():
    placement = placed((0, 2), warmup=1, stride=2)
    run = replace(placement.plan, warmup=3, stride=1, forecast=0)
    timeline = simulate(placement, run, 5, Costs((1, 1, 1, 1)))
    assert [call.result for call in timeline.calls] == [4, 8, 12, 14, 16]
    assert timeline.ranks[2].busy == 0


def test_cuts_that_know_the_callers_time_hide_it():
    graph, plan = graph_of(20), Plan(forecast=0)
    costs = Costs((0.5,) * 20, round_trip=0.5, caller=1.5)
    blind, knowing = (place(graph, plan, costs=costs.blocks, pause=pause) for pause in (0, 2))
    assert step_seconds(blind, costs) == 7
    assert step_seconds(knowing, costs) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Costs((1, -1)), "blocks: give 2 numbers from 0 on"),
        (lambda: Costs((1,), glue=float("nan")), "glue"),
        (lambda: Link(latency=-1), "latency"),
        (lambda: Link(bandwidth=0), "bandwidth=0"),
        (lambda: results(placed((0, 2)), 3, Costs((1, 1))), "blocks: give 4"),
        (lambda: results(placed((0, 2)), 3, Costs((1,) * 4), speeds=[1]), "speeds: give 2 positive numbers"),
        (lambda: results(placed((0, 2)), 0, Costs((1,) * 4)), "calls=0"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(PlanError, match=message):
        change()


CALLS = 13
# seconds of a unit of sleep, beside which what ranks do on shared cores is small; units per block; cuts; forecast
SLEEPERS = {
    "N=2, first slowest": (1 / 60, (7, 3, 3, 4), (0, 2), 1),
    "N=3, wrapped, last slowest": (1 / 20, (3, 3, 5, 4, 3, 6), (1, 3, 5), 0),
    "N=4, second slowest": (1 / 20, (3, 5, 6, 3, 3, 2, 4), (0, 2, 4, 6), 1),
}


def timed(group, plan, calls):
    """When each result was there, in seconds from the beginning of a run, and the run's records."""
    sample, kwargs = toys.inputs(0)
    group.begin(range(calls, 0, -1), plan)
    begin, ends = time.perf_counter(), []
    for k in range(calls):
        group((calls - k) * sample, calls - k, **kwargs)  # a straight line: nobody works ahead on inputs that go nowhere
        ends.append(time.perf_counter() - begin)
    return ends, group.stats().records


@pytest.fixture(
    scope="module", params=[name if "N=2" in name else pytest.param(name, marks=pytest.mark.slow) for name in SLEEPERS]
)
def sleepers(request):
    """A group of ranks that sleep, two of them for the last segment; what its calls cost, as measured in synchronous ones."""
    unit, sleeps, cuts, forecast = SLEEPERS[request.param]
    net, seconds = toys.chain(*[toys.Slow] * len(sleeps)), [sleep * unit for sleep in sleeps]
    for block, sleep in zip(net.blocks, seconds, strict=True):
        block.seconds = sleep
    plan = Plan(len(cuts), stride=2, warmup=3, cuts=tuple(f"blocks.{cut}" for cut in cuts), forecast=forecast)
    with running(net, plan, family=toys.TOY) as group:
        timed(group, plan, 4)  # the first calls pay for the trace and for memory
        records = timed(group, replace(plan, warmup=6), 6)[1]
        segments = [[seconds[i] for i in group.placement.owned(d)] for d in range(plan.segments)]
        working = [record for record in records if record.rank < plan.segments]
        more = statistics.median((r.compute - sum(segments[r.segment])) / len(segments[r.segment]) for r in working)
        begins = [min(r.start for r in working if r.call == call) for call in range(6)]
        ends = [max(r.end for r in working if r.call == call) for call in range(6)]
        round_trip = statistics.median(begin - end for begin, end in zip(begins[1:], ends, strict=False))
        yield group, Costs([sleep + more for sleep in seconds], round_trip=round_trip)


@pytest.mark.timing
@pytest.mark.parametrize(("stride", "microbatches"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_real_ranks_that_sleep_take_as_long_as_the_clock_says(sleepers, stride, microbatches):
    """A rank that sleeps is a device of its own, on any number of cores."""
    group, costs = sleepers
    plan = replace(group.plan, stride=stride, microbatches=microbatches)
    ends = [
        min(times) for times in zip(*(timed(group, plan, CALLS)[0] for _ in range(3)), strict=True)
    ]  # others only ever disturb
    expected = simulate(group.placement, plan, CALLS, costs)
    assert ends[-1] == pytest.approx(expected.seconds, rel=0.05)
    assert (ends[-1] - ends[4]) / (CALLS - 5) == pytest.approx(expected.pace(4, CALLS - 1), rel=0.05)


def bands(plan, calls, seconds, wait=0.0):
    blocks = tuple(Block(f"b{i}", (), None, macs=1, weight_bytes=0) for i in range(4))
    chain = BlockGraph(blocks, frozenset({(0, 1), (1, 2), (2, 3)}), 0, 0)
    return simulate(place(chain, plan), plan, calls, Costs((1.0,) * 4, bands=seconds, caller=wait))


def test_calls_in_bands_take_their_time_and_no_more():
    line = bands(Plan(segments=1, bands=4), 3, seconds=1.25, wait=0.5)
    assert [call.result for call in line.calls] == [1.25, 3.0, 4.75]
    assert all(rank.busy == 3 * 1.25 for rank in line.ranks)


def test_synchronous_calls_of_segments_are_in_bands():
    plan = Plan(segments=2, warmup=2, cooldown=1, bands=2, cuts=("b0", "b2"))
    line = bands(plan, 6, seconds=2.5)
    alone = bands(replace(plan, bands=1), 6, seconds=2.5)
    kinds = [call.kind for call in line.calls]
    assert kinds == [Kind.SYNCHRONOUS] * 2 + [Kind.ASYNCHRONOUS] * 3 + [Kind.SYNCHRONOUS]
    assert [call.result for call in line.calls][:2] == [2.5, 5.0] and [call.result for call in alone.calls][:2] == [4.0, 8.0]
    assert line.calls[-1].result - line.calls[-2].result == 2.5
    assert line.seconds < alone.seconds
