"""Law 1 on the host: with preset Exact, latents are bit-identical to the stock KSampler's."""

import functools

import comfy.samplers
import comfy.sd
import nodes
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom

from helpers import small
from helpers.controlling import controlled
from helpers.sampling import assert_exact, ksampler, prompts_for, with_areas_and_masks

SAMPLERS = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "ddim", "uni_pc", "lcm", "dpm_2"]
OTHERS = ["sd15_inpaint", "sd2_v", "sdxl_refiner"]
SCHEDULERS = ["normal", "karras", "exponential", "sgm_uniform"]
sample = functools.partial(ksampler, cfg=7.0)


def spread():
    """Every sampler on every kind; scheduler, guidance and batch size turn from case to case. By default, a fifth, of two kinds.

    The cases of one kind come together and share its ranks; last those of which there are tests below.
    """
    for row, kind in sorted(enumerate(small.KINDS), key=lambda case: case[1] in ("sd15", "sdxl")):
        for column, sampler in enumerate(SAMPLERS):
            turn = row + column
            choice = SCHEDULERS[turn % 4], (1.0, 7.0)[turn % 2], (1, 3)[turn // 2 % 2]
            marks = () if column % 5 == row and kind not in OTHERS else pytest.mark.slow
            yield pytest.param(kind, sampler, *choice, marks=marks, id=f"{kind}-{sampler}")


@pytest.fixture(scope="module", params=["sd15", "sdxl", *(pytest.param(k, marks=pytest.mark.slow) for k in OTHERS)])
def kind(request):
    """Of the module's scope, so that the tests of one kind come together and share its ranks."""
    return request.param


@pytest.fixture(scope="module")
def models():
    """The model of each kind, made once."""
    return functools.cache(small.model)


@pytest.fixture
def model(kind, models):
    return models(kind)


@pytest.mark.parametrize("kind, sampler, scheduler, cfg, batch", list(spread()))
def test_every_sampler_on_every_kind(models, kind, sampler, scheduler, cfg, batch):
    asked = {"kind": kind, "batch": batch, "sampler": sampler, "scheduler": scheduler, "cfg": cfg}
    assert_exact(models(kind), lambda m: ksampler(m, **asked))


def test_denoise_and_mask(kind, model):
    prompts, mask = prompts_for(kind), torch.zeros(1, 16, 16)
    mask[:, 4:12, 4:12] = 1.0
    masked = {**small.latent(), "noise_mask": mask}
    image_to_image = assert_exact(model, lambda m: sample(m, prompts, denoise=0.6))
    inpainted = assert_exact(model, lambda m: sample(m, prompts, masked, denoise=0.6))
    assert not torch.equal(image_to_image, inpainted)


def test_advanced_in_two_stages(kind, model):
    positive, negative = prompts_for(kind)

    def stages(m):
        common = (6, 7.0, "dpmpp_2m", "karras", positive, negative)
        first = nodes.KSamplerAdvanced().sample(m, "enable", 5, *common, small.latent(), 0, 3, "enable")[0]
        return nodes.KSamplerAdvanced().sample(m, "disable", 5, *common, first, 3, 10000, "disable")[0]["samples"]

    assert_exact(model, stages)


@pytest.mark.parametrize("guider", ["cfg", "basic", "dual"])
def test_custom_sampler_with_guiders(kind, model, guider):
    positive, negative = prompts_for(kind)
    third = small.conditioning(kind, 3)

    def guided(m):
        if guider == "cfg":
            guide = small.node(custom.CFGGuider, m, positive, negative, 5.0)
        elif guider == "basic":
            guide = small.node(custom.BasicGuider, m, positive)
        else:
            guide = small.node(custom.DualCFGGuider, m, positive, third, negative, 5.0, 3.0, "regular")
        sigmas = small.node(custom.BasicScheduler, m, "sgm_uniform", 4, 1.0)
        noise = small.node(custom.RandomNoise, 5)
        sampler = small.node(custom.KSamplerSelect, "dpmpp_2m")
        return small.node(custom.SamplerCustomAdvanced, noise, guide, sampler, sigmas, small.latent())["samples"]

    assert_exact(model, guided)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
        torch.float8_e4m3fn,
    ],
)
def test_weights_in_fewer_bits_with_lora(dtype, prompts):
    model = small.model("sd15", dtype=dtype)
    changed = comfy.sd.load_lora_for_models(model, None, small.lora(model), 0.7, 0)[0]
    assert_exact(changed, lambda m: sample(m, prompts))


def test_lora(sd15, prompts):
    plain = assert_exact(sd15, lambda m: sample(m, prompts))
    for strength in (0.8, 0.3):
        changed = comfy.sd.load_lora_for_models(sd15, None, small.lora(sd15), strength, 0)[0]
        assert not torch.equal(plain, assert_exact(changed, lambda m: sample(m, prompts)))
    assert_exact(sd15, lambda m: sample(m, prompts))


def test_areas_and_masks(sd15, prompts):
    assert_exact(sd15, lambda m: sample(m, with_areas_and_masks(prompts)))


def test_prompt_in_time_ranges(sd15, prompts):
    positive, negative = prompts
    early = nodes.ConditioningSetTimestepRange().set_range(positive, 0.0, 0.5)[0]
    late = nodes.ConditioningSetTimestepRange().set_range(small.conditioning("sd15", 3), 0.5, 1.0)[0]
    assert_exact(sd15, lambda m: sample(m, (early + late, negative), steps=6))


@pytest.mark.covers("controlnet", kind="sd15")
def test_control_net(sd15, prompts):
    plain = sample(sd15, prompts)
    for start, end in ((0.0, 1.0), (0.2, 0.7)):
        given = controlled(prompts, small.control_net(), start=start, end=end)
        found = assert_exact(sd15, lambda m, given=given: sample(m, given, steps=6))
        assert not torch.equal(found, plain)


def test_sizes_not_divisible_by_the_downsampling(sd15, prompts):
    assert_exact(sd15, lambda m: sample(m, prompts, small.latent(1, 15, 21)))
