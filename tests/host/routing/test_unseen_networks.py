"""Networks that nobody has listed, in a test's own module and in a pack's folder; and networks built to be wrong if split."""

import shutil
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.supported_models_base
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.workers import user_files
from helpers import packs, small, toys
from helpers.sampling import EXACT, assert_exact, exact, ksampler, segmented
from helpers.simulated import simulated


class Config(comfy.supported_models_base.BASE):
    latent_format = comfy.latent_formats.SD15


def model_of(network, seed=0):
    """A MODEL of this class of networks."""
    config = Config({"image_model": "toy"})
    config.set_inference_dtype(torch.float32, None)
    base = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.FLOW, unet_model=network)
    small.randomise(base.diffusion_model, seed)
    for weight in base.diffusion_model.parameters():
        weight.data *= 3
    return ModelPatcher(base.eval(), comfy.model_management.get_torch_device(), torch.device("cpu"))


def sampled(model, steps=6, cfg=3.0, tokens=(7, 7)):
    prompts = [
        [[torch.randn(1, n, 32, generator=torch.Generator().manual_seed(n + place)), {}]] for place, n in enumerate(tokens)
    ]
    return ksampler(model, prompts, steps=steps, cfg=cfg, scheduler="simple")


@pytest.mark.parametrize("network", [toys.Transformer, toys.UNet])
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_network_of_another_module_is_split(network, ranks):
    model = model_of(network)
    assert_exact(model, sampled, exact(ranks))
    assert "found automatically" in last_run().text() and len(last_run().placement) >= 6
    stock, found = sampled(model), sampled(attach(model, segmented(ranks, warmup=1)))
    oracle, simulator = simulated(model, last_run().plan, "euler")
    with simulator:
        expected = sampled(oracle)
    assert (found - stock).abs().max() > 0 and (found - expected).abs().max() <= 0.01 * (found - stock).abs().max()


def test_a_network_of_a_pack_is_split(tmp_path):
    """Its classes can be imported by no name; a rank loads them from the pack's file."""
    pack = tmp_path / "pack-of-networks"
    pack.mkdir()
    shutil.copy(toys.__file__, pack / "networks.py")
    Path(pack, "__init__.py").write_text("from .networks import Transformer\nNODE_CLASS_MAPPINGS = {'ToyNetwork': Transformer}\n")
    network = packs.loaded(pack)["ToyNetwork"]
    assert network is not toys.Transformer and not network.__module__.isidentifier()
    assert_exact(model_of(network), sampled)


REASONS = {
    toys.KeepsValues: "uses what the call before it has kept",
    toys.Counts: "each call changes calls",
    toys.Twice: "of its work in parts that run once per call",
    toys.ReadsValues: "depends on values",
    toys.Draws: "random numbers",
    toys.WritesToPrompt: "writes to the network's own inputs",
}


@pytest.mark.parametrize("network", REASONS)
def test_a_network_that_would_be_wrong_is_sampled_as_usual_and_says_why(network):
    model, same = model_of(network), model_of(network)
    assert torch.equal(sampled(attach(model, EXACT)), sampled(same))
    assert last_run().stats is None and REASONS[network] in last_run().notes[0]


@pytest.mark.parametrize("tokens", [(7, 9), (9, 7)], ids=["the negative prompt", "the prompt"])
def test_a_prompt_whose_calls_cannot_be_split_leaves_the_others_their_ranks(tokens):
    model = model_of(toys.ReadsLongPrompts)
    sampled(attach(model, EXACT), tokens=(7, 7))
    pids = [rank.pid for rank in last_run().stats.ranks]
    stock = sampled(model, tokens=tokens)
    assert torch.equal(sampled(attach(model, EXACT), tokens=tokens), stock)
    assert len(last_run().notes) == 1 and "depends on values" in last_run().notes[0]
    assert last_run().stats.records and [rank.pid for rank in last_run().stats.ranks] == pids


def test_a_closure_is_no_obstacle_where_a_rank_can_build_the_network():
    assert_exact(model_of(toys.HoldsClosure), sampled)


def test_what_nothing_shows_on_meta_is_found_by_comparing_two_calls(monkeypatch):
    model = model_of(toys.ReadsGlobal)
    monkeypatch.setattr(toys, "loudness", 1.1)
    stock = sampled(model)
    assert torch.equal(sampled(attach(model, EXACT)), stock)
    assert "differently from ComfyUI" in last_run().notes[0] and not user_files.load("checked")
    assert torch.equal(sampled(attach(model, EXACT)), stock)
    assert last_run().stats is None and "differently" in last_run().notes[0], "and it is remembered"


def test_the_comparison_is_made_once():
    model = model_of(toys.Transformer)
    sampled(attach(model, EXACT))
    assert last_run().verified == 2 and len(user_files.load("checked")) == 1 and len(user_files.load("found")) == 1
    sampled(attach(model, EXACT))
    assert last_run().verified == 0 and not last_run().notes


def test_a_setting_leaves_unlisted_networks_to_comfyui(monkeypatch):
    model = model_of(toys.Transformer)
    stock = sampled(model)
    from asyncdiff_nodes.host.workers import skeleton

    monkeypatch.setattr(skeleton, "setting", lambda name: "ComfyUI samples")
    assert torch.equal(sampled(attach(model, EXACT)), stock)
    assert "no block list for its Transformer, and Settings, AsyncDiff, Unlisted" in last_run().notes[0]
