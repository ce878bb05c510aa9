"""A model that fits no single card, for as long as an artist works with it."""

import functools

import comfy.model_management
import comfy.sd
import pytest
import sim
import torch
from comfy_execution.utils import CurrentNodeContext

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import small
from helpers.sampling import ksampler, prompts_for

THREE = Options("Exact", "mlu:0,mlu:1,mlu:2", segments=3, branches=1)
MIB = 2**20


def used_by(pids):
    """Bytes that these processes have of each card."""
    rows = [row[1:] for _, row in sim._ledger._rows() if row[0] in pids]
    return [sum(card) for card in zip(*rows, strict=True)]


@pytest.fixture
def prompt(monkeypatch):
    """While the host executes one. It asks for a dtype for VAEs what only CUDA's GPUs know."""
    monkeypatch.setattr(comfy.model_management, "vae_dtype", lambda *_: torch.float32)
    POOL.release()
    with CurrentNodeContext("prompt", "node"):
        yield
    POOL.release()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_samples_and_decodes_with_other_loras_and_models_in_between_and_nothing_grows(prompt):
    large, other, vae = small.model("sd15", seed=4, channels=736), small.model("sdxl", seed=5), small.vae()
    assert large.model_size() > sim.BUDGET
    lora = small.lora(large)
    sample = functools.partial(ksampler, prompts=prompts_for("sd15"), steps=2, cfg=1.0)

    def on_ranks(model):
        found = sample(attach(model, THREE))
        assert not last_run().notes and len(last_run().stats.ranks) == 3, last_run().text()
        return found

    found = on_ranks(large)
    group = POOL._held[-1].group
    pids = group.pids
    held = used_by(pids)
    assert all(0 < each < sim.BUDGET for each in held)
    pictures = [vae.decode(found)]
    for number in range(10):
        changed = comfy.sd.load_lora_for_models(large, None, lora, 0.1 * (number + 1), 0)[0]
        found = on_ranks(changed)
        now = used_by(pids)
        assert all(after - before < 8 * MIB for after, before in zip(now, held, strict=True)), (number, held, now)
        if number % 3 == 0:
            pictures.append(vae.decode(found))  # for which a rank gives its weights back
        if number == 4:  # of another kind, on the same cards
            ksampler(attach(other, Options("Exact", "mlu:0,mlu:1")), kind="sdxl", latent=small.latent(kind="sdxl"))
            assert not last_run().notes
    assert group.pids == pids and not group.closed
    assert all(picture.isfinite().all() for picture in pictures)
    found = on_ranks(large)
    POOL.release()  # ComfyUI alone, which offloads what its card has no room for, and rounds a LoRA otherwise then
    assert torch.equal(sample(large), found)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_comparison_is_made_beside_the_ranks_though_the_network_does_not_fit_there(prompt, monkeypatch):
    wide = {"hidden_size": 1792, "num_heads": 28, "axes_dim": [16, 24, 24]}
    monkeypatch.setitem(small.ALL, "flux", (*small.ALL["flux"][:3], {**small.ALL["flux"][3], **wide}))
    monkeypatch.setitem(small.TRANSFORMERS, "flux", small.ALL["flux"])
    model = small.model("flux", seed=4)
    options = Options("Exact", "mlu:0,mlu:1", segments=2, branches=1)
    found = ksampler(attach(model, options), kind="flux", latent=small.latent(kind="flux"), steps=2, cfg=1.0)
    ranks = last_run().stats.ranks
    assert model.model_size() + ranks[0].weight_bytes > sim.BUDGET > model.model_size() / 2
    assert not last_run().notes and last_run().verified == 2, last_run().text()
    POOL.release()
    assert torch.equal(ksampler(model, kind="flux", latent=small.latent(kind="flux"), steps=2, cfg=1.0), found)
