"""Presets choose between calls in bands and working ahead, by what calls in bands took."""

import itertools

import pytest
import torch

from asyncdiff_nodes.engine import CallRecord
from asyncdiff_nodes.host.choices import ALWAYS, PRESETS
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers import user_files
from asyncdiff_nodes.host.workers.band_times import FILE, BandTimes
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import small
from helpers.denoisers import DENOISERS
from helpers.denoisers import sampled as denoised
from helpers.sampling import banded, ksampler, slow_in_bands

OPTIONS = Options(devices="cpu,cpu")


@pytest.fixture
def model():
    """One that nothing is known of."""
    user_files.path_of(FILE).unlink(missing_ok=True)
    return small.model("sd15")


def sample(model, options=OPTIONS, **how):
    return ksampler(attach(model, options), **{"steps": 8, "cfg": 1.0} | how)


def test_the_first_run_is_in_bands_and_nothing_is_stale_in_it(model, monkeypatch):
    monkeypatch.setattr(BandTimes, "_medians", lambda _: (1.0, 2.0))  # on a busy machine they may lose
    stock = ksampler(model, steps=8, cfg=1.0)
    assert (sample(model) - stock).abs().max() < 1e-4
    record = last_run()
    assert record.plan.warmup == ALWAYS and record.plan.bands == 2 and not record.notes
    assert all(each.banded for each in record.stats.records)
    assert record.stats.bytes_per_call == record.stats.planned_band_bytes


def test_what_was_measured_decides(model):
    sample(model)
    ((step, work),) = user_files.load(FILE).values()
    assert step > 0 and work > 0
    sample(model)
    record = last_run()
    assert ("in bands" if record.plan.warmup == ALWAYS else "working ahead") in record.choice
    assert "one device" in record.text()


def test_a_first_run_that_bands_slow_down_works_ahead_from_then_on(model, monkeypatch):
    monkeypatch.setattr(BandTimes, "_medians", lambda _: (2.0, 1.0))
    found, record = sample(model, steps=12), last_run()
    assert "took longer than one device" in record.text() and not record.notes
    begun = 12 - len(record.stats.calls)
    assert begun >= 3 and record.plan.warmup == 2 and any(not call.synchronous for call in record.stats.calls)
    # as if all calls until then had been its warm-up
    cooldown = PRESETS["Balanced"].cooldown
    longer = Options("Custom", "cpu,cpu", segments=2, warmup=begun + 2, cooldown=cooldown, bands=2)
    expected = sample(model, longer, steps=12)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def measured(model, step, work):
    """What is known after a run whose calls took so long."""
    plan, devices = OPTIONS.resolve(items=1, banding=True)
    times = BandTimes(model, plan, small.latent()["samples"].shape, devices)
    for call, rank in itertools.product(range(4), range(2)):
        times.add(CallRecord("s", call, rank, 0, True, 10.0 * call, 10.0 * call + step, work / 2, 0.0, 0, banded=True))
    times.finish()
    return user_files.load(FILE)[times.key]


def test_the_choice_stays_as_long_as_the_machine_is_the_same(model):
    """So that the same seed gives the same picture."""
    assert measured(model, 0.5, 1.0) == [0.5, 1.0]
    assert measured(model, 0.75, 1.0) == measured(model, 1.0, 2.0) == [0.5, 1.0]
    assert measured(model, 1.25, 1.0) == [1.25, 1.0]


@pytest.mark.parametrize(
    ("step", "sampler", "in_bands"),
    [
        (0.5, "euler", True),
        (0.9, "euler", False),
        (0.75, "euler", False),
        (0.75, "euler_ancestral", True),
        (3.0, "euler_ancestral", False),
    ],
)
def test_the_faster_of_the_two(model, step, sampler, in_bands):
    """With noise in every step, which nobody foresees, bands may take a quarter longer; in no case longer than one device."""
    plan, devices = OPTIONS.resolve(items=1, banding=True)
    key = BandTimes(model, plan, small.latent()["samples"].shape, devices).key
    user_files.save(FILE, {key: [step, 1.0]}, 10)
    sample(model, steps=12, sampler=sampler)
    assert (last_run().plan.warmup == ALWAYS) == in_bands
    asynchronous = [call for call in last_run().stats.calls if not call.synchronous]
    assert bool(asynchronous) != in_bands
    banded = {record.banded for record in last_run().stats.records if record.synchronous and not record.ahead}
    assert banded == {step < 1}, "or else one segment after the other, as fast as one device"


def test_bands_that_are_slower_than_one_device_are_not_chosen(model):
    plan, devices = OPTIONS.resolve(items=1, banding=True)
    key = BandTimes(model, plan, small.latent()["samples"].shape, devices).key
    user_files.save(FILE, {key: [1.01, 1.0]}, 10)
    sample(model, steps=6, sampler="euler_ancestral")
    record = last_run()
    assert record.choice.startswith("working ahead, about 5.") and "; in bands 6.06 s, one device 6.00 s" in record.choice
    assert record.plan.warmup < ALWAYS and not any(call.banded for call in record.stats.records)


def test_one_device_samples_what_it_samples_fastest(model, monkeypatch):
    plan, devices = OPTIONS.resolve(items=1, banding=True)
    key = BandTimes(model, plan, small.latent()["samples"].shape, devices).key
    user_files.save(FILE, {key: [3.0, 1.0]}, 10)
    stock = ksampler(model, steps=3, cfg=1.0)
    with monkeypatch.context() as later:
        for _ in range(2):
            assert torch.equal(sample(model, steps=3), stock)
            (note,) = last_run().notes
            assert note.startswith(
                "with these 3 calls nothing is faster than one device (working ahead, about 3.00 s; in bands 9"
            )
            later.setattr(POOL, "prepare", None)  # the second time it is known before ranks are asked for
    sample(model, steps=12)
    assert not last_run().notes and last_run().choice.startswith("working ahead, about ")


def test_why_a_model_has_no_bands_is_told():
    cascade = DENOISERS["cascade_c"]
    denoised(attach(cascade.model(), Options(devices="cpu,cpu", branches=1)), cascade, steps=8)
    record = last_run()
    assert record.plan.bands == 1 and record.choice in record.text() and not record.notes
    assert record.choice.startswith("working ahead, because StageC cannot be computed in bands (as a whole: ")
    denoised(attach(cascade.model(), banded(2, segments=2, branches=1)), cascade, steps=8)
    (note,) = last_run().notes
    assert note.startswith("bands=2 is not possible: StageC cannot be computed in bands")


def test_what_cannot_be_in_bands_works_ahead(model):
    from comfy_extras.nodes_freelunch import FreeU

    patched = small.node(FreeU, model, 1.1, 1.2, 0.9, 0.2)
    sample(patched)
    assert last_run().plan.bands == 1 and not last_run().choice and any(not call.synchronous for call in last_run().stats.calls)


def test_no_bands_if_the_user_wants_none(model):
    """Each rank then has its part of the network only."""
    sample(model, Options(devices="cpu,cpu", bands=1))
    assert last_run().plan.bands == 1 and any(not call.synchronous for call in last_run().stats.calls)
    held = [rank.weight_bytes for rank in last_run().stats.ranks]
    assert max(held) < sum(weight.nbytes for weight in model.model.diffusion_model.parameters())


def test_custom_bands(model):
    stock = ksampler(model, steps=8, cfg=1.0)
    assert (sample(model, Options("Custom", "cpu,cpu", bands=2)) - stock).abs().max() < 1e-4
    assert last_run().plan.segments == 1 and all(record.banded for record in last_run().stats.records)
    sample(model, Options("Custom", "cpu,cpu", segments=2, warmup=3, bands=2))
    assert {record.synchronous for record in last_run().stats.records if record.banded} == {True}
    assert any(not call.synchronous for call in last_run().stats.calls)


def test_exact_is_bit_by_bit(model):
    assert torch.equal(sample(model, Options("Exact", "cpu,cpu")), ksampler(model, steps=8, cfg=1.0))
    assert last_run().plan.bands == 1


def test_slow_links_work_ahead(model):
    options = Options(devices="cpu,cpu,cpu")
    slow_in_bands(model, options)
    ksampler(attach(model, options), steps=8)
    assert any(not call.synchronous for call in last_run().stats.calls)
