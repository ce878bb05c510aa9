"""A rank that fails costs no picture: others take over at the step that it was in, or ComfyUI goes on by itself."""

import os
import signal
import time

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch

from asyncdiff_nodes.engine import WorkerError
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.workers import pool
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import small
from helpers.failing import STEPS, killing, pids, sample
from helpers.sampling import EXACT, exact, segmented

ASYNCHRONOUS = segmented(warmup=1, forecast=False, cooldown=0)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_others_take_over_and_the_picture_is_the_same(sd15, prompts, rank):
    expected = sample(sd15, prompts)
    model = attach(sd15, EXACT)
    assert torch.equal(sample(model, prompts, killing(rank, 2)), expected)
    after = pids()
    (note,) = last_run().notes
    assert "was killed by signal 9" in note and "new worker processes have taken over" in note
    assert len(last_run().stats.calls) == STEPS - 3
    assert torch.equal(sample(model, prompts), expected)
    assert pids() == after and not last_run().notes


@pytest.mark.parametrize("step", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_an_asynchronous_run_goes_on_as_one_that_begins_at_that_step(prompts, step):
    """The reference is the sampler's own: begun with the latent that the undisturbed run had there."""
    sd15 = small.model("sd15", channels=64)  # in a narrower one a late step hardly differs
    model, began = attach(sd15, ASYNCHRONOUS), {}
    undisturbed = sample(model, prompts, began.__setitem__)
    first = step + 1
    latent = began[first] / sd15.model.latent_format.scale_factor
    expected = sample(model, prompts, latent=latent, start_step=first, force_full_denoise=True)
    result = sample(model, prompts, killing(0, step))
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (result - undisturbed).abs().max() > 1e-4 * expected.abs().max()  # or it would show nothing


@pytest.mark.parametrize("step", [pytest.param(None, marks=pytest.mark.slow), 2], ids=["start", "run"])
def test_comfyui_finishes_by_itself_if_the_user_prefers_that(sd15, prompts, step, monkeypatch):
    expected = sample(sd15, prompts)
    POOL.release()
    if step is None:
        monkeypatch.setattr(pool, "_START_TIMEOUT", 0.01)
    model = attach(sd15, exact(on_failure="finish"))
    result = sample(model, prompts, step and killing(1, step))
    assert torch.equal(result, expected)
    assert not POOL.summary() and not POOL._held
    assert not any(isinstance(loaded.model, pool.RankMemory) and loaded.model.loaded_size() for loaded in loaded_models())
    assert ("waited too long" if step is None else "killed by signal 9") in last_run().notes[0]
    monkeypatch.undo()
    assert torch.equal(sample(model, prompts), expected)
    assert not last_run().notes


def loaded_models():
    return comfy.model_management.current_loaded_models


def test_a_second_failure_is_left_to_comfyui(sd15, prompts):
    expected, victims = sample(sd15, prompts), []

    def at(step, _):
        if step in (1, 3):
            victims.append(pids()[0])
            os.kill(victims[-1], signal.SIGKILL)
            time.sleep(0.5)

    assert torch.equal(sample(attach(sd15, EXACT), prompts, at), expected)
    assert len(set(victims)) == 2
    first, second = last_run().notes
    assert "new worker processes have taken over" in first and "finishes the picture by itself" in second
    assert not POOL.summary()


def test_a_rank_that_died_between_prompts_is_replaced_without_a_word(sd15, prompts):
    expected, model = sample(sd15, prompts), attach(sd15, EXACT)
    sample(model, prompts)
    before = pids()
    os.kill(before[1], signal.SIGKILL)
    time.sleep(0.5)
    assert torch.equal(sample(model, prompts), expected)
    assert not last_run().notes and not set(pids()) & set(before)


def test_a_rank_that_hangs_is_replaced_when_its_deadline_is_over(sd15, prompts, monkeypatch):
    expected = sample(sd15, prompts)
    POOL.release()
    monkeypatch.setattr(pool, "_CALL_TIMEOUT", 3.0)
    begin = time.monotonic()
    assert torch.equal(sample(attach(sd15, EXACT), prompts, killing(1, 1, signal.SIGSTOP)), expected)
    assert time.monotonic() - begin < 60
    assert "waited too long for the result of call 3" in last_run().notes[0]
    POOL.release()


@pytest.mark.slow
def test_a_rank_that_hangs_when_the_picture_is_done_does_not_keep_it_waiting(sd15, prompts):
    expected, model = sample(sd15, prompts), attach(sd15, EXACT)
    POOL.release()
    begin = time.monotonic()
    assert torch.equal(sample(model, prompts, killing(0, STEPS - 1, signal.SIGSTOP)), expected)
    assert time.monotonic() - begin < 60
    assert "no report on this run: waited too long for the telemetry" in last_run().notes[0]
    assert not POOL.summary()
    assert torch.equal(sample(model, prompts), expected) and not last_run().notes


def test_a_rank_that_fails_whenever_it_starts_leaves_the_picture_to_comfyui(sd15, prompts, monkeypatch):
    expected = sample(sd15, prompts)
    POOL.release()
    starts = []

    def failing(*args, **kwargs):
        starts.append(1)
        raise WorkerError("rank 0 failed (OutOfMemoryError: CUDA out of memory)", 0)

    monkeypatch.setattr(pool, "WorkerGroup", failing)
    assert torch.equal(sample(attach(sd15, EXACT), prompts), expected)
    assert len(starts) == 2
    assert last_run().line.startswith("ComfyUI sampled as usual: rank 0 failed (OutOfMemoryError")


@pytest.mark.slow
def test_cancel_during_the_new_start_cancels(sd15, prompts):
    model = attach(sd15, EXACT)
    kill = killing(0, 1)

    def at(step, x):
        kill(step, x)
        if step == 1:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, prompts, at)
    assert torch.equal(sample(model, prompts), sample(sd15, prompts))
