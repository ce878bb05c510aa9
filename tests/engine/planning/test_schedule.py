"""Who computes what, call by call: as the published implementation logged it, and beyond it as written out by hand."""

import itertools

import pytest

import golden
from asyncdiff_nodes.engine import Call, Kind, Plan, ScheduleError, call_at
from asyncdiff_nodes.engine.planning.schedule import calls_ahead

S, A, P, R = Kind.SYNCHRONOUS, Kind.ASYNCHRONOUS, Kind.PREFETCHED, Kind.REPEATED


def call(k, kind, targets=(), results=(), reads=None):
    """Where ``reads`` is not told: of an asynchronous call the latest, otherwise this call's values."""
    return Call(k, kind, targets, reads or ((None,) * len(targets) if kind is A else targets), results)


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
    options = itertools.product((1, 2, 3, 4, 6), (False, True), (0, 1), (0, 1, 2), (1, 2, 3, 7, 8, 9, 10))
    for warmup, shift, forecast, cooldown, total in options:
        plan = Plan(segments, stride, warmup, shift, forecast, cooldown=cooldown)
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
        assert sum(call_at(plan, k, total).kind is Kind.SYNCHRONOUS for k in range(total)) == min(warmup + cooldown, total)


def test_stride_1_is_stale_by_one_call_and_has_no_end():
    plan = Plan(segments=3, warmup=2, forecast=0)
    assert [call_at(plan, k, None) for k in (0, 1, 2, 99)] == [
        call(0, S, (0, 0, 0), ((2, 0),)),
        call(1, S, (1, 1, 1), ((2, 1),)),
        call(2, A, (2, 2, 2), ((2, 2),)),
        call(99, A, (99, 99, 99), ((2, 99),)),
    ]


def test_working_ahead_each_segment_computes_what_the_next_will_want():
    plan = Plan(segments=3, warmup=2, forecast=1)
    assert calls(plan, 6) == [
        call(0, S, (0, 0, 0), ((2, 0),)),
        call(1, S, (1, 1, 1), ((2, 1),)),
        call(2, A, (4, 3, 2), ((2, 2),), reads=(4, 3, 2)),
        call(3, A, (5, 4, 3), ((2, 3),), reads=(5, 4, 3)),
        call(4, A, (5, 5, 4), ((2, 4),), reads=(5, 5, 4)),  # nothing is left to work ahead for
        call(5, A, (5, 5, 5), ((2, 5),), reads=(5, 5, 5)),
    ]
    assert call_at(plan, 9, None) == call(9, A, (9, 9, 9), ((2, 9),), reads=(9, 9, 9)), "without a schedule, nobody can"


def test_working_ahead_at_stride_2():
    plan = Plan(segments=3, stride=2, warmup=1, forecast=1)
    assert calls(plan, 8) == [
        call(0, S, (0,) * 4, ((2, 0),)),
        call(1, A, (5, 3, 2, 1), ((2, 2), (3, 1)), reads=(5, 3, 1, 1)),
        call(2, P),
        call(3, A, (7, 5, 4, 3), ((2, 4), (3, 3)), reads=(7, 5, 3, 3)),
        call(4, P),
        call(5, A, (7, 7, 6, 5), ((2, 6), (3, 5)), reads=(7, 7, 5, 5)),
        call(6, P),
        call(7, A, (7, 7, 7, 7), ((3, 7),), reads=(7, 7, 7, 7)),
    ]


def test_the_cool_down_is_synchronous_and_nothing_is_computed_for_it_before():
    assert calls(Plan(segments=3, warmup=2, cooldown=1), 6) == [
        call(0, S, (0, 0, 0), ((2, 0),)),
        call(1, S, (1, 1, 1), ((2, 1),)),
        call(2, A, (4, 3, 2), ((2, 2),), reads=(4, 3, 2)),
        call(3, A, (4, 4, 3), ((2, 3),), reads=(4, 4, 3)),
        call(4, A, (4, 4, 4), ((2, 4),), reads=(4, 4, 4)),
        call(5, S, (5, 5, 5), ((2, 5),)),
    ]
    assert calls(Plan(stride=2, warmup=1, cooldown=2, forecast=0), 6) == [
        call(0, S, (0, 0, 0), ((1, 0),)),
        call(1, A, (2, 2, 1), ((1, 2), (2, 1))),
        call(2, P),
        call(3, A, (3, 3, 3), ((2, 3),)),
        call(4, S, (4, 4, 4), ((1, 4),)),
        call(5, S, (5, 5, 5), ((1, 5),)),
    ]
    for plan in (Plan(warmup=2, cooldown=2), Plan(warmup=2, cooldown=99)):
        assert [call.kind for call in calls(plan, 4)] == [S] * 4
        assert calls_ahead(plan, 1, 4) == ()
    assert calls_ahead(Plan(segments=4, warmup=2, cooldown=1), 1, 4) == (ahead(1, 2, 3),)
    assert call_at(Plan(cooldown=1), 99, None).kind is A, "without a schedule there is no end"


def ahead(k, target, segments):
    return Call(k, Kind.AHEAD, (target,) * segments, (target,) * segments)


def test_before_the_first_asynchronous_call_the_first_segments_get_ahead():
    assert calls_ahead(Plan(segments=4, warmup=3), 2, 20) == (ahead(2, 3, 3), ahead(2, 4, 2), ahead(2, 5, 1))
    assert calls_ahead(Plan(segments=4, warmup=3), 2, 5) == (ahead(2, 3, 3), ahead(2, 4, 2)), "no further than the last call"
    assert calls_ahead(Plan(segments=3, stride=2, warmup=3), 2, 20) == (ahead(2, 3, 2), ahead(2, 5, 1))
    assert calls_ahead(Plan(segments=3, stride=2, warmup=2), 1, 20) == (ahead(1, 3, 2), ahead(1, 5, 1)), "call 2 repeats"
    for plan, k, total in ((Plan(warmup=3), 1, 9), (Plan(warmup=3), 3, 9), (Plan(warmup=3), 2, 3), (Plan(warmup=3), 2, None)):
        assert calls_ahead(plan, k, total) == ()
    assert calls_ahead(Plan(warmup=3, forecast=0), 2, 9) == ()


def test_working_ahead_every_value_is_there_in_time():
    for segments, stride, warmup, cooldown in itertools.product((2, 3, 4), (1, 2, 3), (1, 2, 4), (0, 1, 3)):
        plan, known = Plan(segments, stride, warmup, cooldown=cooldown), set()
        for at in calls(plan, 40):
            if at.kind is A:
                readers = [(rank, plan.segment_of_rank(rank)) for rank in range(plan.world_size)]
                wanted = {(sender, at.reads[rank]) for rank, segment in readers for sender in range(segment)}
                assert wanted <= known
            for part in (at, *calls_ahead(plan, at.index, 40)):
                known |= {(rank, target) for rank, target in enumerate(part.targets[:segments])}


def test_time_shift_takes_the_timestep_before_in_asynchronous_calls_only():
    plan = Plan(segments=2, warmup=2, time_shift=True, forecast=0)
    assert [call.timestep_indices for call in calls(plan, 5)] == [(0, 0), (1, 1), (1, 1), (2, 2), (3, 3)]
    plan = Plan(segments=2, stride=2, warmup=1, time_shift=True, forecast=0)
    assert [call.timestep_indices for call in calls(plan, 6)] == [(0, 0, 0), (1, 1, 0), (), (3, 3, 2), (), (4, 4, 4)]


def test_stride_2_with_a_lone_last_call():
    assert calls(Plan(segments=2, stride=2, warmup=1, forecast=0), 6) == [
        call(0, S, (0, 0, 0), ((1, 0),)),
        call(1, A, (2, 2, 1), ((1, 2), (2, 1))),
        call(2, P),
        call(3, A, (4, 4, 3), ((1, 4), (2, 3))),
        call(4, P),
        call(5, A, (5, 5, 5), ((2, 5),)),  # all at the last timestep; the replica's result counts
    ]


@pytest.mark.parametrize("warmup", [2, 4])
def test_even_warmup_at_stride_2_repeats_the_last_synchronous_result(warmup):
    kinds = [call.kind for call in calls(Plan(stride=2, warmup=warmup), 8)]
    assert kinds == [S] * warmup + [R] + ([A, P] * 4)[: 8 - warmup - 1]


def test_stride_3():
    assert calls(Plan(segments=2, stride=3, warmup=1, forecast=0), 9) == [
        call(0, S, (0, 0, 0, 0), ((1, 0),)),
        call(1, A, (3, 3, 1, 2), ((1, 3), (2, 1), (3, 2))),
        call(2, P),
        call(3, P),
        call(4, A, (6, 6, 4, 5), ((1, 6), (2, 4), (3, 5))),
        call(5, P),
        call(6, P),
        call(7, A, (8, 8, 7, 8), ((2, 7), (3, 8))),  # two calls are left of three
        call(8, P),
    ]


def test_stride_4_with_a_warmup_that_ends_within_a_batch():
    assert calls(Plan(segments=3, stride=4, warmup=3, forecast=0), 10) == [
        *(call(k, S, (k,) * 6, ((2, k),)) for k in range(3)),
        call(3, R),
        call(4, R),
        call(5, A, (8, 8, 8, 5, 6, 7), ((2, 8), (3, 5), (4, 6), (5, 7))),
        call(6, P),
        call(7, P),
        call(8, P),
        call(9, A, (9,) * 6, ((3, 9),)),
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


@pytest.mark.parametrize("plan", [Plan(stride=2), Plan(forecast=1), Plan(forecast=0, cooldown=1)], ids=["stride 2", "ahead", "C"])
@pytest.mark.parametrize("k", [4, 5, 99])
def test_more_calls_than_announced_are_refused(plan, k):
    with pytest.raises(ScheduleError, match=rf"call {k + 1} of a run that was begun with 4 timesteps"):
        call_at(plan, k, 4)


def test_more_calls_than_announced_are_refused_even_in_the_warmup():
    with pytest.raises(ScheduleError, match="call 5 of a run that was begun with 4 timesteps"):
        call_at(Plan(stride=2, warmup=9), 4, 4)
