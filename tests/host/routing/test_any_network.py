"""Every network that the host can build, on ranks with no line written for it: the stock sampler's pictures.

Bit for bit where it is in segments, and up to rounding where it is in bands.
"""

import re
import runpy
from pathlib import Path

import comfy.sd
import nodes
import pytest
import torch

from asyncdiff_nodes.engine.tensors import tensors_of
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from helpers import small
from helpers.denoisers import DENOISERS, FRAMES_AS_BATCH, lora, sampled
from helpers.sampling import EXACT, assert_exact, assert_near, banded, exact, segmented
from helpers.simulated import simulated

ROOT = Path(__file__).resolve().parents[3]
# networks that only the host can compute, and why
REFUSED = {
    "hidream_o1": "looks at what the call before has kept",
    "seedvr2": "makes a value that it does not return",
    "wan_animate2": "has no parts with a notable share of its work that run once per call",
}
# those that cannot be computed in bands, and what is said of it
BANDLESS = REFUSED | {
    "ace_step": "it takes another path on bands",
    "ace_step15": "it takes another path for another height",
    "ace_step15_cover": "it takes another path for another height",
    "cascade_c": "tokens or rows, which are no band",
    "hidream": "depends on values, and is not tried out",
    "hidream_edit": "depends on values, and is not tried out",
    "hunyuan3d2": "cannot be tried with a picture of another height",
    "hunyuan3d21": "depends on values, and is not tried out",
    "trellis2_shape": "nothing takes tokens and returns as many",
    "trellis2_structure": "cannot be tried with a picture of another height",
    "trellis2_texture": "nothing takes tokens and returns as many",
    "triposplat": "cannot be tried with a picture of another height",
}
# by the number of ranks, since their latents are small here
BANDLESS_OF_SO_MANY = {
    ("cascade_b", 3): "are too few for 3 ranks",
    ("wan_dancer", 3): "are too few for 3 ranks",
    ("x4_upscaler", 3): "are too few for 3 ranks",
}
NO_MASK = ("kandinsky5",)  # ComfyUI itself fails: it adds channels that the network lacks
# those whose frames the host can compute in windows; of the ones that are built alike, one
VIDEOS = (
    "cogvideox_i2v", "cosmos", "cosmos2", "hunyuan_video_i2v", "hunyuan_video15", "kandinsky5", "ltx2", "ltxv", "mochi", "svd",
    "wan", "wan_i2v", "wan_s2v", "wan_vace",
)  # fmt: skip
TWICE = ("flux", "ltxv", "qwen_image", "wan", "z_image")  # tried with two models of the same kind, as Wan 2.2 is made
FAST = (
    "minimax_h3", "qwen_image", "ltx2", "krea2", "pid", "ace_step15", "trellis2_shape",
)  # fmt: skip


def networks(*fast, without=()):
    """All that are routed; by default only ``fast`` ones."""
    names = [name for name in DENOISERS if name not in {*REFUSED, *without}]
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.covers("exact", "sharded")
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", networks(*FAST))
def test_exact(name, ranks, record_property):
    denoiser = DENOISERS[name]
    model = denoiser.model()
    record_property("class", type(model.model.diffusion_model).__name__)
    assert_exact(model, lambda each: sampled(each, denoiser), exact(ranks))
    record_property("found", "found automatically" in last_run().text())
    held = [sum(rank.weights.values()) for rank in last_run().stats.ranks]
    assert max(held) < sum(tensor.nbytes for _, tensor in tensors_of(model.model.diffusion_model)), "every rank has all of it"


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", networks("minimax_h3", "qwen_image", "sd3", "sdxl", "wan", "z_image", without=BANDLESS))
def test_bands_are_the_network_up_to_rounding(name, ranks):
    if (name, ranks) in BANDLESS_OF_SO_MANY:
        return assert_bandless(name, ranks, BANDLESS_OF_SO_MANY[name, ranks])
    denoiser = DENOISERS[name]
    assert_near(denoiser.model(), lambda each: sampled(each, denoiser), banded(ranks), 2e-5)
    stats = last_run().stats
    assert stats.bytes_per_call == stats.planned_band_bytes > 0
    assert {record.rank for record in stats.records} == set(range(ranks))


def assert_bandless(name, ranks, reason):
    denoiser, model = DENOISERS[name], DENOISERS[name].model()
    stock = sampled(model, denoiser)
    assert torch.equal(sampled(attach(model, banded(ranks, branches=1)), denoiser), stock)
    assert last_run().stats is None and reason in last_run().notes[0]


@pytest.mark.covers("async")
@pytest.mark.parametrize("name", networks("minimax_h3", "ltx2"))
def test_asynchronous_calls_are_the_simulators(name):
    assert_exact_and_simulated(DENOISERS[name].model(), DENOISERS[name])


def assert_exact_and_simulated(model, denoiser):
    """Both laws."""
    stock = assert_exact(model, lambda each: sampled(each, denoiser, steps=8))
    names = last_run().placement.graph.names
    # in small networks most of the work may be that of embedders, of a prompt or a face, which do not change from step to step
    options = segmented(2, warmup=1, cuts=f"{names[0]}, {names[4 * len(names) // 5]}")
    found = sampled(attach(model, options), denoiser, steps=8)
    assert not last_run().notes
    oracle, simulator = simulated(model, last_run().plan, "euler")
    with simulator:
        expected = sampled(oracle, denoiser, steps=8)
    difference = (found - stock).abs().max()
    assert difference > 0, "or this test proves nothing"
    assert (found - expected).abs().max() <= 0.01 * difference
    return stock


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "ltx2" else pytest.mark.slow) for n in VIDEOS if n in DENOISERS]
)
def test_each_context_window_is_a_stream(name):
    """The host computes one frame of three after the other, and with it the frame before, which it then drops."""
    windows = pytest.importorskip("comfy_extras.nodes_context_windows", reason="this ComfyUI has no context windows")
    denoiser = DENOISERS[name]
    model, dim = denoiser.model(), 0 if denoiser.base in FRAMES_AS_BATCH else 2
    how = {
        "context_length": 1, "context_overlap": 0, "context_schedule": "standard_static", "context_stride": 1,
        "closed_loop": False, "fuse_method": "pyramid", "dim": dim, "freenoise": False,
        "causal_window_fix": dim > 0,  # Stable Video Diffusion's network is told of one frame only
    }  # fmt: skip
    windowed = small.node(windows.ContextWindowsManualNode, model, **how)
    stock = assert_exact_and_simulated(windowed, denoiser)
    assert not torch.equal(stock, sampled(model, denoiser, steps=8))


@pytest.mark.parametrize(
    ("high", "low"), [("sdxl", "sdxl_refiner"), *(pytest.param(n, n, marks=pytest.mark.slow) for n in TWICE if n in DENOISERS)]
)
def test_two_models_share_the_steps(high, low):
    """One for high noise and one for low noise, as of Wan 2.2, or SDXL and its refiner; and a second picture by the same two."""

    def sample(model, denoiser, latent, noise, *steps):
        prompts = denoiser.conditioning(1), denoiser.conditioning(4)
        return nodes.KSamplerAdvanced().sample(model, noise, 5, 4, 3.0, "euler", "simple", *prompts, latent, *steps, noise)[0]

    first, last = DENOISERS[high], DENOISERS[low]
    models = first.model(), last.model(seed=9)
    for seed in (2, 3):
        noisy = assert_exact(models[0], lambda m, seed=seed: sample(m, first, first.latent(seed), "enable", 0, 2)["samples"])
        assert_exact(models[1], lambda m, noisy=noisy: sample(m, last, {"samples": noisy}, "disable", 2, 10000)["samples"])


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


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "cascade_c" else pytest.mark.slow) for n in BANDLESS if n in DENOISERS]
)
def test_what_has_no_bands_is_sampled_as_usual_and_says_why(name):
    assert_bandless(name, 2, BANDLESS[name])


def test_the_page_names_the_families_without_bands():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").partition("\n## Bands\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!family)(.+?) \| ", page, re.MULTILINE)
    families = runpy.run_path(str(ROOT / "tools" / "measure" / "coverage.py"))["FAMILIES"]
    assert rows == sorted(family for family, names in families.items() if set(names) & BANDLESS.keys())


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
