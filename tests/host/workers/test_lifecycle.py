"""What becomes of the ranks: reuse, weight updates, cancel, memory; and that none is left behind."""

import functools
import gc
import itertools
import multiprocessing
import threading
import time

import comfy.model_management
import comfy.sd
import psutil
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.workers.pool import MAX_GROUPS, POOL
from helpers import small
from helpers.sampling import EXACT, exact, ksampler, segmented

sample = functools.partial(ksampler, steps=3, cfg=7.0)


@pytest.fixture(scope="module", autouse=True)
def no_ranks_left():
    """When the pool has released all groups, no process of theirs is left, whatever the tests did."""
    yield
    left = ranks()
    assert left
    POOL.release()
    assert not any(child.is_running() for child in left)


def ranks():
    """The processes that are ranks, of whichever group."""
    return [psutil.Process(child.pid) for child in multiprocessing.active_children()]


def pids():
    """Those of the group used last."""
    return set(POOL._held[-1].group.pids)


def with_lora(model, strength):
    return comfy.sd.load_lora_for_models(model, None, small.lora(model), strength, 0)[0]


def test_prompts_share_the_ranks_of_an_unchanged_model(sd15, prompts):
    sample(attach(sd15, EXACT), prompts)
    before = pids()
    sample(attach(sd15, EXACT), prompts)  # a new node execution of the same graph
    sample(attach(sd15, segmented()), prompts, steps=5)  # other warm-up
    sample(attach(sd15, EXACT), prompts, small.latent(2, 24, 16))  # other resolution and batch
    assert pids() == before and len(before) == 2


def test_a_lora_strength_changes_weights_not_processes(sd15, prompts, monkeypatch):
    sample(attach(sd15, EXACT), prompts)
    before, sent = pids(), []
    group = POOL._held[-1].group
    original = group.load_weights
    monkeypatch.setattr(group, "load_weights", lambda weights: original((sent.append(name) or (name, w)) for name, w in weights))
    for strength in (0.9, 0.2):
        changed = with_lora(sd15, strength)
        assert torch.equal(sample(attach(changed, EXACT), prompts), sample(changed, prompts))
    patched = {key.removeprefix("diffusion_model.") for key in changed.patches}
    assert set(sent) == patched and len(patched) < len(list(sd15.model.diffusion_model.parameters()))
    assert torch.equal(sample(attach(sd15, EXACT), prompts), sample(sd15, prompts))  # and off again
    assert pids() == before


def test_a_switched_checkpoint_reuses_the_processes_of_the_one_that_is_gone(prompts):
    first = small.model("sd15", seed=21)
    sample(attach(first, EXACT), prompts)
    before = pids()
    comfy.model_management.cleanup_models_gc()
    del first
    gc.collect()
    second = small.model("sd15", seed=22)
    assert torch.equal(sample(attach(second, EXACT), prompts), sample(second, prompts))
    assert pids() == before


@pytest.mark.slow
def test_two_models_in_one_graph_keep_a_group_each_and_a_third_replaces_the_oldest(sd15, prompts):
    kinds = ["sd15_inpaint", "sdxl"]
    models = {kind: small.model(kind) for kind in kinds}
    sample(attach(sd15, EXACT), prompts)
    first, oldest = pids(), POOL._held[-1].group
    for kind in kinds:
        assert torch.equal(sample(attach(models[kind], EXACT), kind=kind), sample(models[kind], kind=kind))
        assert len(POOL._held) <= MAX_GROUPS
    assert oldest.closed and pids() == first, "the third group has the processes of the oldest"
    assert {child.pid for child in ranks()} == {pid for held in POOL._held for pid in held.group.pids}, "and there are no others"


@pytest.mark.slow  # by default, test_server does it through the host's route
@pytest.mark.parametrize("way", ["unload_all_models", "free_memory"])
def test_the_hosts_unloading_ends_the_ranks(sd15, prompts, way):
    POOL.release()
    comfy.model_management.unload_all_models()
    expected = sample(attach(sd15, EXACT), prompts)
    processes = [psutil.Process(pid) for pid in pids()]
    tracked = [m.model.loaded_size() for m in comfy.model_management.current_loaded_models if "Rank" in type(m.model).__name__]
    weights = sum(p.nbytes for p in sd15.model.diffusion_model.parameters())
    assert weights <= sum(tracked) < 2 * weights  # what every rank holds is counted on each
    if way == "unload_all_models":
        comfy.model_management.unload_all_models()
    else:
        comfy.model_management.free_memory(1e30, torch.device("cpu"))
    assert not any(process.is_running() for process in processes)
    assert torch.equal(sample(attach(sd15, EXACT), prompts), expected)  # the next prompt starts new ones
    assert len([m for m in comfy.model_management.current_loaded_models if "Rank" in type(m.model).__name__]) == 2


def test_the_ranks_memory_taken_back_before_the_first_call(sd15, prompts):
    """A ControlNet may encode its picture there, for which the host ends the ranks; then it has done so."""
    calls = itertools.count()

    def take_back(executor, *args, **kwargs):
        if next(calls) == 0:
            comfy.model_management.free_memory(1e30, torch.device("cpu"))
        return executor(*args, **kwargs)

    model = attach(sd15, EXACT)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "test", take_back)
    assert torch.equal(sample(model, prompts), sample(sd15, prompts))
    (note,) = last_run().notes
    assert "before the first call; their weights were sent again" in note and last_run().stats.records


@pytest.mark.slow
def test_the_ranks_memory_taken_back_in_mid_run_costs_no_picture(sd15, prompts):
    """Another node may load a model of its own between two steps, and the host end the ranks for it."""
    import comfy.sample

    expected = sample(sd15, prompts)

    def take_back(step, *_):
        if step == 0:
            comfy.model_management.free_memory(1e30, torch.device("cpu"))

    latent = small.latent()["samples"]
    noise = comfy.sample.prepare_noise(latent, 5)
    model = attach(sd15, EXACT)
    found = comfy.sample.sample(model, noise, 3, 7.0, "euler", "normal", *prompts, latent, callback=take_back, seed=5)
    assert torch.equal(found, expected)
    assert "took the ranks' memory back" in last_run().notes[0]
    assert torch.equal(sample(model, prompts), expected) and not last_run().notes


def test_another_plan_for_the_same_model_takes_over_its_processes(sd15, prompts):
    POOL.release()  # that of a model that is gone would do, too
    expected = sample(sd15, prompts)
    sample(attach(sd15, EXACT), prompts)
    two = pids()
    assert torch.equal(sample(attach(sd15, exact(3, segments=3)), prompts), expected)
    three = pids()
    assert len(three) == 3 and set(two) < set(three)
    assert torch.equal(sample(attach(sd15, exact(segments=2)), prompts), expected)
    assert len(pids()) == 2 and set(pids()) < set(three)
    assert [psutil.pid_exists(pid) for pid in three].count(True) == 2


@pytest.mark.timing
@pytest.mark.parametrize("steps_before", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_cancel_answers_at_once_and_the_ranks_go_on(sd15, prompts, steps_before):
    """In the warm-up (3 steps) and after it; a large latent makes a step long."""
    model = attach(sd15, segmented())
    expected = sample(model, prompts, steps=8)
    before, began = pids(), time.monotonic()
    pressed = []

    def cancel():
        while last_steps[0] < steps_before:
            time.sleep(0.005)
        time.sleep(0.1)
        pressed.append(time.monotonic())
        comfy.model_management.interrupt_current_processing()

    last_steps = [0]
    import comfy.sample

    def note(step, *_):
        last_steps[0] = step + 1

    latent = small.latent(1, 40, 40)["samples"]
    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        comfy.sample.sample(model, latent, 50, 7.0, "euler", "normal", *prompts, latent, callback=note, seed=1)
    took = time.monotonic() - pressed[0]
    thread.join()
    assert took < 0.5, f"{took:.2f} s"
    assert time.monotonic() - began < 60
    assert torch.equal(sample(model, prompts, steps=8), expected)
    assert pids() == before


@pytest.mark.timing
def test_cancel_while_the_ranks_start(sd15, prompts, spawned):
    POOL.release()
    cancelled = []

    def cancel():
        while not ranks() and time.monotonic() < began + 30:  # from then on they import for a second or more
            time.sleep(0.02)
        cancelled.append(time.monotonic())
        comfy.model_management.interrupt_current_processing()

    began = time.monotonic()
    threading.Thread(target=cancel).start()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(attach(sd15, EXACT), prompts)
    assert time.monotonic() - cancelled[0] < 2.0
    assert not POOL._held
    assert sample(attach(sd15, EXACT), prompts).isfinite().all()


@pytest.mark.slow
def test_the_network_is_never_loaded_by_the_host(prompts):
    model = small.model("sd15", seed=31)
    sample(attach(model, EXACT), prompts)
    assert model.loaded_size() == 0
    assert not [m for m in comfy.model_management.current_loaded_models if m.model is model]
