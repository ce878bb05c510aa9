"""Who computes what, call by call: as the published implementation logged it, and beyond it as written out by hand."""

import itertools

import pytest

import golden
from asyncdiff_nodes.engine import Call, Kind, Plan, ScheduleError, call_at

S, A, P, R = Kind.SYNCHRONOUS, Kind.ASYNCHRONOUS, Kind.PREFETCHED, Kind.REPEATED


def calls(plan, total):
    return [call_at(plan, k, total) for k in range(total)]


@pytest.mark.parametrize("name", golden.ASYNC_RUNS)
def test_timesteps_and_segments_are_those_of_the_published_implementation(name):
    run, plan = golden.RUNS[name], golden.plan_of(name)
    compared = 0
    for call in calls(plan, run["T"]):
        for rank in range(plan.world_size):
            ran = run["rank_segments_run"][rank][call.index]
            if call.kind is Kind.SYNCHRONOUS:
                assert ran == list(range(plan.segments))  # there, every rank runs them all, one after the other
            else:
                assert ran == ([plan.segment_of_rank(rank)] if call.computes else [])
            if call.computes:
                index = call.timestep_indices[rank]
                assert run["timesteps"][index] == run["rank_timesteps"][rank][call.index]
                compared += 1
    assert compared >= run["T"]


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("segments", [2, 3])
def test_every_call_gets_exactly_one_result(segments, stride):
    for warmup, shift, total in itertools.product((1, 2, 3, 4, 6), (False, True), (1, 2, 3, 7, 8, 9, 10)):
        plan = Plan(segments=segments, stride=stride, warmup=warmup, time_shift=shift)
        computed = {}
        for call in calls(plan, total):
            for rank, index in call.results:
                assert plan.segment_of_rank(rank) == plan.segments - 1, "the last segment's output is the result"
                assert index >= call.index, "no result comes after its call"
                assert index not in computed
                computed[index] = call.index
            assert all(0 <= index < total for index in call.timestep_indices)
            assert len(call.timestep_indices) in (0, plan.world_size)
            assert (call.index in computed) == (call.kind is not Kind.REPEATED)
        assert sum(call_at(plan, k, total).kind is Kind.SYNCHRONOUS for k in range(total)) == min(warmup, total)


def test_stride_1_is_stale_by_one_call_and_has_no_end():
    plan = Plan(segments=3, warmup=2)
    assert [call_at(plan, k, None) for k in (0, 1, 2, 99)] == [
        Call(0, S, (0, 0, 0), ((2, 0),)),
        Call(1, S, (1, 1, 1), ((2, 1),)),
        Call(2, A, (2, 2, 2), ((2, 2),)),
        Call(99, A, (99, 99, 99), ((2, 99),)),
    ]


def test_time_shift_takes_the_timestep_before_in_asynchronous_calls_only():
    plan = Plan(segments=2, warmup=2, time_shift=True)
    assert [call.timestep_indices for call in calls(plan, 5)] == [(0, 0), (1, 1), (1, 1), (2, 2), (3, 3)]
    plan = Plan(segments=2, stride=2, warmup=1, time_shift=True)
    assert [call.timestep_indices for call in calls(plan, 6)] == [(0, 0, 0), (1, 1, 0), (), (3, 3, 2), (), (4, 4, 4)]


def test_stride_2_with_a_lone_last_call():
    assert calls(Plan(segments=2, stride=2, warmup=1), 6) == [
        Call(0, S, (0, 0, 0), ((1, 0),)),
        Call(1, A, (2, 2, 1), ((1, 2), (2, 1))),
        Call(2, P),
        Call(3, A, (4, 4, 3), ((1, 4), (2, 3))),
        Call(4, P),
        Call(5, A, (5, 5, 5), ((2, 5),)),  # all at the last timestep; the replica's result counts
    ]


@pytest.mark.parametrize("warmup", [2, 4])
def test_even_warmup_at_stride_2_repeats_the_last_synchronous_result(warmup):
    kinds = [call.kind for call in calls(Plan(stride=2, warmup=warmup), 8)]
    assert kinds == [S] * warmup + [R] + ([A, P] * 4)[: 8 - warmup - 1]


def test_stride_3():
    assert calls(Plan(segments=2, stride=3, warmup=1), 9) == [
        Call(0, S, (0, 0, 0, 0), ((1, 0),)),
        Call(1, A, (3, 3, 1, 2), ((1, 3), (2, 1), (3, 2))),
        Call(2, P),
        Call(3, P),
        Call(4, A, (6, 6, 4, 5), ((1, 6), (2, 4), (3, 5))),
        Call(5, P),
        Call(6, P),
        Call(7, A, (8, 8, 7, 8), ((2, 7), (3, 8))),  # two calls are left of three
        Call(8, P),
    ]


def test_stride_4_with_a_warmup_that_ends_within_a_batch():
    assert calls(Plan(segments=3, stride=4, warmup=3), 10) == [
        *(Call(k, S, (k,) * 6, ((2, k),)) for k in range(3)),
        Call(3, R),
        Call(4, R),
        Call(5, A, (8, 8, 8, 5, 6, 7), ((2, 8), (3, 5), (4, 6), (5, 7))),
        Call(6, P),
        Call(7, P),
        Call(8, P),
        Call(9, A, (9,) * 6, ((3, 9),)),
    ]


def test_warmup_of_one_more_than_a_multiple_of_the_stride_repeats_nothing():
    for stride in (2, 3, 4):
        for batches in range(3):
            plan = Plan(stride=stride, warmup=1 + batches * stride)
            assert R not in [call.kind for call in calls(plan, 20)]


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_stride_without_a_schedule_is_refused(stride):
    with pytest.raises(ScheduleError, match=rf"stride={stride} needs the whole schedule: call begin\(timesteps\)"):
        call_at(Plan(stride=stride), 0, None)


@pytest.mark.parametrize("k", [4, 5, 99])
def test_more_calls_than_announced_are_refused(k):
    with pytest.raises(ScheduleError, match=rf"call {k + 1} of a run that was begun with 4 timesteps"):
        call_at(Plan(stride=2), k, 4)


def test_more_calls_than_announced_are_refused_even_in_the_warmup():
    with pytest.raises(ScheduleError, match="call 5 of a run that was begun with 4 timesteps"):
        call_at(Plan(stride=2, warmup=9), 4, 4)
