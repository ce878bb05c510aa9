"""Several calls for one prompt at one noise level: asynchronous pictures stay near, and no value of one call reaches another."""

import itertools
import random

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from asyncdiff_nodes.host.demo import encode, load_demo
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from helpers import compositions, small
from helpers.sampling import ksampler, segmented

SYNCHRONOUS = "changes from step to step"  # said of calls that cannot be told apart
WIDE = {"samples": torch.zeros(1, 3, 32, 48)}
# wrapper -> whether its calls can be told apart, and all are made in every step; None: that is a matter of chance
WRAPPERS = {"tiles": True, "tiles back and forth": True, "tiles shuffled": True}
WRAPPERS |= {"some tiles": False, "shifted": False, "passes": None, "cropped": False}


SAMPLERS = ["euler_ancestral", "lcm", "heun", "dpmpp_2m_sde"]


def cases():
    """By default some of them, with the preset that deviates most."""
    for name in WRAPPERS:
        marks = () if name in ("tiles shuffled", "shifted", "passes") else pytest.mark.slow
        yield pytest.param(name, segmented(warmup=2), marks=marks, id=f"{name}-fast")
        yield pytest.param(name, Options(devices="cpu,cpu,cpu"), marks=pytest.mark.slow, id=f"{name}-balanced")


@pytest.fixture(scope="module")
def demo():
    return load_demo()[0]


def psnr(a, b):
    error = (a.double() - b.double()).square().mean()
    return float("inf") if error == 0 else float(10 * torch.log10((a.max() - a.min()).double() ** 2 / error))


def sampled(model, wrapper=None, latent=WIDE, steps=12, sampler="euler", cfg=1.0):
    if wrapper is not None:
        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper(random.Random(5)))
    return ksampler(model, (encode("red heart"), encode("")), latent, steps=steps, sampler=sampler, cfg=cfg)


@pytest.mark.parametrize(("name", "options"), list(cases()))
def test_each_is_a_stream_or_all_steps_are_synchronous(demo, name, options):
    wrapper = compositions.WRAPPERS[name]
    expected = sampled(demo, wrapper)
    found = sampled(attach(demo, options), wrapper)
    synchronous = any(SYNCHRONOUS in note for note in last_run().notes)
    assert psnr(expected, found) > 45
    assert synchronous is (not WRAPPERS[name]) or WRAPPERS[name] is None


def scaled(rng):
    """Of each step's latent once more a part, enlarged: it lies nowhere in the sampler's."""

    def wrapper(apply, given):
        left = rng.randrange(0, 24)
        x = torch.nn.functional.interpolate(given["input"][..., left : left + 24], scale_factor=(1, 2))
        out = apply(given["input"], given["timestep"], **given["c"])
        out[..., left : left + 24] += 0.1 * apply(x, given["timestep"], **given["c"])[..., ::2]
        return out

    return wrapper


def test_what_lies_nowhere_and_moves_is_synchronous(demo):
    expected = sampled(demo, scaled)
    found = sampled(attach(demo, segmented(warmup=2)), scaled)
    assert any(SYNCHRONOUS in note for note in last_run().notes)
    assert torch.equal(expected, found)


def alternating(rng):
    """Another prompt in every other step."""
    steps = [0]

    def wrapper(apply, given):
        steps[0] += 1
        c = dict(given["c"])
        if steps[0] % 2:
            c["c_crossattn"] = c["c_crossattn"].flip(-1)
        return apply(given["input"], given["timestep"], **c)

    return wrapper


def test_prompts_that_take_turns_are_synchronous(demo):
    expected = sampled(demo, alternating)
    found = sampled(attach(demo, segmented(warmup=2)), alternating)
    assert any(SYNCHRONOUS in note for note in last_run().notes)
    assert torch.equal(expected, found)


def drifting(rng):
    """A prompt that is another one in every step."""
    steps = [0]

    def wrapper(apply, given):
        steps[0] += 1
        c = {**given["c"], "c_crossattn": given["c"]["c_crossattn"] * (1 + 0.1 * steps[0])}
        return apply(given["input"], given["timestep"], **c)

    return wrapper


def test_a_prompt_that_is_new_in_every_step_is_synchronous(demo):
    expected = sampled(demo, drifting)
    found = sampled(attach(demo, segmented(warmup=2)), drifting)
    assert any(SYNCHRONOUS in note for note in last_run().notes)
    assert torch.equal(expected, found)


def tiling(shuffled):
    """A sampler that steps through the latent tile by tile, in one order or in another one each time."""

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        rng = random.Random(3)
        for now, then in itertools.pairwise(sigmas):
            places = [0, 24]
            if shuffled:
                rng.shuffle(places)
            for left in places:
                tile = x[..., left : left + 24]
                denoised = model(tile, now * x.new_ones([len(x)]), **(extra_args or {}))
                x[..., left : left + 24] = tile + (tile - denoised) / now * (then - now)
        return x

    return sampler


@pytest.mark.parametrize("shuffled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_sampler_that_goes_tile_by_tile(demo, shuffled):
    def run(model):
        return small.custom_sample(model, (encode("red heart"), encode("")), tiling(shuffled), 12, start=WIDE)

    expected = run(demo)
    found = run(attach(demo, segmented(warmup=2)))
    assert psnr(expected, found) > 45


@pytest.mark.parametrize("sampler", [pytest.param(each, marks=() if each == "lcm" else pytest.mark.slow) for each in SAMPLERS])
def test_a_wrapper_that_changes_nothing_costs_no_speed(demo, sampler):
    """Nor does fresh noise in every step make a latent another one."""

    def plain(rng):
        return lambda apply, given: apply(given["input"], given["timestep"], **given["c"])

    watching = demo.clone()
    for kind in (WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL, WrappersMP.PREDICT_NOISE):
        watching.add_wrapper_with_key(kind, "watching", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    found = sampled(attach(watching, segmented(warmup=2, verify="off")), plain, sampler=sampler, steps=10)
    assert not last_run().notes
    assert torch.equal(found, sampled(attach(demo, segmented(warmup=2)), sampler=sampler, steps=10))
    assert any(not call.synchronous for call in last_run().stats.calls)
