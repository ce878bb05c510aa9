"""Block times as the ranks measure them, and the cuts that follow."""

import json
from dataclasses import replace

import pytest
import torch

import toys
from asyncdiff_nodes.engine import BlockTimes, CallRecord, Placement, Plan, better, pause, place, slowest
from asyncdiff_nodes.engine.planning.clock import step_seconds
from asyncdiff_nodes.engine.planning.graph import Block, BlockGraph
from asyncdiff_nodes.engine.planning.run_times import Costs, Link
from asyncdiff_nodes.engine.tensors import TensorMeta
from reuse import running
from toys import TOY

TIMES = list(range(950, 0, -50))
EVEN = Plan(forecast=0)


@pytest.fixture(scope="module")
def uneven():
    """A group whose block i takes i hundredths of a second, and its records of a run with a warm-up of 6."""
    net = toys.chain(*[toys.Slow] * 5)
    for index, block in enumerate(net.blocks):
        block.seconds = index / 100
    with running(net, Plan(warmup=6, cuts=("blocks.0", "blocks.3")), family=TOY) as group:
        group.begin(TIMES)
        toys.denoise(group, TIMES)
        yield group, group.stats().records


def test_few_calls_are_timed_and_never_the_first(uneven):
    group, records = uneven
    timed = {r.call for r in records if r.blocks}
    assert timed == {1, 2, 3, 6, 7, 8, 9}
    for record in records:
        owned = {group.placement.graph.names[i] for i in group.placement.owned(record.segment)}
        assert set(record.blocks) == (owned if record.call in timed and not record.ahead else set())


def test_a_block_s_time_is_its_own(uneven):
    """Without waits, sends and glue: each at least its sleep, all together no more than the call's computing."""
    _, records = uneven
    for record in records:
        assert sum(record.blocks.values()) <= record.compute
        for name, seconds in record.blocks.items():
            assert seconds >= int(name[-1]) / 100


def graph_of(macs):
    """A chain of blocks, of these MACs."""
    output = (TensorMeta((1, 4), (4, 1), torch.float32),)
    blocks = tuple(Block(f"b{i}", output, 0, count, count) for i, count in enumerate(macs))
    return BlockGraph(blocks, frozenset((i, i + 1) for i in range(len(macs) - 1)), 0, 0)


def record(rank, blocks, synchronous=False, call=5):
    return CallRecord("", call, rank, rank, synchronous, 0.0, 1.0, 1.0, 0.0, 0, blocks=blocks)


def test_times_are_medians_of_asynchronous_calls_where_there_are_any():
    records = [record(0, {"b0": t, "b1": 1.0}) for t in (2.0, 9.0, 3.0)]
    records += [record(0, {"b0": 100.0, "b1": 1.0}, synchronous=True), record(1, {"b2": 4.0}, synchronous=True), record(1, {})]
    found = BlockTimes.of(records, ["fast", "slow"], pause=0.5).to_data()
    assert found == {"blocks": {"fast": {"b0": 3.0, "b1": 1.0}, "slow": {"b2": 4.0}}, "pause": 0.5}


def test_what_is_known_survives_as_json_and_anything_else_is_as_if_absent():
    times = BlockTimes({"gpu": {"b0": 0.5, "b1": 1.0}}, pause=0.25)
    assert BlockTimes.from_data(json.loads(json.dumps(times.to_data()))).to_data() == times.to_data()
    nothing = BlockTimes().to_data()
    for bad in (1, {"b0": "x"}, {"b0": -1.0}, {"b0": float("nan")}):
        assert BlockTimes.from_data({"blocks": {"gpu": bad}, "pause": 0.0}).to_data() == nothing
    for bad in (
        None,
        3,
        [],
        {},
        {"gpu": {"b0": 0.5}},
        {"blocks": 3},
        {"blocks": {}, "pause": -1.0},
        {"blocks": {}, "pause": "x"},
    ):
        assert BlockTimes.from_data(bad).to_data() == nothing


def test_newer_times_replace_older_ones_and_carry_the_rest_along():
    old = BlockTimes({"a": {"b0": 1.0, "b1": 2.0, "b2": 5.0}, "b": {"b3": 1.0}})
    new = BlockTimes({"a": {"b0": 2.0, "b1": 4.0}, "c": {"b3": 3.0}})
    assert old.updated(new).to_data() == {
        "blocks": {"a": {"b0": 2.0, "b1": 4.0, "b2": 10.0}, "b": {"b3": 1.0}, "c": {"b3": 3.0}},
        "pause": 0.0,
    }
    assert BlockTimes(pause=0.5).updated(BlockTimes(pause=0.25)).pause == 0.25
    assert BlockTimes(pause=0.5).updated(new).pause == 0.5, "not told"


def test_nothing_known_is_nothing_estimated():
    graph = graph_of([1, 2])
    assert BlockTimes().estimate(graph, ["a", "b"]) is None
    assert BlockTimes({"other": {"b0": 1.0}}).estimate(graph, ["a", "b"]) is None
    assert BlockTimes({"a": {"of another model": 1.0}}).estimate(graph, ["a", "b"]) is None


def test_the_ratio_of_devices_is_that_of_the_work_that_both_did():
    """Not of MACs, by which b would be a seventh as fast."""
    times = BlockTimes({"a": {"b0": 1.0, "b1": 1.0}, "b": {"b1": 2.0, "b2": 16.0}})
    costs, speeds = times.estimate(graph_of([10, 11, 12]), ["a", "b"])
    assert speeds == [1.0, 0.5]
    assert costs == [1.0, 1.0, 8.0]


def test_blocks_that_do_the_same_work_tell_it_as_well():
    times = BlockTimes({"a": {"b0": 1.0, "b1": 2.0}, "b": {"b2": 3.0}})
    costs, speeds = times.estimate(graph_of([10, 30, 10, 30, 60]), ["b", "a"])
    assert speeds == [1.0, 3.0]
    assert costs == pytest.approx([3.0, 6.0, 3.0, 6.0, 60 * 9 / 40])  # seconds on b; the last by MACs


def test_macs_tell_it_where_nothing_was_done_by_both():
    times = BlockTimes({"a": {"b0": 1.0, "b1": 2.0}, "b": {"b2": 6.0}})
    costs, speeds = times.estimate(graph_of([10, 20, 30]), ["a", "b"])
    assert speeds == pytest.approx([1.0, 0.5]) and costs == pytest.approx([1.0, 2.0, 3.0])


def test_devices_of_one_model_are_equally_fast_unless_measured_otherwise():
    times = BlockTimes({"gpu 0": {"b0": 1.0, "b1": 2.0}, "gpu 1": {"b2": 6.0}})
    graph, names, models = graph_of([10, 20, 30]), ["gpu 0", "gpu 1"], ["gpu", "gpu"]
    assert times.estimate(graph, names, models) == ([1.0, 2.0, 6.0], [1.0, 1.0])
    throttled = times.updated(BlockTimes({"gpu 1": {"b1": 4.0}}))
    assert throttled.estimate(graph, names, models) == ([1.0, 2.0, 3.0], [1.0, 0.5])


def test_a_third_device_is_compared_with_whichever_shares_work_with_it():
    times = BlockTimes({"a": {"b0": 1.0, "b1": 1.0}, "c": {"b2": 8.0, "b3": 8.0}, "b": {"b1": 2.0, "b2": 2.0}})
    costs, speeds = times.estimate(graph_of([10, 11, 12, 13]), ["a", "c", "b", "unknown"])
    assert speeds == [1.0, 0.125, 0.5, 1.0] and costs == [1.0, 1.0, 1.0, 1.0]


def test_the_pause_is_that_of_the_rank_that_is_waited_for():
    def at(rank, start, end, synchronous=False):
        return replace(record(rank, {}, synchronous), start=start, end=end)

    found = [
        at(1, 10.0, 11.0, True),
        at(1, 19.0, 20.0),
        at(1, 20.5, 22.0),
        at(1, 22.25, 23.0),
        at(1, 23.5, 24.0),
        at(0, 0.0, 40.0),
    ]
    assert pause(found, Plan()) == 0.5
    assert pause(found[:2], Plan()) == 0.0, "what follows on a synchronous call says nothing about the others"
    assert pause([], Plan()) == 0.0


@pytest.mark.parametrize("forecast", [0, 1])
def test_the_last_segment_has_less_to_do_if_it_must_pause(forecast):
    graph = graph_of([10] * 20)
    plan = Plan(forecast=forecast, fresh_skips=False)
    assert place(graph, plan, costs=[1.0] * 20, pause=4.0).shares == (12 / 20, 8 / 20)
    assert slowest(place(graph, plan, costs=[1.0] * 20), [1.0] * 20, [1.0, 1.0], 4.0) == 14.0
    assert place(graph, plan, [1.0, 2.0], [1.0] * 20, pause=4.0).shares == (9 / 20, 11 / 20), "11 / 2 + 4 = 9.5"
    moved = better(place(graph, plan), [1.0] * 20, [1.0, 1.0], 4.0)
    assert moved.shares == (12 / 20, 8 / 20)


def test_cuts_move_to_where_the_speeds_are():
    graph = graph_of([10] * 12)
    even = place(graph, EVEN)
    speeds = [1.0, 0.5]
    assert slowest(even, [1.0] * 12, speeds) == 12.0
    moved = better(even, [1.0] * 12, speeds)
    assert slowest(moved, [1.0] * 12, speeds) == 8.0
    assert [len(moved.owned(d)) for d in (0, 1)] == [8, 4] and moved.plan == even.plan


def test_cuts_stay_where_little_is_won_or_the_user_chose_them():
    graph = graph_of([10] * 12)
    even = place(graph, EVEN)
    assert better(even, [1.0] * 12, [1.0, 0.96]) is None
    chosen = place(graph, replace(EVEN, cuts=("b0", "b1")))
    assert better(chosen, [1.0] * 12, [1.0, 1.0]) is None
    assert better(Placement(graph, EVEN, (0, 1)), [1.0] * 12, [1.0, 1.0]) is not None


def test_a_slow_link_moves_the_cut_to_where_little_crosses():
    """Ten blocks of a second each; what block 2 hands on is small, and what the others do takes the link 8 s."""
    blocks = tuple(Block(f"b{i}", (TensorMeta((5 if i == 2 else 500,), (1,), torch.float16),), 0, 1, 1) for i in range(10))
    graph = BlockGraph(blocks, frozenset((i, i + 1) for i in range(9)), 0, 0)
    seconds, speeds, link = [1.0] * 10, [1.0, 1.0], Link(bandwidth=1000 / 8)
    fast = place(graph, EVEN, costs=seconds)
    assert slowest(fast, seconds, speeds) == 5.0
    assert slowest(fast, seconds, speeds, bandwidth=link.bandwidth) == 8.0
    assert better(fast, seconds, speeds) is None
    slow = better(fast, seconds, speeds, bandwidth=link.bandwidth)
    assert slow.starts == (0, 3)
    assert slowest(slow, seconds, speeds, bandwidth=link.bandwidth) == 7.0
    assert step_seconds(slow, Costs(seconds, link=link)) < step_seconds(fast, Costs(seconds, link=link))


def test_replicas_count_as_the_slowest_of_them():
    placement = place(graph_of([10] * 4), Plan(forecast=0, stride=2))
    assert slowest(placement, [1.0] * 4, [1.0, 1.0, 0.25]) == 8.0
