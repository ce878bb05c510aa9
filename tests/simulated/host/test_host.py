"""ComfyUI samples on a card, and ranks on it and on others: the same pictures, and everybody has the memory that is said."""

import functools
import itertools
import time

import comfy.model_management
import comfy.sd
import direct_links
import pytest
import sim
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import CurrentNodeContext
from torch import nn

from asyncdiff_nodes.host.choices import ALWAYS
from asyncdiff_nodes.host.page.progress import visible_devices
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers import pool
from asyncdiff_nodes.host.workers.memory import room_for_weights
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
    assert Options("Exact").resolve()[1] == ("mlu:1", "mlu:2", "mlu:0"), "the sampler works while the last segment rests"
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
    oracle, simulator = simulated(model, last_run().plan, "euler")
    with simulator:
        expected = run(oracle)
    assert (found - stock).abs().max() > 0 and (found - expected).abs().max() <= 1e-3 * (found - stock).abs().max()


def test_direct_links_that_hang_are_tried_once_and_the_report_says_so(model, sample, monkeypatch):
    POOL.release_idle()
    prepare = functools.partial(direct_links.prepare_beside, pool.HostSettings.current(), fault="hangs", trial_seconds=1)
    monkeypatch.setattr(pool.HostSettings, "current", lambda: prepare)
    stock = sample(model)
    note = (
        "mlu:0 and mlu:1 exchange values through the host's memory, which is slower: a direct link did not work (nothing arrived"
    )
    for _ in range(2):
        found = sample(attach(model, Options("Exact", "mlu:0,mlu:1")))
        assert torch.equal(found, stock) and note in last_run().line
        refusals = POOL._held[-1].group.refusals
        POOL.release()
    assert refusals == {}, "the second group did not try them"
    monkeypatch.setattr("asyncdiff_nodes.host.workers.links.setting", {"Links": "host memory"}.get)
    POOL.release_idle()  # Stop workers: try again
    assert torch.equal(sample(attach(model, Options("Exact", "mlu:0,mlu:1"))), stock)
    assert not last_run().notes and not POOL._held[-1].group.refusals
    POOL.release_idle()


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


@pytest.fixture
def large():
    """A model of 1 GiB on the host's card: with what the host reserves beside it, more than a card has free."""
    network = nn.utils.skip_init(nn.Linear, 2**14, 2**14, bias=False)
    return ModelPatcher(network, load_device=torch.device("mlu:0"), offload_device=torch.device("cpu"))


def test_the_hosts_need_for_memory_costs_copies_and_no_process(model, sample, large):
    POOL.release()
    stock, routed = sample(model), attach(model, Options("Exact", "mlu:0,mlu:1"))
    with CurrentNodeContext("prompt", "node"):  # as while the host executes a prompt
        sample(routed)
        group, (first, second) = POOL._held[-1].group, [memory.model_size() for memory in POOL._held[-1].memory]
        pids = group.pids
        for _ in range(3):
            comfy.model_management.load_models_gpu([large])
            assert of_ranks()[0] < 2**20 < first and of_ranks()[1] >= second, "only the host's card was short of memory"
            assert group.unloaded == {0: first} and POOL.summary()[0]["weights"] == second
            assert torch.equal(sample(routed), stock) and not last_run().notes
            assert of_ranks()[0] >= first and of_ranks()[1] >= second and POOL.summary()[0]["weights"] == first + second
        card, held = torch.device("mlu:0"), of_ranks()[0]
        comfy.model_management.free_memory(comfy.model_management.get_free_memory(card) + first // 3, card)
        assert first // 3 <= group.unloaded[0] < first / 2 and of_ranks()[0] <= held - first // 3, "no more than it lacks"
        assert torch.equal(sample(routed), stock) and not last_run().notes and of_ranks()[0] >= first
        assert POOL._held[-1].group.pids == pids
        comfy.model_management.load_models_gpu([large])
    comfy.model_management.unload_all_models()  # by the user
    assert of_ranks() == [0, 0, 0] and POOL.summary() == []


def test_memory_taken_in_mid_run_costs_no_picture_and_no_process(model, sample, large):
    stock, calls = sample(model), itertools.count()
    routed = attach(model, Options("Exact", "mlu:0,mlu:1"))

    def taken(call):
        """Have the host load something else before this call of the next sampling."""
        wanted = next(calls) + call

        def load(executor, *args, **kwargs):
            if next(calls) == wanted + 1:
                comfy.model_management.load_models_gpu([large])
            return executor(*args, **kwargs)

        changed = routed.clone()
        changed.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "test", load)
        return changed

    with CurrentNodeContext("prompt", "node"):
        sample(routed)
        pids = POOL._held[-1].group.pids
        for call, text in ((0, "before the first call; their weights were sent again"), (2, "it finishes the picture by itself")):
            assert torch.equal(sample(taken(call)), stock)
            assert [text in note for note in last_run().notes] == [True], last_run().notes
        assert torch.equal(sample(routed), stock) and not last_run().notes and POOL._held[-1].group.pids == pids


def test_a_card_that_is_full_is_named_and_not_tried_again_before_something_changes(model, sample, monkeypatch):
    POOL.release()
    stock = sample(model)
    free = sim.BUDGET - sim._ledger.used(2)
    taken = torch.empty(free - 2 * sim.CONTEXT_BYTES, dtype=torch.uint8, device="mlu:2")
    assert torch.equal(sample(attach(model, Options("Exact", "mlu:1,mlu:2"))), stock)
    assert any("mlu:2 is out of memory" in note for note in last_run().notes), last_run().notes
    with monkeypatch.context() as without_starts:  # the next prompt knows better than to try twice again
        without_starts.setattr(pool, "WorkerGroup", None)
        assert torch.equal(sample(attach(model, Options("Exact", "mlu:1,mlu:2"))), stock)
        (note,) = last_run().notes
        assert "failed twice in the same way" in note and "mlu:2 is out of memory" in note and "Stop workers" in note
    assert torch.equal(sample(attach(model, Options("Exact", "mlu:0,mlu:1"))), stock) and not last_run().notes
    assert POOL.release_idle() == 2
    sample(attach(model, Options("Exact", "mlu:1,mlu:2")))
    assert any("mlu:2 is out of memory" in note for note in last_run().notes), "Stop workers has it tried again"
    del taken
    assert torch.equal(sample(attach(model, Options("Exact", "mlu:1,mlu:2"))), stock) and not last_run().notes


# with bands, the whole network is on each card
@pytest.mark.parametrize("bands", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_card_that_others_use_too_gets_fewer_weights_and_keeps_them(bands, prompts):
    POOL.release_idle()
    wide, how = small.model("sd15", seed=4, channels=192), {"prompts": prompts, "steps": 4, "cfg": 1.0}
    options = Options("Custom", "mlu:1,mlu:2", segments=2, warmup=ALWAYS, branches=1, bands=bands)
    routed, stock = attach(wide, options), ksampler(wide, **how)

    def run(begins=""):
        found, record = ksampler(routed, **how), last_run()
        assert (found - stock).abs().max() <= (0 if bands == 1 else 1e-4) * stock.abs().max()
        assert [note.startswith(begins) for note in record.notes] == [True] * bool(begins), record.notes
        return [rank.weight_bytes for rank in record.stats.ranks], record

    torch.empty(1, device="mlu:2")  # this process has a context there, too
    (_, held), record = run()
    assert record.plan.bands == bands
    POOL.release()
    while of_ranks()[2]:  # processes that have ended are there for a moment
        time.sleep(0.05)
    taken = torch.empty(sim.BUDGET - sim._ledger.used(2) - sim.CONTEXT_BYTES - held * 9 // 10, dtype=torch.uint8, device="mlu:2")
    (_, fewer), record = run("rank 1 failed (torch.OutOfMemoryError: mlu:2 is out of memory")
    assert record.notes[0].endswith("; new worker processes have taken over, with fewer weights on mlu:2")
    pids = POOL._held[-1].group.pids
    assert fewer <= 0.75 * held and record.plan.bands == 1
    assert run()[0][1] == fewer and POOL._held[-1].group.pids == pids, "the next picture knows"
    assert POOL.release_idle() == 2
    del taken
    assert run()[0][1] == held, "Stop workers has it tried again"


def test_a_failure_in_each_of_two_prompts_is_remembered_unless_one_in_between_succeeds(model, sample):
    """As with on_failure = finish, where no other ranks take over."""
    POOL.release_idle()
    routed = attach(model, Options("Exact", "mlu:1,mlu:2", on_failure="finish"))

    def fill():
        while of_ranks()[2]:  # processes that have ended are there for a moment
            time.sleep(0.05)
        left = sim.CONTEXT_BYTES + 2**19  # for a rank, or for this process if it has none there yet
        return torch.empty(sim.BUDGET - sim._ledger.used(2) - left, dtype=torch.uint8, device="mlu:2")

    def run():
        sample(routed)
        return last_run().line

    taken = fill()
    assert "mlu:2 is out of memory" in run()
    del taken
    assert "out of memory" not in run()
    POOL.release()
    taken = fill()
    for _ in range(2):
        line = run()
        assert "mlu:2 is out of memory" in line and "failed twice" not in line
    assert "failed twice in the same way" in run()
    del taken
    assert "out of memory" not in run()


def test_models_that_the_host_keeps_on_a_card_take_room_from_its_ranks(large):
    """As with --highvram and --gpu-only."""
    devices = ["mlu:0", "mlu:0", "mlu:1"]
    free = room_for_weights(devices, 2**20, [large])
    large.offload_device = torch.device("mlu:0")
    first, second, other = room_for_weights(devices, 2**20, [large])
    assert first == second == free[0] - large.model_size() / 2 and other == free[2]
