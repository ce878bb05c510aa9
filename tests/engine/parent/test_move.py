"""A running group whose blocks move to other ranks, in mid-run and between runs."""

import os
import signal
import statistics
from dataclasses import replace

import psutil
import pytest
import torch

import toys
from asyncdiff_nodes.engine import BlockTimes, Plan, PlanError, Simulator, WorkerError, better, place
from asyncdiff_nodes.engine.tensors import tensors_of
from reuse import running
from toys import TOY

TIMES = [980, 860, 740, 620, 500, 380, 260, 140, 60, 20]
CUTS = (("blocks.0", "blocks.2"), ("blocks.3", "blocks.5"), ("blocks.0", "blocks.5"))


@pytest.fixture(scope="module", params=[Plan(forecast=0, warmup=2), Plan(warmup=2, cooldown=1), Plan(stride=2)], ids=toys.label)
def movable(request):
    """A group with automatic cuts, its network, and where its blocks could be."""
    net, plan = toys.random_net(2), request.param
    with running(net, plan, family=TOY) as group:
        yield group, net, [at(group, cuts) for cuts in CUTS]


def at(group, cuts):
    """The group's placement with other cuts."""
    graph, plan = group.placement.graph, group.plan
    return type(group.placement)(graph, plan, place(graph, replace(plan, cuts=cuts)).starts)


def weights_of(net, asked):
    """What to give to ``move``: all of the network's weights; notes the names that it was asked for."""

    def give(names):
        asked.append(names)
        return tensors_of(net)

    return give


def denoise(group, net, moves):
    """Inputs, outputs and the network's own outputs of a run; ``moves`` says what to do before which call."""
    group.begin(TIMES)
    (x, given), seen = toys.inputs(0), []
    with torch.no_grad():
        for k, t in enumerate(TIMES):
            if k in moves:
                group.move(moves[k], weights_of(net, []))
            seen.append((x, group(x, t, **given), net(x, t, **given)))
            x = 0.8 * x + 0.3 * seen[-1][1]
    return seen


def replay(net, plan, seen):
    """What the simulator returns for the inputs of a run."""
    with Simulator(net, plan, family=TOY) as simulator:
        simulator.begin(TIMES)
        return [simulator(x, t, **toys.inputs(0)[1]) for (x, _, _), t in zip(seen, TIMES, strict=True)]


@pytest.mark.parametrize("when", [1, 5, *(pytest.param(call, marks=pytest.mark.slow) for call in (4, 8))])
def test_after_a_move_in_mid_run_all_is_as_after_a_warm_up(movable, when):
    """Before it, the old placement's numbers; then an exact call; then those of a run whose warm-up ended there."""
    group, net, (old, new, _) = movable
    plan = group.plan
    group.move(old, weights_of(net, []))
    seen = denoise(group, net, {when: new})
    outputs = [output for _, output, _ in seen]
    for k, expected in enumerate(replay(net, replace(plan, cuts=old.cuts), seen)[:when]):
        assert torch.equal(outputs[k], expected), f"call {k}"
    assert torch.equal(outputs[when], seen[when][2])
    warmup = plan.warmup if when < plan.warmup else when + 1 + -when % plan.stride
    for k, expected in enumerate(replay(net, replace(plan, cuts=new.cuts, warmup=warmup), seen)):
        assert k < when or torch.equal(outputs[k], expected), f"call {k}"
    why = {call.call: call.why for call in group.stats().calls if call.synchronous}
    assert why[when] == ("warm-up" if when < plan.warmup else "cool-down" if when >= len(TIMES) - plan.cooldown else "move")


def test_every_rank_has_the_weights_of_its_blocks_and_is_sent_only_what_it_lacks(movable, monkeypatch):
    group, net, placements = movable
    pids, sent, asked = group.pids, [], []
    group.move(placements[0], weights_of(net, []))
    original = group._ranks.send

    def send(rank, header, tensors=(), *, deadline):
        if header[0] == "weight":
            sent.append((rank, header[1]))
        original(rank, header, tensors, deadline=deadline)

    monkeypatch.setattr(group._ranks, "send", send)
    for placement in (*placements[1:], *placements):
        before = {rank.rank: set(rank.weights) for rank in group.stats().ranks}
        sent.clear()
        group.move(placement, weights_of(net, asked))
        reports = group.stats().ranks
        for report in reports:
            blocks = {f"blocks.{i}" for i in placement.owned(report.segment)}
            expected = {name: t.nbytes for name, t in tensors_of(net) if ".".join(name.split(".")[:2]) in blocks}
            glue = {name: t.nbytes for name, t in tensors_of(net) if not name.startswith("blocks.")}
            assert report.weights == expected | glue
            assert {name for rank, name in sent if rank == report.rank} == set(report.weights) - before[report.rank]
        assert asked[-1] == {name for _, name in sent} and len(sent) == len(set(sent))
    assert group.pids == pids


@pytest.mark.parametrize("when", [1, 5, *(pytest.param(call, marks=pytest.mark.slow) for call in (0, 9))])
def test_a_synchronous_run_is_exact_with_moves(movable, when):
    group, net, (first, second, third) = movable
    group.begin(TIMES, replace(group.plan, warmup=99))
    outputs, (x, given) = [], toys.inputs(0)
    for k, t in enumerate(TIMES):
        if k == when:
            group.move(second, weights_of(net, []))
            group.move(third, weights_of(net, []))
        outputs.append(group(x, t, **given))
        x = 0.8 * x + 0.3 * outputs[-1]
    group.move(first, weights_of(net, []))
    with torch.no_grad():
        assert torch.equal(torch.stack(outputs), toys.denoise(net, TIMES))


def test_only_what_the_new_placement_crosses_is_sent(movable):
    group, net, placements = movable
    for placement in placements:
        group.move(placement, weights_of(net, []))
        group.begin(TIMES)
        toys.denoise(group, TIMES)
        stats = group.stats()
        assert stats.planned_bytes == placement.bytes_per_call == stats.bytes_per_call


def test_after_a_move_the_blocks_are_timed_again_but_not_in_the_cold_call(movable):
    group, net, (old, new, _) = movable
    group.move(old, weights_of(net, []))
    denoise(group, net, {5: new})
    timed = {record.call for record in group.stats().records if record.blocks}
    assert 5 not in timed and timed & {6, 7}


def test_a_placement_of_another_plan_or_model_is_refused(movable):
    group, net, _ = movable
    other = place(group.placement.graph, Plan(segments=3))
    with pytest.raises(PlanError, match="for another model or plan"):
        group.move(other, weights_of(net, []))
    assert not group.closed


@pytest.mark.parametrize(
    "weights, error", [(lambda names: [], WorkerError), (lambda names: iter([("x", 1 / 0)]), ZeroDivisionError)]
)
def test_a_failing_move_closes_the_group(weights, error):
    net = toys.random_net(4)
    with running(net, Plan(), family=TOY) as group:
        starts = group.placement.starts
        cuts = next(cuts for cuts in CUTS if at(group, cuts).starts != starts)
        with pytest.raises(error):
            group.move(at(group, cuts), weights)
        assert group.closed


def test_a_rank_that_dies_in_a_move_ends_it():
    net = toys.random_net(4)
    with running(net, Plan(), family=TOY) as group:
        other = next(found for cuts in CUTS if (found := at(group, cuts)).starts != group.placement.starts)

        def weights(names):
            os.kill(group.pids[1], signal.SIGTERM)
            yield from tensors_of(net)

        with pytest.raises(WorkerError, match="rank 1"):
            group.move(other, weights)
        assert group.closed


def test_what_a_rank_gives_up_is_really_freed():
    net = toys.chain(*[toys.ToyBlock] * 5, channels=1024)  # 36 MiB each
    block = sum(tensor.nbytes for _, tensor in tensors_of(net.blocks[0]))
    with running(net, Plan(forecast=0), family=TOY) as group:
        held = []
        for cuts in (("blocks.0", "blocks.4"), ("blocks.0", "blocks.1")):
            group.move(at(group, cuts), weights_of(net, []))
            group.stats()  # everything before has been done
            held.append([psutil.Process(pid).memory_info().rss for pid in group.pids])
        (many, one), (less, more) = held
        assert many - less > 2.5 * block and more - one > 2.5 * block


@pytest.mark.timing
@pytest.mark.parametrize(
    "plan", [pytest.param(Plan(forecast=0, warmup=3), marks=pytest.mark.slow), Plan(warmup=3)], ids=["reuse", "ahead"]
)
def test_unequal_devices_come_near_the_ideal_for_their_speeds(plan):
    """Cut evenly at first, with rank 1 half as fast as rank 0; measured in the first calls, moved in mid-run."""
    net = toys.chain(*[toys.Throttled] * 24)
    ideal = 24 * toys.Throttled.SECONDS / (1 + 1 / 2)
    times = list(range(960, 0, -60))
    with running(net, plan, family=TOY) as group:
        (x, given), records, cuts = toys.inputs(0), [], group.placement.cuts
        group.begin(times, on_record=records.append)
        for k, t in enumerate(times):
            if k == plan.warmup + 4:
                known = BlockTimes.of(records, ["fast", "slow"])
                group.move(better(group.placement, *known.estimate(group.placement.graph, ["fast", "slow"])), weights_of(net, []))
            x = 0.8 * x + 0.3 * group(x, t, **given)
        records = group.stats().records

    def step(calls):
        """Median time of these asynchronous calls, that of their slower rank."""
        return statistics.median(max(r.end - r.start for r in records if r.call == k and not r.ahead) for k in calls)

    assert cuts != group.placement.cuts
    assert step(range(plan.warmup, plan.warmup + 4)) > 1.4 * ideal  # an even split loses a third
    assert step(range(plan.warmup + 5, len(times))) < 1.08 * ideal
