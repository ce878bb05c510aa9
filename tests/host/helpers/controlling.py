"""Samplings under ControlNets, and what they are compared with."""

import nodes

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import sampling, small
from helpers.sampling import EXACT, ksampler, segmented
from helpers.simulated import simulated

AHEAD = [segmented(ranks, warmup=2) for ranks in (2, 3)]


def controlled(prompts, *nets, kind="sd15", strength=0.9, start=0.0, end=1.0, vae=None):
    """``prompts`` under these ControlNets, one after the other."""
    for seed, net in enumerate(nets, 1):
        prompts = nodes.ControlNetApplyAdvanced().apply_controlnet(
            *prompts, net, small.hint(kind, seed), strength, start, end, vae
        )
    return prompts


def shared():
    """How many ControlNets the ranks of the last run have."""
    names = {name for rank in last_run().stats.ranks for name in rank.weights}
    return len({name.split(".")[1] for name in names if name.startswith("control_nets.")})


def pids():
    return {rank.pid for rank in last_run().stats.ranks}


def assert_exact(model, prompts, nets, options=EXACT, **kwargs):
    """The ranks have so many ``nets``, and what they sample is the host's own."""
    found = sampling.assert_exact(model, lambda m: ksampler(m, prompts, **kwargs), options)
    assert shared() == nets, last_run().line
    return found


def assert_simulated(model, prompts, options, *nets, kind="sd15"):
    """What the ranks sample under ``nets`` with asynchronous calls is what the simulator does, and not what the host does."""
    given = controlled(prompts, *nets, kind=kind)

    def run(model):
        return ksampler(model, given, steps=8, sampler="euler_ancestral", kind=kind)

    POOL.release()  # a group of another test has the cuts of its own first call, such as one with a hint for one image
    stock, routed = run(model), run(attach(model, options))
    assert shared() == len(nets) and not last_run().notes
    plan = options.resolve(items=2)[0]
    assert last_run().plan == plan
    oracle, simulator = simulated(model, plan, "euler_ancestral", control=given[0][0][1]["control"])
    with simulator:
        expected = run(oracle)
    scale = stock.abs().max()
    assert (routed - expected).abs().max() <= 1e-6 * scale, "to rounding"
    assert (routed - stock).abs().max() > 1e-4 * scale, "or this test proves nothing"
