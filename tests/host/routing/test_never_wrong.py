"""What the ranks compute is what the host would have computed, or the host computes it: other models, other code, gradients."""

import contextlib
from unittest.mock import patch

import comfy.ldm.flux.math
import comfy.lora
import comfy.model_management
import comfy.samplers
import comfy.sd
import nodes
import pytest
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock
from comfy_extras import nodes_custom_sampler as custom
from torch.overrides import TorchFunctionMode

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import compositions, small
from helpers.sampling import EXACT, ksampler, prompts_for


@pytest.fixture(scope="module")
def flux():
    with torch.inference_mode(False):
        return small.model("flux", seed=9)


def sampled(model, kind="flux", prompts=None, steps=4):
    return ksampler(model, prompts, kind=kind, steps=steps, cfg=1.0, scheduler="simple")


def by_host(text):
    """That the host computed it, or some of it, for a reason with these words."""
    return any(text in note for note in last_run().notes)


# -- whose network ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(custom, "DualModelGuider"), reason="this ComfyUI has no guider of two models")
@pytest.mark.parametrize("other", ["another", "another build", "with a LoRA"])
def test_a_second_model_is_the_hosts(sd15, prompts, other):
    second = {
        "another": lambda: small.model("sd15", seed=10),
        "another build": lambda: small.model("sd15", seed=10, channels=64),
        "with a LoRA": lambda: comfy.sd.load_lora_for_models(sd15, None, small.lora(sd15), 3.0, 0)[0],
    }[other]()

    def sample(model):
        guider = small.node(custom.DualModelGuider, model, prompts[0], 5.0, second, prompts[1])
        sigmas, sampler = small.node(custom.BasicScheduler, model, "normal", 4, 1.0), comfy.samplers.sampler_object("euler")
        noise = small.node(custom.RandomNoise, 5)
        return small.node(custom.SamplerCustomAdvanced, noise, guider, sampler, sigmas, small.latent())["samples"]

    expected = sample(sd15)
    assert torch.equal(sample(attach(sd15, EXACT)), expected)
    # the same network with other patches is, to the host itself, the one that it loaded last
    assert by_host("another model within this sampling") is (other != "with a LoRA")
    assert last_run().stats.records


@pytest.mark.skipif(not hasattr(custom, "DualModelGuider"), reason="this ComfyUI has no guider of two models")
def test_a_second_model_has_the_residuals_of_its_control_nets(sd15, prompts):
    """Which the ranks compute for the first one."""
    second, control = small.model("sd15", seed=10), small.control_net("sd15")
    controlled = nodes.ControlNetApplyAdvanced().apply_controlnet(*prompts, control, small.hint(), 1.0, 0.0, 1.0)

    def sample(model):
        guider = small.node(custom.DualModelGuider, model, controlled[0], 5.0, second, controlled[1])
        sigmas, sampler = small.node(custom.BasicScheduler, model, "normal", 4, 1.0), comfy.samplers.sampler_object("euler")
        noise = small.node(custom.RandomNoise, 5)
        return small.node(custom.SamplerCustomAdvanced, noise, guider, sampler, sigmas, small.latent())["samples"]

    expected = sample(sd15)
    assert torch.equal(sample(attach(sd15, EXACT)), expected)
    assert last_run().stats.records


def hooked_control(control):
    return control.control_model.input_blocks[0][0].register_forward_hook(lambda _, args, output: output * 1.5)


def test_code_on_a_control_net(prompts):
    network, control = small.model("sd15", channels=64), small.control_net("sd15", channels=64)  # ComfyUI knows this width
    controlled = nodes.ControlNetApplyAdvanced().apply_controlnet(*prompts, control, small.hint(), 1.0, 0.0, 1.0)

    def sample(model):
        return small.custom_sample(model, controlled, "euler")

    plain = sample(network)
    handle = hooked_control(control)
    expected = sample(network)
    assert torch.equal(sample(attach(network, EXACT)), expected) and not torch.equal(plain, expected)
    assert by_host("forward hook")
    handle.remove()
    assert torch.equal(sample(attach(network, EXACT)), plain) and not last_run().notes


def test_two_attached_models_each_have_ranks(sd15, prompts):
    """A sampler that samples another model within."""
    second = attach(small.model("sd15", seed=11), EXACT)

    def sample(model, within):
        used = []

        def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
            x = compositions.euler(model, x, sigmas[:2], extra_args)
            used.extend(POOL.summary())
            other = sampled(within, "sd15", steps=2)
            return compositions.euler(model, x, sigmas[1:], extra_args) + 0.01 * other.mean()

        return small.custom_sample(model, prompts, sampler)

    expected = sample(sd15, small.model("sd15", seed=11))
    assert torch.equal(sample(attach(sd15, EXACT), second), expected)
    assert last_run().stats.records and not last_run().notes
    assert len(POOL.summary()) == 2


def test_a_group_in_use_is_neither_taken_over_nor_ended(sd15, prompts):
    """Of three samplings within each other the last is the host's: two groups are all that there can be."""
    models = [attach(small.model("sd15", seed=seed), EXACT) for seed in (11, 12)]
    told = []

    def sampler_within(depth):
        def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
            x = compositions.euler(model, x, sigmas[:2], extra_args)
            if depth < len(models):
                run(models[depth], sampler_within(depth + 1))
                told.append(last_run())
            return compositions.euler(model, x, sigmas[1:], extra_args)

        return sampler

    def run(model, sampler):
        return small.custom_sample(model, prompts, sampler, steps=3)

    expected = run(sd15, compositions.euler)
    before = run(attach(sd15, EXACT), compositions.euler)
    assert torch.equal(run(attach(sd15, EXACT), sampler_within(0)), expected) and torch.equal(before, expected)
    assert last_run().stats.records and not last_run().notes
    assert "in use by the samplings" in told[0].notes[0] and told[1].stats.records


# -- code that was replaced ------------------------------------------------------------------------------------------


def louder(original):
    return lambda *args, **kwargs: original(*args, **kwargs) * 1.05


def louder_pair(original):
    return lambda *args, **kwargs: tuple(each * 1.05 for each in original(*args, **kwargs))


@contextlib.contextmanager
def hooked(module, pre=False):
    handle = (
        module.register_forward_pre_hook(lambda _, args: (args[0] * 1.05,))
        if pre
        else module.register_forward_hook(lambda _, args, output: output * 1.05)
    )
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def set_to(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def doubled(self, *args, **kwargs):
    return tuple(each * 1.05 for each in ORIGINAL(self, *args, **kwargs))


ORIGINAL = DoubleStreamBlock.forward
CHANGES = {
    "under a function of the network's modules": (
        lambda net: patch.object(comfy.ldm.flux.math, "apply_rope", louder_pair(comfy.ldm.flux.math.apply_rope)),
        "comfy.ldm.flux.math.apply_rope",
    ),
    "on the network": (lambda net: patch.object(net, "forward_orig", louder(net.forward_orig)), "forward_orig"),
    "on a layer": (lambda net: patch.object(net.img_in, "forward", louder(net.img_in.forward)), "img_in.forward"),
    "on a class": (
        lambda net: patch.object(DoubleStreamBlock, "forward", doubled),
        "DoubleStreamBlock.forward (test_never_wrong.doubled)",
    ),
    "under a function of PyTorch's": (
        lambda net: patch.object(torch.nn.functional, "linear", louder(torch.nn.functional.linear)),
        "torch.nn.functional.linear (test_never_wrong.louder)",
    ),
    "a hook": (lambda net: hooked(net.img_in), "img_in.forward hook test_never_wrong.hooked"),
    "a pre-hook": (lambda net: hooked(net.img_in, pre=True), "img_in.forward hook"),
    "a wrapped layer": (lambda net: set_to(net.time_in, "in_layer", torch.nn.Sequential(net.time_in.in_layer)), "other layers"),
    "a setting": (lambda net: set_to(net.double_blocks[1].img_norm1, "eps", 0.1), "double_blocks.1.img_norm1.eps"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_code_that_was_replaced_is_the_hosts_by_name(flux, change):
    replace, name = CHANGES[change]
    plain = sampled(flux)
    with replace(flux.model.diffusion_model):
        expected = sampled(flux)
        assert torch.equal(sampled(attach(flux, EXACT)), expected)
        assert by_host(name), last_run().notes
    assert torch.equal(sampled(attach(flux, EXACT)), plain)
    assert last_run().stats.records and not last_run().notes


@pytest.mark.parametrize("change", ["on the network", "on a layer", "on a class", "under a function of PyTorch's", "a hook"])
def test_code_that_is_replaced_for_some_calls(flux, change):
    """Only these are the host's."""
    replace, name = CHANGES[change]

    def changed(model):
        model, calls = model.clone(), [0]

        def wrapper(apply, given):
            calls[0] += 1
            with replace(flux.model.diffusion_model) if calls[0] % 2 else contextlib.nullcontext():
                return apply(given["input"], given["timestep"], **given["c"])

        model.set_model_unet_function_wrapper(wrapper)
        return model

    expected = sampled(changed(flux))
    assert torch.equal(sampled(attach(changed(flux), EXACT)), expected)
    assert by_host(name.removeprefix("img_in.forward ")) and last_run().stats.records


def test_a_network_without_a_hook_of_the_hosts_own():
    """SD 3's: ours takes the place of its ``forward`` for a while, which is no other's."""
    model = small.model("sd3", seed=9)
    expected = sampled(model, "sd3")
    assert torch.equal(sampled(attach(model, EXACT), "sd3"), expected)
    assert last_run().stats.records and not last_run().notes
    net = model.model.diffusion_model
    with patch.object(net, "forward", louder(net.forward)):
        expected = sampled(model, "sd3")
        assert torch.equal(sampled(attach(model, EXACT), "sd3"), expected)
        assert by_host("forward")


class _Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_who_watches_every_operation_sees_them(flux):
    def watched(model):
        model = model.clone()

        def wrapper(apply, given):
            with _Watching():
                return apply(given["input"], given["timestep"], **given["c"])

        model.set_model_unet_function_wrapper(wrapper)
        return model

    assert torch.equal(sampled(attach(watched(flux), EXACT)), sampled(flux))
    assert by_host("_Watching")


# -- gradients and interrupts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [EXACT, Options("Fast", "cpu,cpu")], ids=["exact", "fast"])
def test_gradients_are_the_hosts(options):
    def run(model):
        return small.custom_sample(model, prompts, compositions.guided).detach()

    with torch.inference_mode(False), torch.no_grad():
        model, prompts = small.model("sd15", seed=9), [small.conditioning("sd15", seed) for seed in (1, 2)]
        model.model.diffusion_model.requires_grad_(False)
        expected = run(model)
        assert torch.equal(run(attach(model, options)), expected)
    assert by_host("needs gradients of the network")


@pytest.mark.parametrize("options", [EXACT, Options("Fast", "cpu,cpu")], ids=["exact", "fast"])
def test_cancel_is_seen_between_quick_calls(flux, options):
    """Whatever the sampler's callback does: here there is none."""
    model, calls = attach(flux, options), []
    prompts = small.conditioning("flux", 1), small.conditioning("flux", 2)

    def counted(apply, given):
        calls.append(None)
        if len(calls) == 6:
            comfy.model_management.interrupt_current_processing(True)
        return apply(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(counted)
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 50)
    noise = torch.randn(1, 16, 16, 16)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, *prompts, noise * 0, disable_pbar=True, seed=1)
    assert len(calls) == 6
    assert sampled(attach(flux, options)).isfinite().all() and last_run().stats.records


# -- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(comfy.lora, "calculate_shape"), reason="this ComfyUI does not tell which patches do")
def test_a_widening_lora_costs_other_prompts_neither_routing_nor_ranks():
    model = small.model("flux", seed=9)
    wide, pids = compositions._widened(model), None
    (plain, negative), seen = prompts_for("flux"), torch.randn(1, 16, 16, 16)
    controlled = [[context, {**more, "concat_latent_image": seen}] for context, more in plain]
    expected = {id(model): sampled(model), id(wide): sampled(wide, prompts=(controlled, negative))}
    for each in (model, wide, model, wide, model):
        prompts = controlled if each is wide else plain, negative
        assert torch.equal(sampled(attach(each, EXACT), prompts=prompts), expected[id(each)])
        if each is wide:
            assert by_host("changes the shape of img_in.weight")
        else:
            assert last_run().stats.records and not last_run().notes
            now = [rank.pid for rank in last_run().stats.ranks]
            assert pids in (None, now)
            pids = now
