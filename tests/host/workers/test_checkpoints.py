"""Models that the host's own loader detected from a file, and what starting their ranks costs the host in memory."""

import threading
import time
import traceback

import comfy.sd
import comfy.utils
import psutil
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import small
from helpers.sampling import EXACT, assert_exact, ksampler

# what the host looks at: 320 channels, the width of the context, linear or convolutional projections, the input channels
FILES = {
    "SD15": {"context_dim": 768, "num_heads": 8},
    "SD20": {"context_dim": 1024, "use_linear_in_transformer": True, "num_head_channels": 64},
    "SD15 inpaint": {"context_dim": 768, "num_heads": 8, "in_channels": 9},
}


def checkpoint(path, changes):
    config = {**small.unet_config("sd15"), "model_channels": 320, "channel_mult": (1,), "num_res_blocks": [1], **changes}
    config |= {"transformer_depth": [1], "transformer_depth_output": [1, 1]}
    network = UNetModel(**config, dtype=torch.float16)
    small.randomise(network, 5)
    with torch.inference_mode(False):
        weights = {f"model.diffusion_model.{name}": value.detach().clone() for name, value in network.state_dict().items()}
    save_file(weights, path)


@pytest.mark.slow  # by default, the shared workflows run with such a file
@pytest.mark.parametrize("name", FILES)
def test_detected_by_the_host(tmp_path, name):
    checkpoint(tmp_path / "model.safetensors", FILES[name])
    model = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"))
    assert type(model.model.model_config).__name__ == name.split()[0]
    kind = "sd2_v" if name == "SD20" else "sd15"
    assert_exact(model, lambda m: ksampler(m, kind=kind, steps=3, sampler="dpmpp_2m", scheduler="karras"))


def _damaged(weights, damage):
    """What a broken download, or another program, has made of a file; the names are drawn by position."""
    weights, names = dict(weights), list(weights)
    for kind, place in damage:
        name = names[place % len(names)]
        if name not in weights:
            continue
        value = weights.pop(name)
        if kind == "shorter":
            weights[name] = value[: max(1, len(value) // 2)].clone()
        elif kind == "turned":
            weights[name] = value.transpose(0, -1).contiguous()
        elif kind == "flat":
            weights[name] = value.reshape(-1).clone()
        elif kind == "nan":
            weights[name] = torch.full_like(value, float("nan"))
        elif kind == "renamed":
            weights[f"{name}.old"] = value
    return weights


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("models") / "whole.safetensors")
    checkpoint(path, FILES["SD15"])
    return comfy.utils.load_torch_file(path)


KINDS_OF_DAMAGE = st.sampled_from(["missing", "shorter", "turned", "flat", "nan", "renamed"])


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(KINDS_OF_DAMAGE, st.integers(0, 999)), min_size=1, max_size=3))
def test_a_damaged_file_is_what_the_host_makes_of_it(whole_file, tmp_path, damage):
    """Its loader's error; or its picture, bit for bit, from what memory holds in place of missing weights."""
    path = str(tmp_path / "damaged.safetensors")
    save_file(_damaged(whole_file, damage), path)
    try:
        model = comfy.sd.load_diffusion_model(path)
    except Exception as error:  # before there is a model that could be routed
        assert "asyncdiff" not in "".join(traceback.format_exception(error))
        return
    expected, found = ksampler(model, steps=2), ksampler(attach(model, EXACT), steps=2)
    assert torch.equal(found.nan_to_num(123.0), expected.nan_to_num(123.0))


def test_scaled_weights_are_refused_by_name_where_their_scales_are_the_layers_own(tmp_path):
    """As in a ComfyUI without layers of mixed precision; of others see ``test_quantised.py``."""
    if hasattr(comfy.utils, "detect_layer_quantization"):
        pytest.skip("this ComfyUI has layers of mixed precision")
    path = str(tmp_path / "model.safetensors")
    checkpoint(path, FILES["SD15"])
    weights = comfy.utils.load_torch_file(path)
    for name in [name for name in weights if ".to_" in name and name.endswith(".weight")]:
        weights[name] = (weights[name].float() * 1000).to(torch.float8_e4m3fn)
        weights[name.replace(".weight", ".scale_weight")] = torch.tensor(1e-3)
    weights["model.diffusion_model.scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(weights, path)
    model = comfy.sd.load_diffusion_model(path)
    stock = ksampler(model)
    assert torch.equal(ksampler(attach(model, EXACT)), stock) and stock.isfinite().all()
    assert "scaled_fp8_op.Linear" in last_run().notes[0]


def test_host_memory_stays_below_one_extra_copy(prompts):
    """While weights with a LoRA on them go to the ranks, the host holds no second copy of the model."""
    model = small.model("sd15", channels=256)
    size = sum(parameter.nbytes for parameter in model.model.diffusion_model.parameters())
    assert size > 150 * 2**20
    changed = comfy.sd.load_lora_for_models(model, None, small.lora(model), 0.5, 0)[0]
    balanced = Options("Custom", "cpu,cpu", warmup=99, forecast=False)  # at this size, fresh skips put most weights on one rank
    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss - before)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ksampler(attach(changed, balanced), prompts, small.latent(1, 8, 8), steps=1, cfg=1.0)
    finally:
        done.set()
        watcher.join()
    assert peak[0] < 0.6 * size, f"{peak[0] / size:.2f} of the model's size"
    group = POOL._held[-1].group
    held = [rank.weight_bytes for rank in group.stats().ranks]
    assert held == [group.placement.weight_bytes(segment) for segment in (0, 1)]
    assert all(part < 0.75 * size for part in held) and sum(held) < 1.1 * size, [f"{part / size:.2f}" for part in held]
