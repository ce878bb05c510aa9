"""Every network that the host can build, on ranks with no line written for it: the stock sampler's pictures, bit for bit."""

import comfy.sd
import pytest
import torch

from asyncdiff_nodes.engine.tensors import tensors_of
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.workers.pool import POOL
from helpers.denoisers import DENOISERS, LARGE, lora, sampled
from helpers.sampling import EXACT, assert_exact, exact, segmented
from helpers.simulated import simulated

# networks that only the host can compute, and why
REFUSED = {
    "hidream_o1": "looks at what the call before has kept",
    "seedvr2": "makes a value that it does not return",
    "wan_animate2": "has no parts with a notable share of its work that run once per call",
}
NO_MASK = (*LARGE, "kandinsky5")  # ComfyUI itself fails: it adds channels that the network lacks
FAST = (
    "minimax_h3", "qwen_image", "ltx2", "krea2", "pid", "ace_step15", "trellis2_shape",
)  # fmt: skip


def networks(*fast, without=LARGE):
    """All that are routed; by default only ``fast`` ones. Those at true size are only sampled exactly, for time and memory."""
    names = [name for name in DENOISERS if name not in (*REFUSED, *without)]
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.covers("exact", "sharded")
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", networks(*FAST, without=()))
def test_exact(name, ranks, record_property):
    denoiser = DENOISERS[name]
    if name in LARGE:
        POOL.release()  # room for ComfyUI's own network beside its ranks
    model = denoiser.model()
    record_property("class", type(model.model.diffusion_model).__name__)
    assert_exact(model, lambda each: sampled(each, denoiser), exact(ranks))
    record_property("found", "found automatically" in last_run().text())
    held = [sum(rank.weights.values()) for rank in last_run().stats.ranks]
    assert max(held) < sum(tensor.nbytes for _, tensor in tensors_of(model.model.diffusion_model)), "every rank has all of it"


@pytest.mark.covers("async")
@pytest.mark.parametrize("name", networks("minimax_h3", "ltx2"))
def test_asynchronous_calls_are_the_simulators(name):
    denoiser = DENOISERS[name]
    model = denoiser.model()
    stock = assert_exact(model, lambda each: sampled(each, denoiser, steps=8))
    names = last_run().placement.graph.names
    # in small networks most of the work may be that of a prompt's embedders, which do not change from step to step
    options = segmented(2, warmup=1, cuts=f"{names[0]}, {names[3 * len(names) // 4]}")
    found = sampled(attach(model, options), denoiser, steps=8)
    assert not last_run().notes
    oracle, simulator = simulated(model, last_run().plan, "euler")
    with simulator:
        expected = sampled(oracle, denoiser, steps=8)
    difference = (found - stock).abs().max()
    assert difference > 0, "or this test proves nothing"
    assert (found - expected).abs().max() <= 0.01 * difference


@pytest.mark.covers("lora")
@pytest.mark.parametrize("name", networks("krea2", "ltxv"))
def test_a_lora(name):
    denoiser = DENOISERS[name]
    model = denoiser.model()
    changed = comfy.sd.load_lora_for_models(model, None, lora(model), 0.8, 0)[0]
    assert not torch.equal(assert_exact(changed, lambda each: sampled(each, denoiser)), sampled(model, denoiser))


@pytest.mark.covers("inpaint")
@pytest.mark.parametrize("name", networks("qwen_image", "wan22", without=NO_MASK))
def test_a_mask_of_noise(name):
    denoiser = DENOISERS[name]
    given = denoiser.latent()
    if given["samples"].is_nested:
        pytest.skip("the host's KSampler takes no mask for several latents at once")
    given["noise_mask"] = torch.zeros(1, 1, *given["samples"].shape[2:])
    given["noise_mask"][..., given["samples"].shape[-1] // 2 :] = 1.0
    assert_exact(denoiser.model(), lambda each: sampled(each, denoiser, latent=given))


@pytest.mark.covers("refused")
@pytest.mark.parametrize("name", [name for name in REFUSED if name in DENOISERS])  # older hosts have none of them
def test_what_is_refused_is_sampled_as_usual_and_says_why(name, record_property):
    denoiser, model = DENOISERS[name], DENOISERS[name].model()
    stock = sampled(model, denoiser)
    assert torch.equal(sampled(attach(model, EXACT), denoiser), stock)
    assert last_run().stats is None and REFUSED[name] in last_run().notes[0]
    assert torch.equal(sampled(model, denoiser), stock), "and nothing is left behind"
    record_property("class", type(model.model.diffusion_model).__name__)
    record_property("reason", last_run().notes[0].partition("cannot be split: ")[2])
