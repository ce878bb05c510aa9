"""What two branches must compute: what the host makes of each half of a batch by itself."""

import contextlib

import torch
from comfy.patcher_extension import WrappersMP

from asyncdiff_nodes.engine.batch import divide
from asyncdiff_nodes.host.attributes import replaced
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options

TWO = Options(devices="cpu,cpu")


def by_halves(model):
    """``model`` whose network is called for each half of a batch by itself, by the host."""

    def call(executor, x, timesteps, context=None, y=None, control=None, transformer_options=None, **extra):
        kwargs = {"context": context, "y": y, "control": control, "transformer_options": transformer_options, **extra}
        halves = divide((x, timesteps), kwargs, len(x), 2)
        chunks = transformer_options["cond_or_uncond"]
        if len(chunks) > 1:  # each half has its own prompts
            for (_, more), own in zip(halves, (chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :]), strict=True):
                more["transformer_options"]["cond_or_uncond"] = own
        return torch.cat([executor(*args, *more.values()) for args, more in halves])

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "halves", call)
    return clone


@contextlib.contextmanager
def halved_net(network):
    """``network`` of a ControlNet with a call for each half of a batch."""

    def call(x, **kwargs):
        found = [forward(**half) for _, half in divide((), {"x": x, **kwargs}, len(x), 2)]
        return {key: [torch.cat(residuals) for residuals in zip(*(each[key] for each in found), strict=True)] for key in found[0]}

    forward = network.forward
    with replaced(network, "forward", call):
        yield


def assert_halved(model, sample, halving=None):
    """Two ranks compute exactly what the host computes half by half."""
    found = sample(attach(model, TWO))
    record = last_run()
    assert (record.plan.branches, record.plan.segments) == (2, 1) and not record.notes
    assert {r.rank for r in record.stats.records} == {0, 1}
    assert "Plan: 2 branches of 1 segment, each with the whole network" in record.text()
    assert "Rank 1 on cpu: branch 2, segment 1" in record.text()
    with halving or contextlib.nullcontext():
        assert torch.equal(found, sample(by_halves(model)))
    stock = sample(model)
    assert (found - stock).abs().max() < 1e-3 * stock.abs().max(), "the same but for rounding"
