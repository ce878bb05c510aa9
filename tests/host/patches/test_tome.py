"""Token merging: which tokens are merged is drawn by lot, in the ranks from the host's numbers."""

import pytest
import torch
from comfy_extras import nodes_sag, nodes_tomesd, nodes_torch_compile

from asyncdiff_nodes.host import demo
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.patches.obstacles import obstacle
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from helpers import sampling, small
from helpers.sampling import exact, ksampler, prompts_for, segmented
from helpers.simulated import assert_simulated


@pytest.fixture(scope="module")
def model():
    return small.attentive()


def merging(model, ratio=0.5):
    return small.node(nodes_tomesd.TomePatchModel, model, ratio)


def sample(model, prompts, height=16, width=16, batch=1, **how):
    return ksampler(model, prompts, small.latent(batch, height, width), **how)


def assert_exact(model, prompts, ranks=2, **kwargs):
    """Bit for bit what the host computes, and all of it routed; and the host's generator is where it would be."""
    after = []

    def run(model):
        found = sample(model, prompts, **kwargs)
        after.append(torch.randn(3))
        return found

    found = sampling.assert_exact(model, run, exact(ranks))
    assert torch.equal(*after)
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["sd15", *(pytest.param(k, marks=pytest.mark.slow) for k in ("sd2_v", "sdxl", "svd"))])
def test_synchronous_calls_are_the_hosts_bit_by_bit(kind, ranks):
    """Random numbers are drawn where the picture has its full resolution: SDXL has no attention there."""
    model, prompts = small.attentive(kind), prompts_for(kind)
    found = assert_exact(merging(model), prompts, ranks, batch=4 if kind == "svd" else 1)
    change = (found - sample(model, prompts, batch=4 if kind == "svd" else 1)).abs().max()
    assert change == 0 if kind == "sdxl" else change > 1e-4


CASES = [
    {"height": 15, "width": 18},
    {"sampler": "euler_ancestral", "batch": 3},
    {"cfg": 1.0},
    {"sampler": "heun"},
]


@pytest.mark.parametrize("given", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])], ids=str)
def test_other_calls(model, prompts, given):
    assert_exact(merging(model), prompts, **given)


@pytest.mark.slow
def test_prompts_that_the_host_evaluates_one_after_the_other(model, prompts):
    assert_exact(merging(model), (small.conditioning(tokens=5 * 77), prompts[1]))
    assert len({record.stream for record in last_run().stats.records}) == 2


@pytest.mark.slow
def test_nothing_to_merge(model, prompts):
    assert torch.equal(assert_exact(merging(model, 0.0), prompts), sample(model, prompts))
    assert_exact(merging(model), prompts, height=1)


@pytest.mark.parametrize("size", [16, 4], ids=["16", "as many rows of numbers as prompts"])
def test_branches_merge_alike(model, prompts, size):
    merged = merging(model)
    found, expected = (sample(m, prompts, height=size, width=size) for m in (attach(merged, Options(devices="cpu,cpu")), merged))
    assert last_run().plan.branches == 2 and {record.rank for record in last_run().stats.records} == {0, 1}
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), "the same but for rounding"


@pytest.mark.parametrize(
    "changed",
    [{}, *(pytest.param(c, marks=pytest.mark.slow) for c in ({"forecast": False}, {"stride": 2, "segments": 2}))],
    ids=str,
)
def test_asynchronous_calls_equal_the_simulator(model, prompts, changed):
    assert_simulated(merging(model), segmented(3, **changed), lambda m: sample(m, prompts, steps=9))


@pytest.mark.slow
def test_guided_by_its_attention_as_well(model, prompts):
    assert_exact(small.node(nodes_sag.SelfAttentionGuidance, merging(model), 0.8, 2.0), prompts)


@pytest.mark.slow
def test_compiled_blocks(model, prompts):
    """ComfyUI itself has an error then (0.33.0)."""
    compiled = small.node(nodes_torch_compile.TorchCompileModel, merging(model), "eager")
    found = sample(attach(compiled, exact()), prompts)
    assert last_run().stats.records and not last_run().notes
    assert torch.equal(found, sample(merging(model), prompts))


def test_networks_of_another_layout():
    """It is ComfyUI's to say what the node does there."""
    for model in (small.model("flux"), demo.load_demo()[0]):
        patched = merging(model)
        assert "attn1_patch (comfy_extras.nodes_tomesd.TomePatchModel.execute)" in obstacle(patched, patched.model_options)
        assert obstacle(model, model.model_options) is None
