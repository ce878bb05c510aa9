"""ControlNets of diffusion transformers that the ranks compute with the network, as test_control_nets.py shows it of UNets."""

from dataclasses import replace

import comfy.cldm.dit_embedder
import comfy.controlnet
import comfy.ldm.qwen_image.controlnet
import comfy.model_management
import comfy.ops
import comfy.sd
import pytest
import torch

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers.memory import RankMemory
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import small
from helpers.controlling import AHEAD, assert_exact, assert_simulated, controlled, pids, shared
from helpers.sampling import EXACT, exact, ksampler, prompts_for

KINDS = ("flux", "sd3", "qwen_image")
THREE = exact(3)


@pytest.fixture(scope="module", autouse=True)
def own_ranks():
    """No group of these tests serves others."""
    yield
    POOL.release()


def given(kind):
    """A model of this kind, and prompts for it."""
    return small.model(kind), prompts_for(kind)


def kinds(*fast):
    return [kind if kind in fast else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.mark.covers("controlnet")
@pytest.mark.parametrize("options", [EXACT, pytest.param(THREE, marks=pytest.mark.slow)], ids=["2", "3"])
@pytest.mark.parametrize("kind", KINDS)
def test_synchronous_calls_are_the_hosts_bit_by_bit(kind, options):
    model, prompts = given(kind)
    net = small.control_net(kind)
    plain = ksampler(model, prompts, kind=kind)
    found = assert_exact(model, controlled(prompts, net, kind=kind), 1, options, kind=kind)
    assert not torch.equal(found, plain)
    held = [rank.weights for rank in last_run().stats.ranks]
    assert max(sum(weights.values()) for weights in held) < model.model_size() + net.control_model_wrapped.model_size()
    assert len({frozenset(name for name in weights if name.startswith("control_nets.")) for weights in held}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds("flux"))
def test_strengths_ranges_and_batches(kind):
    model, prompts = given(kind)
    net = small.control_net(kind)
    assert_exact(model, controlled(prompts, net, kind=kind, strength=0.4), 1, kind=kind, cfg=1.0, batch=2)
    assert_exact(model, controlled(prompts, net, kind=kind, start=0.3, end=0.8), 1, kind=kind, steps=6)
    comfy.model_management.unload_all_models()
    ksampler(attach(model, EXACT), controlled(prompts, net, kind=kind), kind=kind)
    assert {type(model) for model in comfy.model_management.loaded_models()} == {RankMemory}, "the host itself loads none of it"


@pytest.mark.parametrize(
    ("count", "options"),
    [
        pytest.param(1, AHEAD[0], id="2"),
        pytest.param(1, AHEAD[1], id="3", marks=pytest.mark.slow),
        pytest.param(1, replace(AHEAD[0], forecast=False), id="reuse", marks=pytest.mark.slow),
        pytest.param(1, Options("Turbo", "cpu,cpu,cpu", bands=1), id="turbo", marks=pytest.mark.slow),
        pytest.param(2, AHEAD[0], id="two nets", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", kinds("flux"))
def test_asynchronous_calls_equal_the_simulator(kind, count, options):
    nets = [small.control_net(kind, seed=seed) for seed in range(3, 3 + count)]
    assert_simulated(*given(kind), options, *nets, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds("flux"))
def test_several_nets_in_a_chain(kind):
    """Residuals are added up in the chain's order, whichever net the ranks got first."""
    model, prompts = given(kind)
    nets = [small.control_net(kind, seed=seed) for seed in (3, 4)]
    assert_exact(model, controlled(prompts, *nets, kind=kind), 2, kind=kind)
    ranks = pids()
    assert_exact(model, controlled(prompts, *reversed(nets), kind=kind), 2, kind=kind)
    one = assert_exact(model, controlled(prompts, small.control_net(kind, seed=8), kind=kind), 2, kind=kind)
    assert pids() == ranks
    assert not torch.equal(one, assert_exact(model, prompts, 2, kind=kind))
    # one of them for the prompt, the other for the negative one
    both = [controlled(prompts, net, kind=kind)[at] for at, net in enumerate(nets)]
    assert_exact(model, both, 2, kind=kind)
    assert pids() == ranks


@pytest.mark.parametrize("kind", kinds("flux", "qwen_image"))
def test_one_that_stops_in_mid_run(kind):
    """The calls without it are streams of their own, which begin there."""
    model, prompts = given(kind)
    stopped = controlled(prompts, small.control_net(kind), kind=kind, end=0.5)
    stock = ksampler(model, stopped, steps=10, kind=kind)
    found = ksampler(attach(model, AHEAD[0]), stopped, steps=10, kind=kind)
    assert shared() == 1 and not last_run().notes
    assert len({record.stream for record in last_run().stats.records}) == 2
    assert 0 < (found - stock).abs().max() < 1e-2 * stock.abs().max()


@pytest.mark.slow
def test_a_union_that_reads_latents_and_a_mask():
    """The hint is encoded by the host, in the net's own latent format; which type it is to be is told it with each call."""
    model, prompts = given("flux")
    net, vae = small.control_net("flux", union=6), small.vae()
    found = []
    for types in ([], [1], [4]):
        chosen = net.copy()
        chosen.set_extra_arg("control_type", types)
        found.append(assert_exact(model, controlled(prompts, chosen, kind="flux", vae=vae), 1, steps=2, kind="flux"))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@pytest.mark.slow
def test_mistoline():
    """Which reads its hint, and makes residuals, by layers of its own."""
    model, prompts = given("flux")
    assert_exact(model, controlled(prompts, small.control_net("flux", mistoline=True), kind="flux"), 1, kind="flux")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_fewer_bits_and_a_lora(kind):
    """Network and net compute in float32, from weights in half the bits, each of its own kind."""
    model = small.model(kind, dtype=torch.bfloat16)
    model = comfy.sd.load_lora_for_models(model, None, small.lora(model), 0.8, 0)[0]
    prompts = prompts_for(kind)
    assert_exact(model, controlled(prompts, small.control_net(kind, dtype=torch.float16), kind=kind), 1, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_devices_halve_the_prompts_of_cfg(kind):
    """Each branch computes the ControlNet for its own half."""
    model, prompts = given(kind)
    routed = controlled(prompts, small.control_net(kind), kind=kind)
    found = ksampler(attach(model, Options("Balanced", "cpu,cpu")), routed, kind=kind)
    assert (last_run().plan.branches, last_run().plan.segments, shared()) == (2, 1, 1) and not last_run().notes
    stock = ksampler(model, routed, kind=kind)
    assert (found - stock).abs().max() < 1e-3 * stock.abs().max()


def assert_the_hosts(kind, net, reason):
    """ComfyUI computes ``net`` itself, for this reason, and the ranks the network."""
    model, prompts = given(kind)
    prompts = controlled(prompts, net, kind=kind)
    expected = ksampler(model, prompts, kind=kind)
    assert torch.equal(ksampler(attach(model, EXACT), prompts, kind=kind), expected)
    (note,) = last_run().notes
    assert reason in note and note.startswith("ComfyUI computes a ControlNet before each step: ")
    assert last_run().stats.records and shared() == 0


def fewer_bits(net):
    net.control_model.bfloat16()
    net.control_model.dtype = torch.bfloat16


def other_layers(net):
    blocks = net.control_model.controlnet_blocks
    blocks[0] = torch.nn.Sequential(blocks[0], torch.nn.Identity())


def another_packs_class(net):
    class Variant(type(net.control_model)):
        pass

    net.control_model.__class__ = Variant


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (fewer_bits, "it computes in torch.bfloat16, the model in torch.float32"),
        (other_layers, "has other layers than ComfyUI's configuration says: controlnet_blocks.0"),
        (another_packs_class, "there is no block list for its Variant with this Flux"),
    ],
    ids=["dtype", "layers", "class"],
)
def test_what_cannot_be_shared_is_the_hosts_by_name(change, reason):
    net = small.control_net("flux")
    change(net)
    assert_the_hosts("flux", net, reason)


def test_those_of_stable_diffusion_3_5_are_the_hosts_by_name():
    """They take weights of the network when a sampling begins."""
    config = small.unet_config("sd3")
    network = comfy.cldm.dit_embedder.ControlNetEmbedder(
        img_size=None, patch_size=2, in_chans=16, attention_head_dim=64, num_attention_heads=4, num_layers=2, main_model_double=4,
        adm_in_channels=config["adm_in_channels"], double_y_emb=False, device="cpu", dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    small.randomise(network, 3)
    net = comfy.controlnet.ControlNetSD35(network.eval(), compression_ratio=1)
    assert_the_hosts("sd3", net, "a ControlNetSD35 does more than run a network")


@pytest.mark.skipif(not hasattr(comfy.controlnet, "QwenFunControlNet"), reason="this ComfyUI has none of these")
def test_fun_ones_of_qwen_image_are_sampled_as_usual():
    """They call layers of the network, which the host has to load for that."""
    model, prompts = given("qwen_image")
    network = comfy.ldm.qwen_image.controlnet.QwenImageFunControlNetModel(
        control_in_features=64, inner_dim=64, num_attention_heads=2, attention_head_dim=32, device="cpu", dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    small.randomise(network, 3)
    net = comfy.controlnet.QwenFunControlNet(network.eval(), compression_ratio=1, extra_conds=[])
    prompts = controlled(prompts, net, kind="qwen_image")
    expected = ksampler(model, prompts, kind="qwen_image")
    assert torch.equal(ksampler(attach(model, EXACT), prompts, kind="qwen_image"), expected)
    assert last_run().notes == ("a QwenFunControlNet uses weights of the network, so ComfyUI has to load the whole network",)
    assert last_run().stats is None
