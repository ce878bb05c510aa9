"""Law 2 on the host: the asynchronous presets equal the engine's simulator, driven by the same sampler loop."""

import functools
from dataclasses import replace

import pytest
import torch

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from helpers import small
from helpers.sampling import ksampler, segmented
from helpers.simulated import simulated

TWICE = ("heun", "dpm_2", "dpmpp_sde")  # the network is called twice per step


PRESETS = {
    "balanced": Options(devices="cpu,cpu,cpu,cpu", bands=1),
    "turbo": Options("Turbo", "cpu,cpu,cpu", bands=1),
    "custom": segmented(warmup=2, forecast=False, time_shift=True),
}


def cases():
    """Every sampler with every preset; by default some of them, with each preset."""
    fast = {("balanced", "euler"), ("turbo", "euler_ancestral"), ("turbo", "heun"), ("custom", "dpmpp_2m")}
    for kind in ("sd15", "sdxl"):
        for preset in PRESETS:
            for sampler in ("euler", "dpmpp_2m", "euler_ancestral", *TWICE):
                marks = () if kind == "sd15" and (preset, sampler) in fast else pytest.mark.slow
                yield pytest.param(kind, preset, sampler, marks=marks, id=f"{kind}-{preset}-{sampler}")


@pytest.mark.parametrize(("kind", "preset", "sampler"), list(cases()))
def test_presets_equal_the_simulator(kind, preset, sampler):
    model, options = small.model(kind), PRESETS[preset]
    sample = functools.partial(ksampler, kind=kind, steps=8, sampler=sampler)
    stock = sample(model)
    routed = sample(attach(model, options))
    plan = options.resolve(items=2)[0]
    if sampler in TWICE:  # 8 steps are then 15 calls, or 16 where the last step is made of two as well
        assert plan.warmup * 15 / 8 <= last_run().plan.warmup <= plan.warmup * 2 + 1
        assert last_run().plan.warmup % plan.stride == 1 % plan.stride
        plan = replace(plan, warmup=last_run().plan.warmup)
    assert last_run().plan == plan and not last_run().notes
    oracle, simulator = simulated(model, plan, sampler)
    with simulator:
        expected = sample(oracle)
    assert (routed - expected).abs().max() <= 1e-5
    least = 3e-5 if plan.forecast and sampler not in ("euler_ancestral", "dpmpp_sde") else 1e-3
    assert (routed - stock).abs().max() > least  # asynchronous steps are not exact, if nearly so


def test_stride_falls_back_where_calls_are_not_foretold():
    """dpm_adaptive chooses its steps by what the model says."""
    model = attach(small.model("sd15"), Options("Turbo", "cpu,cpu,cpu", bands=1))
    assert ksampler(model, steps=6, sampler="dpm_adaptive").isfinite().all()
    assert last_run().plan.stride == 1 and "stride=2 is not possible" in last_run().notes[0]
    assert ksampler(model, steps=6).isfinite().all()
    assert last_run().plan.stride == 2 and not last_run().notes


def test_same_seed_same_picture():
    model = attach(small.model("sd15"), segmented())
    assert torch.equal(ksampler(model, steps=8), ksampler(model, steps=8))


@pytest.mark.parametrize("how", ["int8", pytest.param("half", marks=pytest.mark.slow)])
def test_compression_needs_no_other_workers_and_hardly_changes_the_picture(how):
    model, options, sample = small.model("sd15"), segmented(), functools.partial(ksampler, steps=8)
    whole, before = sample(attach(model, options)), last_run().stats
    fewer = replace(options, compression=how)
    found, record = sample(attach(model, fewer)), last_run()
    assert [rank.pid for rank in record.stats.ranks] == [rank.pid for rank in before.ranks]
    assert record.stats.planned_bytes < (0.6 if how == "half" else 0.35) * before.planned_bytes
    assert f"{how} between ranks" in record.text() and "per asynchronous call" in record.text()
    assert 1e-7 < (found - whole).abs().max() < 1e-4 * whole.abs().max()
    oracle, simulator = simulated(model, fewer.resolve(items=2)[0], "euler")
    with simulator:
        assert (found - sample(oracle)).abs().max() <= 1e-5
