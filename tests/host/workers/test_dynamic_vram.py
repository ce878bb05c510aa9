"""Models with dynamic VRAM, ComfyUI's default on NVIDIA cards: layers are built without weights, and loaded when they are used.

On the CPU, where ComfyUI takes its older patcher, whose pictures must be had. What only a card has is not here: pages of video
memory that come and go, pinned memory, and LoRA applied there.
"""

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file

from asyncdiff_nodes.host import demo
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import checkpoints
from helpers.controlling import controlled, shared
from helpers.sampling import EXACT, ksampler

pytestmark = pytest.mark.skipif(
    not hasattr(comfy.model_patcher, "ModelPatcherDynamic"), reason="this ComfyUI has no dynamic VRAM"
)


class NoBuffer:
    """Of pinned memory."""

    size = 0

    def __init__(self, *_):
        pass

    def truncate(self, *_, **__):
        pass


@pytest.fixture
def dynamic(monkeypatch):
    """From its call on, as after ComfyUI's main.py where a card can."""

    def begin():
        kind = comfy.model_patcher.ModelPatcherDynamic
        monkeypatch.setattr("comfy_aimdo.host_buffer.HostBuffer", NoBuffer)
        monkeypatch.setattr(kind, "__new__", lambda cls, *_, **__: object.__new__(cls))
        monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", kind)
        monkeypatch.setattr("comfy.memory_management.aimdo_enabled", True)

    yield begin
    POOL.release()
    comfy.model_management.current_loaded_models.clear()  # the dynamic patcher does not unload from a CPU


def assert_same(samplings, model, expected):
    assert type(model) is comfy.model_patcher.ModelPatcherDynamic
    for sampling, picture in zip(samplings, expected, strict=True):
        assert torch.equal(sampling(EXACT), picture)
        assert last_run().stats.records and not last_run().notes, last_run().line


@pytest.mark.slow  # the demo model shows it fast
def test_files_that_the_host_loaded(tmp_path, prompts, dynamic):
    checkpoints.place_small(tmp_path)

    def tensors(name):
        return {key: value.float() for key, value in load_file(tmp_path / f"{name}.safetensors").items()}

    def loaded():
        """The model; samplings of it, with a LoRA, and with a ControlNet as well: by the host, or with options by ranks."""
        weights = tensors("checkpoints/v1-5-pruned-emaonly-fp16")
        model = comfy.sd.load_state_dict_guess_config(weights, output_vae=False, output_clip=False)[0]
        patched = comfy.sd.load_lora_for_models(model, None, tensors("loras/blindbox_v1_mix"), 0.7, 0)[0]
        net = comfy.controlnet.load_controlnet_state_dict(tensors("controlnet/control_v11p_sd15_canny_fp16"))
        given = (model, prompts), (patched, prompts), (patched, controlled(prompts, net))
        return model, [lambda options=None, m=m, c=c: ksampler(attach(m, options) if options else m, c) for m, c in given]

    expected = [sampling() for sampling in loaded()[1]]
    dynamic()
    model, samplings = loaded()
    assert_same(samplings, model, expected)
    assert shared() == 1
    assert torch.equal(samplings[0](), expected[0])  # the host has loaded it then
    assert_same(samplings, model, expected)


def test_the_demo_model(dynamic):
    prompts, latent = (demo.encode("red heart"), demo.encode("")), {"samples": torch.zeros(1, 3, 32, 32)}

    def draw(model):
        return ksampler(model, prompts, latent, steps=3, scheduler="simple")

    expected = draw(demo.load_model())
    dynamic()
    model = demo.load_model()
    assert_same([lambda options: draw(attach(model, options))], model, [expected])
