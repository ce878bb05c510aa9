"""ComfyUI samples on a card, and ranks on it and on others: the same pictures, and everybody has the memory that is said."""

import functools

import comfy.model_management
import comfy.sd
import pytest
import sim
import torch

from asyncdiff_nodes.host.page.progress import visible_devices
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import small
from helpers.sampling import ksampler, prompts_for
from helpers.simulated import simulated

CARDS = ["mlu:0", "mlu:1", "mlu:2"]


@pytest.fixture(scope="module")
def prompts():
    return prompts_for("sd15")


@pytest.fixture(scope="module")
def model():
    return small.model("sd15", seed=4)


@pytest.fixture(scope="module")
def sample(prompts):
    return functools.partial(ksampler, prompts=prompts, steps=4)


def of_ranks():
    """Bytes that ranks have of each card, without contexts."""
    used = [sim._ledger.used(device, by_others=True) for device in range(sim.COUNT)]
    return [max(0, each - sim.CONTEXT_BYTES) for each in used]


def test_the_host_uses_the_first_card_and_auto_all_of_them():
    assert comfy.model_management.get_torch_device() == torch.device("mlu:0")
    assert [str(device) for device in comfy.model_management.get_all_torch_devices()] == CARDS
    assert Options("Exact").resolve()[1] == tuple(CARDS)
    assert [(each["device"], each["title"], each["total"]) for each in visible_devices()] == [
        (device, f"Simulated {device[-1]}", sim.BUDGET) for device in CARDS
    ]


@pytest.mark.parametrize("devices", ["mlu:0,mlu:1", "mlu:1,mlu:2", "mlu:0,mlu:0", "mlu:0,cpu"])
def test_exact_is_the_stock_sampler(devices, model, sample):
    stock = sample(model)
    found = sample(attach(model, Options("Exact", devices)))
    assert not last_run().notes and {rank.device for rank in last_run().stats.ranks} == set(devices.split(","))
    assert torch.equal(stock, found)


@pytest.mark.parametrize("kind", [pytest.param("sd15", marks=pytest.mark.slow), "flux"])
def test_asynchronous_steps_are_the_simulators(kind, request):
    model, cfg = small.model(kind, seed=4), 1.0 if kind == "flux" else 7.0
    run = functools.partial(ksampler, kind=kind, latent=small.latent(kind=kind), steps=8, cfg=cfg)
    options = Options("Custom", "mlu:0,mlu:1", segments=2, branches=1, warmup=2)
    stock, found = run(model), run(attach(model, options))
    assert not last_run().notes
    oracle, simulator = simulated(model, last_run().plan, "euler", small.latent(kind=kind)["samples"].shape[2:])
    with simulator:
        expected = run(oracle)
    assert (found - stock).abs().max() > 0 and (found - expected).abs().max() <= 1e-3 * (found - stock).abs().max()


def test_a_lora_changes_weights_and_no_process(model, sample):
    sample(attach(model, Options("Exact", "mlu:0,mlu:1")))
    pids = POOL._held[-1].group.pids
    for strength in (0.9, 0.2):
        changed = comfy.sd.load_lora_for_models(model, None, small.lora(model), strength, 0)[0]
        assert torch.equal(sample(attach(changed, Options("Exact", "mlu:0,mlu:1"))), sample(changed))
    assert POOL._held[-1].group.pids == pids


def test_memory_is_where_the_host_says_and_comes_back(model, sample):
    POOL.release()
    assert of_ranks() == [0, 0, 0]
    sample(attach(model, Options("Exact", "mlu:1,mlu:2")))
    sizes = [memory.loaded_size() for memory in POOL._held[-1].memory]
    assert of_ranks()[0] == 0 and all(size <= used < size + 2**20 for size, used in zip(sizes, of_ranks()[1:], strict=True))
    comfy.model_management.unload_all_models()
    assert of_ranks() == [0, 0, 0] and POOL.summary() == []
    assert sample(attach(model, Options("Exact", "mlu:1,mlu:2"))).isfinite().all()


def test_a_card_that_is_full_is_named_and_the_host_samples(model, sample):
    POOL.release()
    stock = sample(model)
    free = sim.BUDGET - sim._ledger.used(2)
    taken = torch.empty(free - 2 * sim.CONTEXT_BYTES, dtype=torch.uint8, device="mlu:2")
    assert torch.equal(sample(attach(model, Options("Exact", "mlu:1,mlu:2"))), stock)
    assert any("mlu:2 is out of memory" in note for note in last_run().notes), last_run().notes
    del taken
    assert torch.equal(sample(attach(model, Options("Exact", "mlu:1,mlu:2"))), stock) and not last_run().notes
