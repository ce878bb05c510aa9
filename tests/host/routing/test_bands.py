"""Bands on the host: all ranks compute each call at once, and the pictures are the stock sampler's up to rounding.

A call in bands differs from the network's by some 1e-6 of its largest number (``test_any_network.py`` allows 2e-5). Guidance of 7
makes up to thirteen times as much of that, and each of the few steps adds some. So latents may differ by 1e-4 of their largest
number; half a step of an 8-bit picture is 2e-3.
"""

import functools
from itertools import product

import comfy.sd
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom

from asyncdiff_nodes.engine import PlanError
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import small
from helpers.controlling import controlled, pids, shared
from helpers.sampling import assert_near, banded, ksampler, prompts_for, with_areas_and_masks

NEAR = 1e-4
SAMPLERS = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "ddim", "uni_pc", "lcm", "dpm_2"]
FAST = {("sd15", "dpmpp_2m_sde"), ("sd15", "heun"), ("z_image", "euler_ancestral")}
sample = functools.partial(ksampler, cfg=7.0)


def near(model, sample, ranks=2, **options):
    """They are, and the ranks sent each other what was planned."""
    expected = assert_near(model, sample, banded(ranks, **options), NEAR)
    assert last_run().stats.bytes_per_call == last_run().stats.planned_band_bytes > 0
    return expected


@pytest.fixture(scope="module")
def models():
    """The model of each kind, made once."""
    return functools.cache(small.model)


def spread():
    """Every sampler on kinds of both sorts; guidance and batch size turn from case to case."""
    for turn, (kind, sampler) in enumerate(product(("sd15", "sdxl", "z_image", "wan"), SAMPLERS)):
        marks = () if (kind, sampler) in FAST else pytest.mark.slow
        yield pytest.param(kind, sampler, (1.0, 7.0)[turn % 2], (1, 3)[turn // 2 % 2], marks=marks, id=f"{kind}-{sampler}")


@pytest.mark.parametrize("kind, sampler, cfg, batch", list(spread()))
def test_every_sampler(models, kind, sampler, cfg, batch):
    near(models(kind), lambda m: ksampler(m, kind=kind, sampler=sampler, cfg=cfg, batch=batch), branches=1)
    assert last_run().plan.bands == 2 and last_run().line.startswith("2 bands on cpu, cpu")
    assert "Plan: 2 bands, each with the whole network, so nothing is stale" in last_run().text()
    assert "Rank 1 on cpu: band 2 of 2, " in last_run().text()


@pytest.mark.parametrize("kind", ["sd15", pytest.param("z_image", marks=pytest.mark.slow)])
def test_branches_have_bands_of_their_own(models, kind):
    near(models(kind), lambda m: sample(m, kind=kind, batch=3), ranks=4, bands=2, branches=2)
    assert (last_run().plan.branches, last_run().plan.bands) == (2, 2)
    assert {record.rank for record in last_run().stats.records} == {0, 1, 2, 3}


@pytest.mark.slow
def test_a_custom_sampler(sd15, prompts):
    def guided(m):
        guide, noise = small.node(custom.CFGGuider, m, *prompts, 5.0), small.node(custom.RandomNoise, 5)
        sigmas = small.node(custom.BasicScheduler, m, "karras", 5, 1.0)
        sampler = small.node(custom.KSamplerSelect, "dpmpp_sde")
        return small.node(custom.SamplerCustomAdvanced, noise, guide, sampler, sigmas, small.latent())["samples"]

    near(sd15, guided, ranks=4)


def test_lora(sd15, prompts):
    """Running ranks are sent what it changes."""
    plain = near(sd15, lambda m: sample(m, prompts), branches=1)
    ranks = pids()
    for strength in (0.8, 0.3):
        changed = comfy.sd.load_lora_for_models(sd15, None, small.lora(sd15), strength, 0)[0]
        found = near(changed, lambda m: sample(m, prompts), branches=1)
        assert (found - plain).abs().max() > 3 * NEAR * plain.abs().max() and pids() == ranks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "z_image", "qwen_image"])
def test_masks_of_noise(models, kind):
    given = small.latent(kind=kind)
    given["noise_mask"] = torch.zeros(1, *given["samples"].shape[-2:])
    given["noise_mask"][:, 4:12, 4:12] = 1.0
    near(models(kind), lambda m: sample(m, latent=given, kind=kind, denoise=0.6), branches=1)


def test_areas_and_masks(sd15, prompts):
    """Calls of several sizes: each has bands of its own."""
    assert_near(sd15, lambda m: sample(m, with_areas_and_masks(prompts)), banded(branches=1), NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(15, 21), (9, 8)])
def test_odd_sizes(sd15, prompts, size):
    near(sd15, lambda m: sample(m, prompts, small.latent(1, *size)), branches=1)


@pytest.mark.parametrize("how", ["shared", "fresh"])
def test_control_net(sd15, prompts, how):
    POOL.release()  # ranks of another test may still have a ControlNet
    plain = sample(sd15, prompts)
    for start, end in ((0.0, 1.0), (0.2, 0.7)):
        given = controlled(prompts, small.control_net(), start=start, end=end)
        found = assert_near(sd15, lambda m: sample(m, given, steps=6), banded(branches=1, control_nets=how), NEAR)  # noqa: B023
        assert not torch.equal(found, plain) and shared() == (how == "shared")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "flux", "qwen_image", "sd3"])
def test_control_nets_of_others(models, kind):
    given = controlled(prompts_for(kind), small.control_net(kind), kind=kind, vae=small.vae())
    assert_near(models(kind), lambda m: sample(m, given, kind=kind), banded(branches=1), NEAR)


def test_the_batch_stays_whole_where_bands_are_given():
    assert [
        Options("Custom", "cpu,cpu", bands=2).resolve(items=2)[0].branches,
        banded(4, bands=2, branches=2).resolve(items=2)[0].branches,
    ] == [1, 2]


def test_too_small_a_picture_is_sampled_as_usual(sd15, prompts):
    tiny = small.latent(1, 2, 16)
    expected = sample(sd15, prompts, tiny)
    assert torch.equal(sample(attach(sd15, banded(3, branches=1)), prompts, tiny), expected)
    assert last_run().stats is None and "are too few for 3 ranks" in last_run().line


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"bands": 2, "segments": 3}, "bands=2 with segments=3 and stride=1: all ranks of a branch share a synchronous call"),
        ({"bands": 2, "stride": 2}, "stride=2 with segments=1: take 2 segments or more, or stride 1"),
        ({"bands": 3}, "bands=3 with branches=1 needs 3 devices, but there are 2"),
        ({"bands": 2, "branches": 2}, "bands=2 with branches=2 needs 4 devices, but there are 2"),
        ({"bands": -1}, "bands=-1 is out of range"),
    ],
)
def test_wrong_options_are_refused_by_name(changes, why):
    with pytest.raises(PlanError, match=why):
        Options("Custom", "cpu,cpu", **changes).resolve()
