"""Hidden states that every segment of a transformer makes afresh: what crosses a cut is how blocks changed them."""

from dataclasses import replace

import pytest
import torch

from asyncdiff_nodes.engine import Placement, Plan, Simulator, place, trace
from reuse import running
from toys import TRANSFORMER, ToyTransformer

TIMESTEPS = [900, 800, 700, 600, 500, 400, 300]
SAMPLES = torch.randn(len(TIMESTEPS), 2, 6, 4, generator=torch.Generator().manual_seed(5))  # of which nothing can be foreseen
CONTEXT = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(6))
# a cut between blocks of two streams, one after the last of them, and one between blocks of one
PLANS = (
    Plan(2, warmup=2, cuts=("two.0", "two.2")),
    Plan(3, warmup=2, cuts=("two.0", "one.0", "one.2")),
    Plan(2, warmup=1, stride=2, cuts=("two.0", "one.1")),
)


def graph_of(net):
    return trace(net.to("meta"), TRANSFORMER, *TRANSFORMER.example_inputs(net, None, 2))


@torch.no_grad()
def denoise(call):
    return [call(x, t, context=CONTEXT) for x, t in zip(SAMPLES, TIMESTEPS, strict=True)]


def without(plan):
    """The same cuts, but for the embedding's, which is then the first segment's alone: nothing is made afresh."""
    return replace(plan, cuts=("embed", *plan.cuts[1:]))


def group_of(net, plan):
    return running(net, plan, family=TRANSFORMER)


def begun(call, **how):
    call.begin(TIMESTEPS, **how)
    return denoise(call)


@pytest.mark.parametrize("plan", PLANS, ids=["two streams", "three segments", "stride 2"])
def test_the_law_of_fresh_hidden_states(plan):
    """Where blocks add what does not depend on the sample, its hidden states are all that could be stale."""
    net = ToyTransformer(mix=0)
    expected = denoise(net)
    with group_of(net, plan) as group:
        got = begun(group)
        # the second call of a batch is computed before its sample is there
        first = slice(1, None, plan.stride)
        torch.testing.assert_close(got[first], expected[first], rtol=0, atol=1e-5)
        assert group.stats().bytes_per_call == group.stats().planned_bytes
    with Simulator(net, without(plan), family=TRANSFORMER) as stale:
        assert max((a - b).abs().max() for a, b in zip(begun(stale), expected, strict=True)) > 0.1


@pytest.mark.parametrize("compression", ["none", "int8"])
@pytest.mark.parametrize("plan", PLANS, ids=["two streams", "three segments", "stride 2"])
def test_ranks_compute_what_the_simulator_does(plan, compression):
    net, plan = ToyTransformer(), replace(plan, compression=compression)
    exact = denoise(net)
    with group_of(net, plan) as group, Simulator(net, plan, family=TRANSFORMER) as simulator:
        torch.testing.assert_close(begun(group), begun(simulator), rtol=0, atol=1e-6)
        synchronous = replace(plan, warmup=len(TIMESTEPS))
        simulator.close()
        assert all(map(torch.equal, begun(group, plan=synchronous), exact))
        assert all(map(torch.equal, begun(group, plan=replace(synchronous, stride=1)), exact))


def test_values_of_synchronous_calls_stand_for_themselves():
    """Without a schedule nobody works ahead: the first asynchronous call reads what the last synchronous one sent, whole."""
    net, plan = ToyTransformer(mix=0), PLANS[1]
    expected = denoise(net)
    with group_of(net, plan) as group, Simulator(net, plan, family=TRANSFORMER) as simulator:
        group.begin()
        simulator.begin()
        got = denoise(group)
        torch.testing.assert_close(got, denoise(simulator), rtol=0, atol=1e-6)
        simulator.close()
    late = plan.warmup + plan.segments  # what was made of old hidden states has passed, and is no point of a line any more
    assert not torch.allclose(got[plan.warmup], expected[plan.warmup])
    torch.testing.assert_close(got[late:], expected[late:], rtol=0, atol=1e-5)


def test_nothing_more_crosses_and_what_is_made_again_is_the_embedding():
    graph = graph_of(ToyTransformer())
    assert graph.hidden.made_of == {0} and set(graph.hidden.carriers) == set(graph.names[1:-1])
    for segments in (2, 3):
        fresh = place(graph, Plan(segments))
        stale = place(graph, without(Plan(segments, cuts=fresh.cuts)))
        assert fresh.hidden is graph.hidden and stale.hidden is None
        assert fresh.bytes_per_call == stale.bytes_per_call
        assert [0 in fresh.owned(d) for d in range(segments)] == [True] * segments
        assert [0 in stale.owned(d) for d in range(segments)] == [True] + [False] * (segments - 1)
        assert fresh.cost(20) < 1.1 * stale.cost(20)


@pytest.mark.parametrize("how", [{"cuts": ("embed", "two.2")}, {"forecast": 0}])
def test_where_they_are_not_made_again(how):
    assert place(graph_of(ToyTransformer()), Plan(2, **how)).hidden is None


def test_hidden_states_that_no_block_makes_are_fresh_with_any_cuts():
    """As where the embedding is done by every rank: all of them are then sent the sample."""
    family = replace(TRANSFORMER, block_names=lambda net: TRANSFORMER.block_names(net)[1:])
    net, plan = ToyTransformer(mix=0), Plan(2, warmup=2)
    with running(net, plan, family=family) as group:
        assert group.placement.hidden.made_of == frozenset()
        torch.testing.assert_close(begun(group), denoise(net), rtol=0, atol=1e-5)


def test_blocks_that_are_built_or_called_otherwise_hand_on_no_hidden_states():
    net = ToyTransformer().to("meta")

    def hidden(**other):
        family = replace(TRANSFORMER, hidden=replace(TRANSFORMER.hidden, **other))
        return trace(net, family, *family.example_inputs(net, None, 2)).hidden

    assert set(hidden(lists={"two": 7, "one": 0}).carriers) == {"one.0", "one.1", "one.2"}
    assert hidden(argument=(3, "hidden_states")) is None
    assert hidden(block="two.7") is None


def test_blocks_move_with_their_hidden_states():
    net, plan = ToyTransformer(mix=0), PLANS[0]
    weights = dict(net.state_dict())
    with group_of(net, plan) as group:
        group.begin(TIMESTEPS)
        got = [group(x, t, context=CONTEXT) for x, t in zip(SAMPLES[:4], TIMESTEPS[:4], strict=True)]
        graph = group.placement.graph
        group.move(
            Placement(graph, plan, [graph.find(cut) for cut in ("two.0", "one.1")]),
            lambda names: ((name, weights[name]) for name in sorted(names)),
        )
        got += [group(x, t, context=CONTEXT) for x, t in zip(SAMPLES[4:], TIMESTEPS[4:], strict=True)]
    expected = denoise(net)
    del got[5], expected[5]  # reads what the synchronous call after the move sent, whole
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
