"""Weights that change in place are noticed before the next sampling, and only they are sent."""

import random
import time

import comfy.model_management
import comfy.sd
import pytest
import torch

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.workers.sent_weights import Sent, Sources
from helpers import compositions, small
from helpers.sampling import EXACT, ksampler


@pytest.fixture(
    params=[(True, 32), pytest.param((False, 32), marks=pytest.mark.slow), pytest.param((False, 64), marks=pytest.mark.slow)],
    ids=["without a count", "with a count", "large"],
)
def model(request):
    """As the host makes them, without PyTorch's count of changes; with it; and one that is not looked at whole."""
    counted, channels = request.param
    with torch.inference_mode(counted):
        return small.model("sd15", seed=9, channels=channels)


@pytest.mark.parametrize("change", [each for each in compositions.WEIGHTS if each != "same"])
def test_a_change_in_place_is_noticed(model, change, caplog):
    before = ksampler(attach(model, EXACT))
    caplog.set_level("INFO")
    compositions.WEIGHTS[change](model.model.diffusion_model, random.Random(3))
    expected = ksampler(model)
    assert torch.equal(ksampler(attach(model, EXACT)), expected) and not torch.equal(before, expected)
    assert last_run().stats.records
    assert "sending 1 weights" in caplog.text
    caplog.clear()
    assert torch.equal(ksampler(attach(model, EXACT)), expected)
    assert "sending" not in caplog.text


def test_patches_that_change_in_place(model, caplog):
    state = small.lora(model)
    patched = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0)[0]
    before = ksampler(attach(patched, EXACT))
    name = next(name for name in state if name.endswith("lora_up.weight"))
    state[name].mul_(-2)
    comfy.model_management.unload_all_models()  # which the host would not do for it
    assert torch.equal(ksampler(attach(patched, EXACT)), ksampler(patched.clone()))
    assert not torch.equal(ksampler(attach(patched, EXACT)), before)


def test_patched_weights_that_change_while_the_host_has_them_loaded(model):
    patched = comfy.sd.load_lora_for_models(model, None, small.lora(model), 1.0, 0)[0]
    before = ksampler(patched)
    assert torch.equal(ksampler(attach(patched, EXACT)), before)
    name = next(iter(small.lora(model))).rpartition(".lora")[0].removeprefix("diffusion_model.") + ".weight"
    dict(model.model.diffusion_model.named_parameters())[name].data.mul_(-1)
    expected = ksampler(patched)
    assert torch.equal(ksampler(attach(patched, EXACT)), expected) and not torch.equal(before, expected)
    comfy.model_management.unload_all_models()  # which puts back what they are without patches
    assert torch.equal(ksampler(attach(patched, EXACT)), before)


def test_what_the_host_loads_and_unloads_is_not_sent_again(model, caplog):
    """Nor a LoRA that was read from its file once more."""
    patched = comfy.sd.load_lora_for_models(model, None, small.lora(model), 1.0, 0)[0]
    expected = ksampler(attach(patched, EXACT))
    caplog.set_level("INFO")
    assert torch.equal(ksampler(patched), expected)
    comfy.model_management.unload_all_models()
    again = comfy.sd.load_lora_for_models(model, None, small.lora(model), 1.0, 0)[0]
    assert torch.equal(ksampler(attach(again, EXACT)), expected)
    comfy.model_management.unload_all_models()
    assert torch.equal(ksampler(attach(again, EXACT)), expected)
    assert "AsyncDiff: sending" not in caplog.text


@pytest.mark.timing
def test_a_look_at_the_weights_of_sdxl_takes_milliseconds():
    """At as many weights, each of a hundredth of the size or whole."""
    model = small.model("sdxl", seed=9)
    net = model.model.diffusion_model
    for number in range(1200):
        net.register_buffer(f"more_{number}", torch.zeros(2**17))
    sent = Sent(Sources.of(model, []))
    sent.take(Sources.of(model, []))
    seconds = []
    for _ in range(7):
        begin = time.perf_counter()
        changed = sent.changed(Sources.of(model, []))
        seconds.append(time.perf_counter() - begin)
        assert changed == (set(), set())
    assert min(seconds) < 0.04
