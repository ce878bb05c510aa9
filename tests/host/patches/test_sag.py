"""Self-Attention Guidance: the sampler blurs where the network attended to, so ranks tell what one block saw."""

import nodes
import pytest
import torch
from comfy_extras import nodes_sag, nodes_torch_compile

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.patches.obstacles import obstacle
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import sampling, small
from helpers.controlling import controlled, shared
from helpers.failing import killing, sample
from helpers.sampling import exact, ksampler, prompts_for, segmented
from helpers.simulated import assert_simulated

CASES = [(kind, ranks) for kind in ("sd15", "sdxl", "sd2_v") for ranks in (2, 3)]


@pytest.fixture(scope="module")
def model():
    return small.attentive()


def guided(model):
    return small.node(nodes_sag.SelfAttentionGuidance, model, 0.8, 2.0)


def assert_exact(model, prompts, ranks=2, routed=None, **kwargs):
    return sampling.assert_exact(model, lambda m: ksampler(m, prompts, **kwargs), exact(ranks), routed)


@pytest.mark.parametrize(("kind", "ranks"), [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])])
def test_synchronous_calls_are_the_hosts_bit_by_bit(kind, ranks):
    model, prompts = small.attentive(kind), prompts_for(kind)
    found = assert_exact(guided(model), prompts, ranks)
    assert (found - ksampler(model, prompts)).abs().max() > 1e-3, "guidance matters"
    calls = [record for record in last_run().stats.records if record.rank == 0]
    assert len(calls) == 8, "a call of both prompts, and one of the blurred picture, in each step"


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"batch": 3}, {"cfg": 1.0}, {"sampler": "heun"}], ids=str)
def test_other_calls(model, prompts, given):
    assert_exact(guided(model), prompts, **given)


def test_prompts_that_the_host_evaluates_one_after_the_other(model, prompts):
    """Only the negative one's calls record, and they are none of those of the blurred picture."""
    assert_exact(guided(model), (small.conditioning(tokens=5 * 77), prompts[1]))
    assert len({record.stream for record in last_run().stats.records}) == 3


@pytest.mark.slow
def test_areas(model, prompts):
    positive = nodes.ConditioningSetArea().append(prompts[0], 64, 128, 0, 0, 1.0)[0]
    assert_exact(guided(model), (positive, prompts[1]))


@pytest.mark.slow
def test_with_a_control_net(model, prompts):
    given = controlled(prompts, small.control_net())
    assert_exact(guided(model), given)
    assert shared() == 1


@pytest.mark.slow
def test_on_and_off(model, prompts):
    """Ranks that can tell what a block saw are others than those that cannot."""
    both = assert_exact(guided(model), prompts), assert_exact(model, prompts)
    assert not torch.equal(*both)
    early = guided(attach(model, exact()))
    assert torch.equal(assert_exact(guided(model), prompts, routed=early), both[0])


def test_branches_share_the_prompts(model, prompts):
    model = guided(model)
    found, expected = ksampler(attach(model, Options(devices="cpu,cpu")), prompts), ksampler(model, prompts)
    (note,) = last_run().notes
    assert "a guidance node evaluates one of them again" in note and "only the first of 2 branches computes" in note
    assert last_run().plan.branches == 2 and {record.rank for record in last_run().stats.records} == {0, 1}
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), "the same but for rounding"


@pytest.mark.parametrize(
    "changed",
    [
        {},
        *(
            pytest.param(c, marks=pytest.mark.slow)
            for c in ({"forecast": False, "compression": "int8"}, {"stride": 2, "segments": 2})
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_asynchronous_calls_equal_the_simulator(kind, changed):
    prompts = prompts_for(kind)
    assert_simulated(guided(small.attentive(kind)), segmented(3, **changed), lambda m: ksampler(m, prompts, steps=9))


@pytest.mark.slow
def test_what_crosses_is_a_number_for_each_token(model, prompts):
    assert_exact(guided(model), prompts)
    graph = POOL._held[-1].group.placement.graph
    block = graph.names.index("middle_block.1")
    hidden, seen = graph.blocks[block].outputs
    assert hidden.shape == (2, 64, 8, 8) and seen.shape == (2, 1, 64)
    assert (block, len(graph.blocks) - 1) in graph.edges, "it is part of the result"
    both = next(record.stream for record in last_run().stats.records)
    sent = sum(record.bytes_sent for record in last_run().stats.records if record.stream == both)
    assert sent == 4 * last_run().stats.planned_bytes


@pytest.mark.slow
def test_compiled_blocks(model, prompts):
    """What the patch saw is not to be had of them."""
    both = small.node(nodes_torch_compile.TorchCompileModel, guided(model), "eager")
    expected = ksampler(both, prompts)
    assert torch.equal(ksampler(attach(both, exact()), prompts), expected)
    assert "compiled (torch.compile), and Self-Attention Guidance reads values inside it" in last_run().notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("then", ["restart", "finish"])
def test_ranks_that_fail(model, prompts, then):
    """Others take over, or the host, whose own patch then sees what it blurs by."""
    model = guided(model)
    expected = sample(model, prompts)
    found = sample(attach(model, exact(on_failure=then)), prompts, killing(1, 2))
    assert torch.equal(found, expected) and last_run().notes


def test_networks_without_that_attention():
    """The node's own patch is never called there, which is ComfyUI's to say."""
    for model in (small.model("vega"), small.model("koala"), small.model("svd"), small.model("flux")):
        patched = guided(model)
        assert "attn1 (comfy_extras.nodes_sag.SelfAttentionGuidance.execute)" in obstacle(patched, patched.model_options)
        assert obstacle(model, model.model_options) is None
