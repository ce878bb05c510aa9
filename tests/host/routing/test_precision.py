"""Long runs in half precision: finite, the same whichever processes compute them, and as near to KSampler's as in float32."""

import pytest
import torch

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import small
from helpers.sampling import EXACT, ksampler, segmented

STEPS = 100
ASYNCHRONOUS = segmented(forecast=False)  # plain reuse: what errors could build up in


def sample(model, prompts):
    return ksampler(model, prompts, steps=STEPS).float()


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_hundred_steps(dtype, prompts):
    full, half = small.model(seed=9), small.model(seed=9, dtype=dtype, compute=dtype)
    stock, routed = sample(half, prompts), attach(half, ASYNCHRONOUS)
    assert torch.equal(sample(attach(half, EXACT), prompts), stock)
    first = sample(routed, prompts)
    POOL.release()
    assert torch.equal(sample(routed, prompts), first) and not last_run().notes
    reference = sample(full, prompts)
    rounding, staleness = distance(stock, reference), distance(sample(attach(full, ASYNCHRONOUS), prompts), reference)
    assert min(rounding, staleness) > 0
    assert distance(first, stock) < 2 * (rounding + staleness), (rounding, staleness)
