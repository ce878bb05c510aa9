"""Calls that the host computes as well: they agree, or the model is the host's from then on, with a report."""

import functools
from dataclasses import replace

import comfy.sd
import pytest
import torch

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers import pool
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import small
from helpers.sampling import exact, ksampler, segmented

sample = functools.partial(ksampler, steps=8)


@pytest.fixture
def model():
    """One of its own: what was compared is kept with it. And its own ranks, whose cuts are not those of another test."""
    POOL.release()
    return small.model("sd15", seed=9, channels=32)


def verified(model, options, **how):
    """The latent, and how many calls were compared."""
    return sample(attach(model, options), **how), last_run().verified


@pytest.mark.parametrize(
    "options",
    [pytest.param(exact(verify="first"), marks=pytest.mark.slow), segmented(warmup=2, verify="first")],
)
@pytest.mark.parametrize("sampler", [pytest.param("euler", marks=pytest.mark.slow), "dpmpp_2m_sde"])
def test_a_call_of_each_kind_of_the_first_picture(model, options, sampler):
    expected = sample(attach(model, replace(options, verify="off")), sampler=sampler)
    assert last_run().verified == 0
    counts = []
    for how in ({}, {}, {"latent": small.latent(height=24)}, {"cfg": 1.0}, {}):
        found, count = verified(model, options, sampler=sampler, **how)
        counts.append(count)
        assert how or torch.equal(found, expected)
        assert not last_run().notes
    assert counts == [1, 0, 1, 1, 0]
    patched = comfy.sd.load_lora_for_models(model, None, small.lora(model), 1.0, 0)[0]
    assert verified(patched, options)[1] == 1
    assert "Verified: ComfyUI computed 1 call" in last_run().text()


def test_always(model):
    assert [verified(model, exact(verify="always"))[1] for _ in range(2)] == [1, 1]


def test_by_default_where_something_of_others_hangs_on_the_model(model):
    assert verified(model, exact(verify="auto"))[1] == 0
    wrapped = model.clone()
    wrapped.set_model_unet_function_wrapper(lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
    assert [verified(wrapped, exact(verify="auto"))[1] for _ in range(2)] == [1, 0]
    assert torch.equal(sample(attach(wrapped, exact(verify="auto"))), sample(wrapped))


@pytest.mark.parametrize("preset", ["Exact", "Fast"])
def test_a_difference_ends_the_routing_of_the_model(model, preset, monkeypatch, caplog):
    """Here the ranks are not sent a weight that has changed, as if nobody had noticed."""
    options = Options(preset, "cpu,cpu", verify="always")
    sample(attach(model, options))
    monkeypatch.setattr(pool.Sent, "changed", lambda *_: (set(), set()))
    next(iter(model.model.diffusion_model.parameters())).data.mul_(-3)
    expected = sample(model)
    assert torch.equal(sample(attach(model, options)), expected)
    record = last_run()
    assert "differently from ComfyUI" in record.line and "\n" not in record.line
    for told in (
        "relative difference",
        "ComfyUI 0.",
        "PyTorch",
        "cpu, cpu",
        "latent: torch.float32 [2, 4, 16, 16]",
        "please report",
    ):
        assert told in record.text() and told in caplog.text
    assert torch.equal(sample(attach(model, options)), expected)
    assert last_run().stats is None and "differently from ComfyUI" in last_run().notes[0]
    other = small.model("sd15", seed=10, channels=32)
    assert verified(other, exact(verify="off"))[1] == 0 and last_run().stats.records


def test_the_hosts_network_is_unloaded_again_and_random_numbers_are_as_before(model):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    found, count = verified(model, exact(verify="first"), sampler="euler_ancestral")
    assert count == 1
    assert not any(getattr(each.model, "model", None) is model.model for each in comfy.model_management.current_loaded_models)
    assert torch.equal(found, sample(model, sampler="euler_ancestral"))


def test_without_room_nothing_is_compared_and_the_user_is_told(model, monkeypatch):
    expected = sample(model)
    monkeypatch.setattr(type(model), "model_size", lambda _: 2**60)  # more than any machine has
    assert torch.equal(sample(attach(model, exact(verify="first"))), expected)
    assert last_run().verified == 0 and "no room for ComfyUI's own network" in last_run().notes[0]
