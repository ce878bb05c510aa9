"""The families that are not in the other tests, as the host builds them: small, with random weights."""

import comfy.sd
import pytest
import torch

from asyncdiff_nodes.engine import Plan
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing import preparation
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import small
from helpers.controlling import controlled
from helpers.sampling import EXACT, assert_exact, exact, ksampler, prompts_for, segmented
from helpers.simulated import simulated


def kinds(*fast, among=small.ALL):
    """All; by default only ``fast`` ones, for time: the rest is with ``slow``, and in ``tools/measure/coverage.py``."""
    return [kind if kind in fast else pytest.param(kind, marks=pytest.mark.slow) for kind in among]


def latent(kind):
    """Of Stable Video Diffusion, a video's frames are the batch."""
    return small.latent(3 if kind == "svd" else 1, kind=kind)


def sampled(model, kind, steps=6, cfg=1.0, **how):
    return ksampler(model, **{"kind": kind, "latent": latent(kind), "steps": steps, "cfg": cfg, "scheduler": "simple"} | how)


@pytest.mark.covers("exact", "async", "sharded")
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", kinds("flux", "sd3", "wan"))
def test_exact_is_the_stock_sampler_and_asynchronous_steps_are_the_simulators(kind, ranks):
    model, cfg = small.model(kind), 1.0 if kind == "flux" else 5.0
    stock = assert_exact(model, lambda m: sampled(m, kind, 8, cfg), exact(ranks))
    held = last_run().stats.ranks
    assert len(held) == ranks and stock.std() > 0
    assert max(sum(rank.weights.values()) for rank in held) < model.model_size()

    found = sampled(attach(model, segmented(ranks)), kind, 8, cfg)
    assert not last_run().notes
    oracle, simulator = simulated(model, last_run().plan, "euler")
    with simulator:
        expected = sampled(oracle, kind, 8, cfg)
    assert (found - stock).abs().max() > 0 and (found - expected).abs().max() <= 0.01 * (found - stock).abs().max()


# each of the four layers of a small SD 3 is more than a quarter of the work, and so no block
LAYERED = [kind for kind in small.TRANSFORMERS if kind != "sd3"]


@pytest.mark.parametrize("kind", kinds("flux", "wan", among=LAYERED))
def test_hidden_states_are_where_the_family_says(kind):
    """Blocks without weights add nothing: if every segment makes hidden states of its own input, no result is stale."""
    model = small.model(kind)
    net = model.model.diffusion_model
    oracle, simulator = simulated(model, Plan(2), "euler")
    with simulator:
        sampled(oracle, kind, 2)
    for blocks in simulator.family.hidden.lists:
        for parameter in net.get_submodule(blocks).parameters():
            parameter.data.zero_()
    stock = sampled(model, kind, sampler="euler_ancestral")  # noise that nobody can foresee
    wrong = {}
    for forecast in (0, 1):
        plan = Plan(2, forecast=forecast)
        oracle, simulator = simulated(model, plan, "euler_ancestral")
        with simulator:
            found = sampled(oracle, kind, sampler="euler_ancestral")
        wrong[simulator.placement.hidden is not None] = (found - stock).abs().max()
    assert wrong[True] < 0.02 * wrong[False]


@pytest.mark.covers("inpaint")
@pytest.mark.parametrize("kind", kinds("ltxv", "sd3"))
def test_image_to_image_with_a_mask(kind):
    given = latent(kind)
    given["noise_mask"] = torch.zeros(1, 1, 16, 16)
    given["noise_mask"][..., 6:] = 1.0
    how = {"latent": given, "sampler": "dpmpp_2m", "scheduler": "sgm_uniform", "denoise": 0.6}
    stock = assert_exact(small.model(kind), lambda m: sampled(m, kind, **how))
    assert torch.allclose(stock[..., :6], given["samples"][..., :6], atol=1e-4)


@pytest.mark.covers("lora")
@pytest.mark.parametrize("kind", kinds("flux"))
def test_lora_and_fewer_bits(kind):
    model = small.model(kind, dtype=torch.bfloat16)
    plain = sampled(model, kind)
    for strength in (0.8, 0.3):
        changed = comfy.sd.load_lora_for_models(model, None, small.lora(model), strength, 0)[0]
        assert not torch.equal(assert_exact(changed, lambda m: sampled(m, kind)), plain)


@pytest.mark.covers("controlnet")
@pytest.mark.parametrize("kind", ["flux", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd3", "sdxl"))])
def test_control_net(kind):
    """Where the host computes its residuals, they are added to what the blocks return, in place."""
    model, given = small.model(kind), controlled(prompts_for(kind), small.control_net(kind), kind=kind)
    found = assert_exact(model, lambda m: sampled(m, kind, 4, 3.0, prompts=given), exact(control_nets="fresh"))
    assert not torch.equal(found, sampled(model, kind, 4, 3.0))


@pytest.mark.parametrize("kind", ["flux", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen_image", "z_image"))])
def test_reference_latents(kind):
    """Pictures to edit, as further tokens."""
    model, prompts = small.model(kind), prompts_for(kind)
    for seed, prompt in enumerate(prompts):
        prompt[0][1]["reference_latents"] = [small.latent(kind=kind, seed=seed)["samples"], small.latent(kind=kind)["samples"]]
    found = assert_exact(model, lambda m: sampled(m, kind, 4, 3.0, prompts=prompts))
    assert not torch.equal(found, sampled(model, kind, 4, 3.0))


@pytest.mark.parametrize("kind", ["ltxv"])
def test_video_from_its_first_frame(kind):
    """LTX-Video has a timestep for each token then: those of the frame that is given are at rest."""
    model = small.model(kind)
    given = {**latent(kind), "noise_mask": torch.ones(1, 1, 3, 16, 16)}
    given["noise_mask"][:, :, 0] = 0.0

    def sample(model):
        return sampled(model, kind, 8, 3.0, latent=given)

    stock = assert_exact(model, sample)
    found = sample(attach(model, segmented()))
    assert not last_run().notes and last_run().plan.forecast == 1
    assert 0 < (found - stock).abs().max() < 0.01 * stock.abs().max()
    assert torch.allclose(found[:, :, 0], given["samples"][:, :, 0], atol=1e-4)


def test_devices_get_no_more_weights_than_they_have_room_for(monkeypatch):
    """FLUX.1's double blocks have more weights for their work than its single ones."""
    model, placed = small.model("flux"), []
    whole = model.model_size()
    for limit in (whole, 0.6 * whole):
        monkeypatch.setattr(preparation, "room_for_weights", lambda devices, *_, limit=limit: [limit] * len(devices))
        found = sampled(attach(model, EXACT), "flux")
        placed.append([sum(rank.weights.values()) for rank in last_run().stats.ranks])
        POOL.release()
    assert max(placed[0]) > 0.6 * whole >= max(placed[1]), placed
    assert torch.equal(found, sampled(model, "flux"))


@pytest.mark.parametrize("kind", ["ltxv"])
@pytest.mark.parametrize("guided", [0, 1], ids=["the prompt", "the negative prompt"])
def test_values_of_small_inputs_decide_the_path_of_all_ranks(guided, kind):
    """LTX-Video leaves out the tokens of a key frame that a mask says."""
    model, prompts = small.model(kind), prompts_for(kind)
    places = torch.rand(1, 3, 256, 2, generator=torch.Generator().manual_seed(1))
    older = not hasattr(model.model.diffusion_model, "caption_channels")  # a place instead of a span for each token
    prompts[guided][0][1]["keyframe_idxs"] = places[..., 0] if older else places
    given = {**latent(kind), "noise_mask": torch.ones(1, 1, 3, 16, 16)}
    assert_exact(model, lambda each: sampled(each, kind, 4, 3.0, prompts=prompts, latent=given))


def test_a_network_that_reads_the_schedule_is_sent_it(monkeypatch):
    """HunyuanVideo, where it was distilled by mean flow."""
    monkeypatch.setitem(small.ALL["hunyuan_video"][3], "meanflow", True)
    assert_exact(small.model("hunyuan_video"), lambda model: sampled(model, "hunyuan_video", 4))


def test_a_variant_with_blocks_of_its_own_is_sampled_as_usual():
    model = small.model("wan")

    class Variant(type(model.model.diffusion_model)):
        pass

    model.model.diffusion_model.__class__ = Variant
    stock = sampled(model, "wan")
    assert torch.equal(sampled(attach(model, EXACT), "wan"), stock)
    assert "cannot be split: its Variant has layers of the class " in last_run().notes[0]


@pytest.mark.parametrize("kind", ["sd3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("svd", "wan", "z_image"))])
def test_two_devices_halve_the_prompts_of_cfg(kind):
    model = small.model(kind)
    found = sampled(attach(model, Options("Balanced", "cpu,cpu")), kind, cfg=5.0)
    assert (last_run().plan.branches, last_run().plan.segments) == (2, 1) and not last_run().notes
    stock = sampled(model, kind, cfg=5.0)
    assert (found - stock).abs().max() < 1e-3 * stock.abs().max()
