"""What the host's KSampler makes of a model, and what ranks must make of it."""

import nodes
import torch

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers import user_files
from asyncdiff_nodes.host.workers.band_times import FILE, BandTimes
from helpers import small


def exact(ranks=2, **changed):
    return Options("Exact", ",".join(["cpu"] * ranks), **changed)


def segmented(ranks=2, **changed):
    return Options("Custom", ",".join(["cpu"] * ranks), **{"segments": ranks} | changed)


def slow_in_bands(model, options, kind="sd15"):
    """Have it known that calls in bands take ten times as long as on one device, as they do where links are that slow."""
    plan, devices = options.resolve(items=2, banding=True)
    key = BandTimes(model, plan, small.latent(kind=kind)["samples"].shape, devices).key
    user_files.save(FILE, user_files.load(FILE) | {key: [10.0, 1.0]}, 200)


def banded(ranks=2, **changed):
    return Options("Custom", ",".join(["cpu"] * ranks), **{"bands": ranks} | changed)


EXACT = exact()


def prompts_for(kind="sd15", **how):
    """Positive and negative CONDITIONING for a model of this kind."""
    return small.conditioning(kind, 1, **how), small.conditioning(kind, 2, **how)


def with_areas_and_masks(prompts):
    """The prompts of ``sd15``, and more on parts of the picture: the network is called with several sizes."""
    positive, negative = prompts
    area = nodes.ConditioningSetArea().append(small.conditioning("sd15", 3), 64, 64, 0, 32, 1.0)[0]
    mask = torch.zeros(1, 16, 16)
    mask[:, :, 8:] = 1.0
    masked = nodes.ConditioningSetMask().append(small.conditioning("sd15", 4, tokens=154), mask, "default", 0.8)[0]
    return positive + area + masked, negative


def ksampler(
    model, prompts=None, latent=None, *, kind="sd15", batch=1, steps=4, cfg=4.0, sampler="euler", scheduler="normal", denoise=1.0
):
    """The latent, [B, ...]. By default of a small LATENT, and of two CONDITIONINGs, for a model of this kind."""
    prompts, latent = prompts or prompts_for(kind), latent or small.latent(batch, kind=kind)
    return nodes.KSampler().sample(model, 5, steps, cfg, sampler, scheduler, *prompts, latent, denoise)[0]["samples"]


def assert_exact(model, sample, options=EXACT, routed=None):
    """``sample(model)`` is the same on the host and on ranks, bit for bit, and the ranks did compute it; returns it.

    Args:
        routed: what the ranks are asked for instead of ``model``.
    """
    expected = sample(model)
    found = sample(routed or attach(model, options))
    # no call fell back to the host, which would be exact whatever the ranks do
    assert last_run().stats and last_run().stats.records and not last_run().notes, last_run().text()
    assert expected.isfinite().all() and torch.equal(found, expected)
    return expected


def assert_near(model, sample, options, tolerance):
    """``sample(model)`` is the same on the host and on ranks up to rounding, and the ranks did compute it; returns the host's.

    Args:
        tolerance: relative to its largest number.
    """
    expected = sample(model)
    found = sample(attach(model, options))
    assert last_run().stats and last_run().stats.records and not last_run().notes, last_run().text()
    difference = (found - expected).abs().max() / expected.abs().max()
    assert expected.isfinite().all() and difference <= tolerance, f"{difference:.1e}"
    return expected
