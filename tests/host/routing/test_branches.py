"""Branches on the host: prompt and negative prompt on ranks of their own, and when not."""

import functools
from types import SimpleNamespace

import nodes
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras import nodes_custom_sampler as custom

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing import cfg_branches
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers.divide import divide as divide_call
from asyncdiff_nodes.host.workers.memory import room_for_weights
from helpers import small
from helpers.controlling import controlled
from helpers.halves import TWO, assert_halved, by_halves, halved_net
from helpers.sampling import ksampler

sample = functools.partial(ksampler, cfg=7.0, sampler="dpmpp_2m")


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", pytest.param("dpmpp_sde", marks=pytest.mark.slow)])
def test_two_devices_halve_cfg_exactly(kind, sampler):
    assert_halved(small.model(kind), lambda m: sample(m, kind=kind, sampler=sampler))
    sample(attach(small.model(kind), TWO), kind=kind)
    assert "2 branches of 1 segment on cpu, cpu" in last_run().line


@pytest.mark.skipif(not hasattr(ModelPatcher, "get_free_memory"), reason="this ComfyUI asks its device itself")
def test_prompts_share_a_call_whatever_is_free_on_the_hosts_own_device(sd15, prompts, monkeypatch):
    """Ranks fill it. ComfyUI alone evaluates one prompt after the other then."""
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda *_: 0)
    found = sample(attach(sd15, TWO), prompts)
    assert not last_run().notes and {record.rank for record in last_run().stats.records} == {0, 1}
    assert "get_free_memory" not in vars(sd15)
    monkeypatch.undo()
    assert torch.equal(found, sample(by_halves(sd15), prompts))


@pytest.mark.slow
def test_prompts_of_other_lengths_and_batches(sd15, prompts):
    longer = small.conditioning("sd15", 4, tokens=154)
    assert_halved(sd15, lambda m: sample(m, (longer, prompts[1])))
    assert_halved(sd15, lambda m: sample(m, prompts, batch=3))
    assert_halved(sd15, lambda m: sample(m, prompts, cfg=1.0, batch=2))


@pytest.mark.slow
def test_control_net_on_both(sd15, prompts):
    """Each branch computes it for its own half."""
    net = small.control_net()
    given = controlled(prompts, net)
    assert_halved(sd15, lambda m: sample(m, given), halved_net(net.control_model))
    assert all("control_nets.0.zero_convs.0.0.weight" in rank.weights for rank in last_run().stats.ranks)


def test_patches_know_which_prompt_they_have(sd15, prompts):
    from comfy_extras.nodes_freelunch import FreeU_V2

    patched = small.node(FreeU_V2, sd15, 1.3, 1.4, 0.9, 0.2)
    assert_halved(patched, lambda m: sample(m, prompts))
    options = {"cond_or_uncond": [1, 0], "patches": {"output_block_patch": [None]}}
    halves = divide_call((torch.zeros(4, 1), torch.zeros(4)), {"transformer_options": options}, 4, 2)
    assert [kwargs["transformer_options"]["cond_or_uncond"] for _, kwargs in halves] == [[1], [0]]
    assert [len(args[0]) for args, _ in halves] == [2, 2]
    three = {"transformer_options": {"cond_or_uncond": [1, 0, 0]}}
    assert len(divide_call((torch.zeros(3, 1), torch.zeros(3)), three, 3, 2)) == 1


def test_patches_that_share_a_variable(sd15, prompts):
    from comfy_extras.nodes_hypertile import HyperTile

    tiled = small.node(HyperTile, sd15, 64, 2, 1, False)
    assert not torch.equal(sample(tiled, prompts), sample(sd15, prompts))
    assert_halved(tiled, lambda m: sample(m, prompts))


@pytest.mark.parametrize("why", ["cfg 1", "area", "mask's bounds", "range", "control net on one", "two prompts", "across items"])
def test_segments_where_there_is_nothing_to_halve(why, sd15, prompts):
    positive, negative = prompts
    model, cfg = sd15, 1.0 if why == "cfg 1" else 7.0
    if why == "area":
        positive = nodes.ConditioningSetArea().append(positive, 64, 64, 0, 32, 1.0)[0]
    elif why == "mask's bounds":
        mask = torch.zeros(1, 16, 16)
        mask[:, 4:, 8:] = 1.0
        positive = nodes.ConditioningSetMask().append(positive, mask, "mask bounds", 0.8)[0]
    elif why == "range":
        positive = nodes.ConditioningSetTimestepRange().set_range(positive, 0.0, 0.5)[0]
    elif why == "control net on one":
        hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1))
        positive = nodes.ControlNetApply().apply_controlnet(positive, small.control_net(), hint, 0.9)[0]
    elif why == "two prompts":
        positive = positive + small.conditioning("sd15", 3)
    elif why == "across items":
        nodes_nag = pytest.importorskip("comfy_extras.nodes_nag", reason="this ComfyUI has no such node")
        model = small.node(nodes_nag.NAGuidance, sd15, 5.0, 0.5, 1.5)
    sample(attach(model, TWO), (positive, negative), cfg=cfg, steps=7)
    assert (last_run().plan.branches, last_run().plan.segments) == (1, 2) and not last_run().notes


def test_batches_that_cannot_be_divided_are_said_and_right(sd15, prompts):
    """Who asks for branches gets them."""
    options = Options("Custom", "cpu,cpu", branches=2)
    found = sample(attach(sd15, options), prompts, cfg=1.0)
    (note,) = last_run().notes
    assert "only the first of 2 branches computes" in note and {r.rank for r in last_run().stats.records} == {0}
    assert torch.equal(found, sample(sd15, prompts, cfg=1.0))


def test_guiders_with_more_or_fewer_prompts(sd15, prompts):
    positive, negative = prompts

    def guided(model, guide):
        sigmas = small.node(custom.BasicScheduler, model, "normal", 5, 1.0)
        noise, sampler = small.node(custom.RandomNoise, 5), small.node(custom.KSamplerSelect, "euler")
        return small.node(custom.SamplerCustomAdvanced, noise, guide(model), sampler, sigmas, small.latent())["samples"]

    cases = {
        (2, 1): lambda m: small.node(custom.CFGGuider, m, positive, negative, 5.0),
        (1, 2): lambda m: small.node(custom.BasicGuider, m, positive),
    }
    for shape, guide in cases.items():
        guided(attach(sd15, TWO), guide)
        assert (last_run().plan.branches, last_run().plan.segments) == shape
    three = small.node(
        custom.DualCFGGuider, attach(sd15, TWO), positive, small.conditioning("sd15", 3), negative, 5.0, 3.0, "regular"
    )
    guided(attach(sd15, TWO), lambda _: three)
    assert last_run().plan.branches == 1, "three prompts are not two halves"


def test_unequal_or_full_devices_get_segments(sd15, monkeypatch):
    plan, devices = TWO.resolve(items=2)
    room = room_for_weights(devices, 0, [sd15])
    assert cfg_branches.affordable([sd15], plan, devices, room)
    assert not cfg_branches.affordable([sd15], plan, devices, room_for_weights(devices, 1e15, [sd15])), "no room for the calls"
    assert not cfg_branches.affordable([sd15] * 10_000, plan, devices, room), "nor for so many ControlNets"
    kept = SimpleNamespace(offload_device=torch.device("cuda:1"), model_size=lambda: 2**60)
    assert [space < 0 for space in room_for_weights(devices, 0, [sd15])] == [False, False]
    monkeypatch.setattr("comfy.model_management.get_total_memory", lambda device: 2**50)
    assert [space < 0 for space in room_for_weights(["cpu", "cuda:1"], 0, [kept])] == [False, True], "the host's own stay there"
    monkeypatch.setattr(cfg_branches, "title", {"cpu": "RTX 4090", "cuda:1": "RTX 3060"}.get)
    assert not cfg_branches.affordable([sd15], plan, ("cpu", "cuda:1"), room)
