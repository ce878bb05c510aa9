"""Block lists as goldens: what is found in a network is cut where the list is, and as many bytes cross."""

import pytest
import torch

from asyncdiff_nodes.cli.zoo import find_model
from asyncdiff_nodes.engine import Plan, find_family, place, trace
from asyncdiff_nodes.engine.planning.discovery import discover

TRANSFORMERS = ("pixart", "flux", "qwen-image", "wan-14b", "hunyuan-video", "ltx-video", "sd35-large")


@pytest.mark.parametrize("name", [TRANSFORMERS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in TRANSFORMERS[1:])])
def test_a_transformer_has_the_same_cuts_and_bytes(name):
    skeleton = find_model(name).skeleton(torch.float16)
    listed = find_family(skeleton)
    args, kwargs = listed.example_inputs(skeleton, None, 2)
    expected = trace(skeleton, listed, args, kwargs)
    family, graph = discover(skeleton, args, kwargs)
    assert set(graph.names) <= set(expected.names)
    missing = [block for block in expected.blocks if block.name not in graph.names]
    assert sum(block.macs for block in missing) < 0.0083 * expected.macs, "stems and heads"
    assert (family.sample, family.timestep) == (listed.sample, listed.timestep)
    assert family.hidden.argument == listed.hidden.argument and family.hidden.lists.items() >= listed.hidden.lists.items()
    ours, theirs = place(graph, Plan()), place(expected, Plan())
    assert ours.cuts[1] == theirs.cuts[1] and ours.bytes_per_call == theirs.bytes_per_call


def test_a_unet_is_better_with_its_list():
    """Its resamplers and first convolution have too little work to be found; without them more bytes cross in plain reuse."""
    skeleton = find_model("sd15").skeleton(torch.float16)
    listed = find_family(skeleton)
    args, kwargs = listed.example_inputs(skeleton, None, 2)
    _, graph = discover(skeleton, args, kwargs)
    plan = Plan(forecast=0)
    assert place(graph, plan).bytes_per_call > 1.1 * place(trace(skeleton, listed, args, kwargs), plan).bytes_per_call
