"""ControlNets that the ranks compute with the network: exact where calls are synchronous, the simulator's where they are not."""

import gc
from dataclasses import replace

import comfy.controlnet
import comfy.model_management
import comfy.sample
import comfy.sd
import nodes
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy.t2i_adapter import adapter
from comfy_extras import nodes_model_advanced

from asyncdiff_nodes.engine import PlanError
from asyncdiff_nodes.engine.planning.placement import place
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers.memory import RankMemory
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import checkpoints, small
from helpers.controlling import AHEAD, assert_exact, assert_simulated, controlled, pids, shared
from helpers.sampling import EXACT, ksampler, prompts_for
from helpers.simulated import simulated


@pytest.fixture(scope="module", autouse=True)
def own_ranks():
    """Cuts are other ones with ControlNets: no group of these tests serves others."""
    yield
    POOL.release()


@pytest.mark.covers("controlnet")
@pytest.mark.parametrize("kind", ["sd15", *(pytest.param(k, marks=pytest.mark.slow) for k in ("sdxl", "sd2_v", "vega"))])
def test_synchronous_calls_are_the_hosts_bit_by_bit(kind):
    model, prompts = small.model(kind), prompts_for(kind)
    net = small.control_net(kind)
    plain = ksampler(model, prompts)
    assert not torch.equal(assert_exact(model, controlled(prompts, net), 1), plain)
    assert_exact(model, controlled(prompts, net, strength=0.4), 1, cfg=1.0, batch=2)
    assert_exact(model, controlled(prompts, net, start=0.3, end=0.8), 1, steps=6)
    comfy.model_management.unload_all_models()
    ksampler(attach(model, EXACT), controlled(prompts, net))
    assert {type(model) for model in comfy.model_management.loaded_models()} == {RankMemory}, "the host itself loads none of it"


# a small ControlNet's hint, which never changes, is half of the work: with named cuts, something is stale
CUTS = "input_blocks.1.0, output_blocks.1.0"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(replace(AHEAD[0], forecast=False, cuts=CUTS), marks=pytest.mark.slow),
        pytest.param(replace(AHEAD[0], cuts=CUTS), marks=pytest.mark.slow),
        replace(AHEAD[1], cuts="input_blocks.1.0, control_nets.0.input_blocks.1.0, output_blocks.1.0"),
        pytest.param(Options("Turbo", "cpu,cpu,cpu", bands=1, cuts=CUTS), marks=pytest.mark.slow),
    ],
    ids=["reuse", "2", "3", "turbo"],
)
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_asynchronous_calls_equal_the_simulator(options, count, sd15, prompts):
    nets = [small.control_net(seed=seed) for seed in range(3, 3 + count)]
    assert_simulated(sd15, prompts, options, *nets)


@pytest.mark.slow
def test_one_group_serves_samplings_with_and_without_other_nets_and_strengths(sd15, prompts):
    """As a workflow does that samples twice, or whose user tries things."""
    net, other = small.control_net(), small.control_net(seed=8)
    assert_exact(sd15, controlled(prompts, net), 1)
    ranks = pids()
    plain = assert_exact(sd15, prompts, 1)  # not called, but there
    assert_exact(sd15, controlled(prompts, net, strength=0.3), 1)
    first = assert_exact(sd15, controlled(prompts, other), 1)
    assert pids() == ranks
    del other
    gc.collect()
    assert torch.equal(assert_exact(sd15, prompts, 1), plain)
    assert torch.equal(assert_exact(sd15, controlled(prompts, small.control_net(seed=8)), 1), first)
    assert pids() == ranks
    model = comfy.sd.load_lora_for_models(sd15, None, small.lora(sd15), 0.8, 0)[0]
    assert not torch.equal(assert_exact(model, controlled(prompts, net), 1), first)
    assert pids() == ranks


@pytest.mark.slow
def test_files_that_the_host_loaded(tmp_path, prompts):
    """Half precision on disk; on a CPU the host computes in another, in network and net alike."""
    checkpoints.place_small(tmp_path)
    model = comfy.sd.load_checkpoint_guess_config(
        str(tmp_path / "checkpoints" / "v1-5-pruned-emaonly-fp16.safetensors"), output_vae=False, output_clip=False
    )[0]
    net = comfy.controlnet.load_controlnet(str(tmp_path / "controlnet" / "control_v11p_sd15_canny_fp16.safetensors"))
    assert_exact(model, controlled(prompts, net), 1)


@pytest.mark.slow
def test_another_model_does_not_get_the_cuts_of_a_network_with_nets(prompts):
    models = [small.model("sd15", seed=seed) for seed in (9, 10)]
    assert_exact(models[0], controlled(prompts, small.control_net()), 1)
    group = POOL._held[-1].group
    del models[0]
    gc.collect()
    assert_exact(models[0], prompts, 0)
    assert POOL._held[-1].group is not group


@pytest.mark.slow
def test_several_nets_in_a_chain(sd15, prompts):
    """Residuals are added up in the chain's order, whichever net the ranks got first; one may be there twice."""
    nets = [small.control_net(seed=seed) for seed in (3, 4, 5)]
    assert_exact(sd15, controlled(prompts, *nets[:2]), 2)
    ranks = pids()
    found = assert_exact(sd15, controlled(prompts, nets[1], nets[0]), 2)
    assert pids() == ranks
    assert not torch.equal(found, assert_exact(sd15, controlled(prompts, nets[0], nets[0]), 2))
    assert_exact(sd15, controlled(prompts, *nets), 3)
    # both for the prompt, the first of them for the negative one, too, which is then the same object
    positive, negative = controlled(prompts, nets[0])
    more = nodes.ControlNetApply().apply_controlnet(positive, nets[1], small.hint(seed=5), 0.7)[0]
    assert_exact(sd15, [more, negative], 3)
    # one of them for the prompt, another for the negative one
    assert_exact(sd15, [controlled(prompts, nets[0])[0], controlled(prompts, nets[1])[1]], 3)


@pytest.fixture
def deep(monkeypatch):
    """A small model with the levels of SD 1.5, which T2I-Adapters are made for."""
    levels = {"num_res_blocks": [2] * 4, "channel_mult": (1, 2, 4, 4), "transformer_depth": [1] * 6 + [0] * 2}
    for name, value in (levels | {"transformer_depth_output": [1] * 9 + [0] * 3}).items():
        monkeypatch.setitem(small.ALL["sd15"][3], name, value)
    return small.model("sd15")


@pytest.mark.slow
def test_what_the_host_computes_itself_comes_first(deep, prompts):
    """T2I-Adapters, whose features do not change from step to step."""
    network = adapter.Adapter(channels=[64, 128, 256, 256], nums_rb=2, cin=192, ksize=1, sk=True, use_conv=False, xl=False)
    small.randomise(network.eval(), 6)
    features = comfy.controlnet.T2IAdapter(network, 3, 8, "nearest-exact")
    net = small.control_net()
    alone = assert_exact(deep, controlled(prompts, features), 0)
    both = assert_exact(deep, controlled(prompts, features, net), 1)
    assert not torch.equal(both, alone)
    assert not torch.equal(both, assert_exact(deep, controlled(prompts, net), 1))
    POOL.release()
    assert_exact(deep, controlled(prompts, net, features), 0)  # sums of floats depend on their order


@pytest.mark.slow
def test_a_union_of_several_types():
    """Which type it is to be is told it with each call; its layers are as wide as SDXL's."""
    model, prompts = small.model("sdxl", channels=320), prompts_for("sdxl")
    net = small.control_net("sdxl", channels=320, union=6)
    found = []
    for types in ([], [1], [4]):
        chosen = net.copy()
        chosen.set_extra_arg("control_type", types)
        found.append(assert_exact(model, controlled(prompts, chosen), 1, steps=2))
    assert not torch.equal(found[1], found[2])


@pytest.mark.covers("controlnet", kind="sd15_inpaint")
def test_an_inpainting_model_has_more_channels_than_its_nets():
    model, prompts = small.model("sd15_inpaint"), prompts_for()
    assert_exact(model, controlled(prompts, small.control_net()), 1)


def test_fresh_on_request(sd15, prompts):
    """The host computes them before each step, so that their residuals are what they should be where the network is stale."""
    POOL.release()
    given = controlled(prompts, small.control_net())
    options = replace(AHEAD[0], control_nets="fresh")
    found = ksampler(attach(sd15, options), given, steps=8, sampler="euler_ancestral")
    assert shared() == 0 and not last_run().notes
    oracle, simulator = simulated(sd15, options.resolve(items=2)[0], "euler_ancestral")
    with simulator:
        expected = ksampler(oracle, given, steps=8, sampler="euler_ancestral")
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert not torch.allclose(found, ksampler(sd15, given, steps=8, sampler="euler_ancestral"), rtol=1e-5)
    with pytest.raises(PlanError, match="control_nets='stale': choose one of shared, fresh"):
        replace(options, control_nets="stale").resolve()


def another_nodes_wrapper(model):
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    return clone


def function_wrapper(model):
    clone = model.clone()
    clone.set_model_unet_function_wrapper(lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
    return clone


def another_precision(model):
    return small.node(nodes_model_advanced.ModelComputeDtype, model, "bf16")


def fewer_bits(net):
    net.control_model.half()
    net.control_model.dtype = torch.float16


def other_layers(net):
    net.control_model.input_blocks[1].append(torch.nn.Identity())


@pytest.mark.parametrize(
    ("on_model", "on_net", "reason"),
    [
        (another_nodes_wrapper, None, "another node (cache) may change the inputs of the network"),
        pytest.param(function_wrapper, None, "another node wraps the model's function", marks=pytest.mark.slow),
        pytest.param(
            another_precision, None, "it computes in torch.float32, the model in torch.bfloat16", marks=pytest.mark.slow
        ),
        pytest.param(None, fewer_bits, "it computes in torch.float16, the model in torch.float32", marks=pytest.mark.slow),
        (None, other_layers, "has other layers than ComfyUI's configuration says: input_blocks.1.2"),
    ],
    ids=["wrapper", "function", "compute", "dtype", "layers"],
)
def test_what_cannot_be_shared_is_the_hosts_by_name(on_model, on_net, reason, sd15, prompts):
    net, model = small.control_net(), on_model(sd15) if on_model else sd15
    if on_net:
        on_net(net)
    given = controlled(prompts, net)
    expected = ksampler(model, given)
    comfy.model_management.unload_all_models()  # and what a sampling leaves changed on the model
    assert torch.equal(ksampler(attach(model, EXACT), given), expected)
    (note,) = last_run().notes
    assert reason in note and note.startswith("ComfyUI computes a ControlNet before each step: ") and last_run().stats.records


@pytest.mark.slow
def test_a_run_goes_on_without_its_ranks(sd15, prompts):
    """The host took their memory back: it then needs the ControlNet itself."""
    given = controlled(prompts, small.control_net())
    expected = ksampler(sd15, given)
    comfy.model_management.unload_all_models()
    latent = small.latent()["samples"]

    def take_back(step, *_):
        if step == 1:
            POOL.release()

    noise, model = comfy.sample.prepare_noise(latent, 5), attach(sd15, EXACT)
    found = comfy.sample.sample(model, noise, 4, 4.0, "euler", "normal", *given, latent, callback=take_back, seed=5)
    assert torch.equal(found, expected) and "took the ranks' memory back" in last_run().notes[0]
    assert_exact(sd15, given, 1)


@pytest.mark.slow
def test_the_hosts_objects_are_as_before(sd15, prompts):
    given = controlled(prompts, small.control_net())
    control = given[0][0][1]["control"]
    before = dict(vars(control))
    ksampler(attach(sd15, EXACT), given)
    assert vars(control).keys() == before.keys() and control.control_model is before["control_model"]


@pytest.mark.slow
def test_weights_of_a_net_that_is_gone_can_move(sd15, prompts):
    assert_exact(sd15, controlled(prompts, small.control_net()), 1)
    group = POOL._held[-1].group
    before = group.placement.cuts
    gc.collect()
    placement = place(group.placement.graph, group.plan, speeds=[1.0, 2.0])
    assert placement.cuts != before
    POOL.move(group, placement, sd15)
    assert_exact(sd15, prompts, 1)
    assert_exact(sd15, controlled(prompts, small.control_net(seed=7)), 1)
    assert POOL._held[-1].group is group


@pytest.mark.slow
def test_one_that_stops_in_mid_run(sd15, prompts):
    """The calls without it are streams of their own, which begin there."""
    given = controlled(prompts, small.control_net(), end=0.5)
    stock, found = ksampler(sd15, given, steps=10), ksampler(attach(sd15, AHEAD[0]), given, steps=10)
    assert shared() == 1 and not last_run().notes
    assert len({record.stream for record in last_run().stats.records}) == 2
    assert 0 < (found - stock).abs().max() < 1e-3 * stock.abs().max()
