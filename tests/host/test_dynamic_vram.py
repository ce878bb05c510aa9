"""Models as the host loads them with dynamic VRAM, its default on NVIDIA cards: layers are built without weights.

What a card has to do with it (pages of video memory that come and go) is not here: on a CPU the host uses its older patcher.
"""

import checkpoints
import comfy.controlnet
import comfy.model_patcher
import comfy.sd
import pytest
from controlling import assert_exact, controlled
from safetensors.torch import load_file


@pytest.fixture
def tensors(tmp_path, monkeypatch):
    """Name of a file -> what is in it; from then on as after the host's main.py where a card can."""
    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    checkpoints.place_small(tmp_path)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    monkeypatch.setattr("comfy.memory_management.aimdo_enabled", True)
    # the older patcher computes in the precision of the file, where that is what was loaded
    return lambda name: {key: value.float() for key, value in load_file(tmp_path / f"{name}.safetensors").items()}


def test_files_that_the_host_loaded(tensors, prompts):
    weights = tensors("checkpoints/v1-5-pruned-emaonly-fp16")
    model = comfy.sd.load_state_dict_guess_config(weights, output_vae=False, output_clip=False)[0]
    assert_exact(model, prompts, 0)
    patched = comfy.sd.load_lora_for_models(model, None, tensors("loras/blindbox_v1_mix"), 0.7, 0)[0]
    net = comfy.controlnet.load_controlnet_state_dict(tensors("controlnet/control_v11p_sd15_canny_fp16"))
    assert_exact(patched, controlled(prompts, net), 1)
