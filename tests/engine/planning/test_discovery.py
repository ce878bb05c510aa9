"""Networks that no table lists: what is found out about them, and that they are split with no line written for them."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import unlisted
from asyncdiff_nodes.engine import Plan, PlanError, Simulator, UnsupportedModelError, WorkerGroup, meta_copy
from asyncdiff_nodes.engine.planning.discovery import discover

SPLIT = [
    unlisted.OddTransformer,
    unlisted.TwoSamples,
    unlisted.Masked,
    unlisted.Experts,
    *(pytest.param(network, marks=pytest.mark.slow) for network in (unlisted.OddUNet, unlisted.ReturnsWords)),
]


def found(cls):
    return discover(meta_copy(unlisted.made(cls)), *unlisted.given(cls))


def close(first, second):
    """The largest difference between two results."""
    return max(float((a - b).abs().max()) for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True))


def test_a_transformer_is_found_to_be_one():
    family, graph = found(unlisted.OddTransformer)
    assert graph.names == tuple(f"layers.{i}" for i in range(6)) and not graph.glue_macs > 0.1 * graph.macs
    assert (family.sample, family.timestep) == ((2, "picture"), (1, "when"))
    assert family.hidden.block == "layers.0" and family.hidden.argument == (2, "hidden") and family.hidden.lists == {"layers": 0}
    assert set(graph.hidden.carriers) == set(graph.names)


def test_it_is_found_in_inference_mode_too():
    """As in a host, where operations arrive otherwise than in training."""
    _, plain = found(unlisted.OddTransformer)
    with torch.inference_mode():
        _, graph = found(unlisted.OddTransformer)
    assert (graph.names, graph.edges, graph.macs) == (plain.names, plain.edges, plain.macs)


def test_a_unet_is_found_to_be_one():
    family, graph = found(unlisted.OddUNet)
    assert graph.names == ("stem", "down.0", "down.1", "shrink", "deep.0", "deep.1", "deep.2", "grow", "up.0", "up.1", "head")
    assert (family.sample, family.timestep) == ((2, "image"), (0, "sigma"))
    skip = graph.names.index("down.1"), graph.names.index("up.0")
    assert skip in graph.edges and family.hidden is None


def test_values_of_small_inputs_decide_the_path_and_are_said_to():
    assert not found(unlisted.OddTransformer)[0].found.read_values
    family, graph = found(unlisted.Masked)
    assert family.found.read_values and len(graph.names) == 6


def test_layers_that_route_tokens_by_their_values_are_whole_blocks():
    family, graph = found(unlisted.Experts)
    assert graph.names == tuple(f"layers.{i}" for i in range(6)) and set(family.keep_shape) == set(graph.names)


def test_layers_that_put_something_aside_are_opened_or_refused():
    net, (args, kwargs) = unlisted.made(unlisted.LooksAside), unlisted.given(unlisted.LooksAside)
    assert "layers.0.qkv" in discover(meta_copy(net), args, kwargs)[1].names
    net(*args, **kwargs)  # there is something aside from now on, and stubs would show what is old
    with pytest.raises(UnsupportedModelError, match=r"layers.\* makes a value that it does not return"):
        discover(meta_copy(net), args, kwargs)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cls", SPLIT)
def test_it_is_split_with_no_line_written_for_it(cls, ranks):
    """Synchronous calls are exact, and asynchronous ones are the simulator's, with blocks placed at the first call."""
    net, steps, warmup = unlisted.made(cls), 6, 2
    calls, levels = [unlisted.given(cls, step, steps) for step in range(steps)], [900.0 - 100 * step for step in range(steps)]
    with torch.no_grad():
        whole = [net(*args, **kwargs) for args, kwargs in calls]
        with Simulator(net, Plan(ranks, warmup=warmup)) as simulator:
            simulator.begin(levels)
            simulated = [simulator(*args, **kwargs) for args, kwargs in calls]
    with WorkerGroup(net, Plan(ranks, warmup=warmup), ["cpu"] * ranks) as group:
        with pytest.raises(PlanError, match="first call"):
            _ = group.placement
        group.begin(levels)
        results = [group(*args, **kwargs) for args, kwargs in calls]
        held = [sum(rank.weights.values()) for rank in group.stats().ranks]
    assert all(close(ours, theirs) == 0 for ours, theirs in zip(results[:warmup], whole, strict=False))
    assert all(close(ours, theirs) <= 1e-5 for ours, theirs in zip(results, simulated, strict=True))
    assert max(map(close, results, whole)) > 1e-3 and type(results[0]) is type(whole[0])
    assert max(held) < sum(parameter.nbytes for parameter in net.parameters())


REASONS = {
    unlisted.KeepsValues: "uses what the call before it has kept",
    unlisted.Counts: "each call changes calls",
    unlisted.ChangesArguments: "changes its own arguments",
    unlisted.Twice: "% of its work in parts that run once",
    unlisted.ReadsValues: "depends on values",
    unlisted.Draws: "random numbers",
    unlisted.WritesToPrompt: "layers.* writes to the network's own inputs",
}


@pytest.mark.parametrize("cls", REASONS)
def test_what_would_be_wrong_is_refused_by_name(cls):
    with pytest.raises(UnsupportedModelError, match=REASONS[cls].replace("*", r"\*")):
        found(cls)


def test_what_cannot_be_sent_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="cannot be sent to a worker process"):
        WorkerGroup(unlisted.made(unlisted.HoldsClosure))


def test_a_refusal_at_the_first_call_leaves_nothing_behind():
    group = WorkerGroup(unlisted.made(unlisted.Counts))
    args, kwargs = unlisted.given(unlisted.Counts)
    with pytest.raises(UnsupportedModelError, match="each call changes calls"):
        group(*args, **kwargs)
    assert group.closed
