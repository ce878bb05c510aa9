"""Quantised files of the networks that people use most: read by the host's own loader, sampled on ranks."""

import json
from dataclasses import replace

import comfy.model_detection
import comfy.sd
import pytest
import torch
from safetensors.torch import save_file

from asyncdiff_nodes.engine.tensors import tensors_of
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from helpers.denoisers import DENOISERS, lora, sampled
from helpers.sampling import EXACT, assert_exact

QUANT = pytest.importorskip("comfy.quant_ops", reason="this ComfyUI has no layers for quantised files")
NETWORKS = ("minimax_h3", "qwen_image", "ltx2", "wan", "z_image", "krea2", "flux2")
_ROTATED = {"convrot_groupsize": 64}  # 256 in real files, whose layers are wider
# the host's name, and what else a layer says of its weight; in the last three, weights are rotated
FORMATS = {
    "float8_e4m3fn": ("float8_e4m3fn", {}),
    "int8_tensorwise": ("int8_tensorwise", {}),
    "nvfp4": ("nvfp4", {}),
    "mxfp8": ("mxfp8", {}),
    "int8_convrot": ("int8_tensorwise", {"convrot": True, **_ROTATED}),
    "convrot_w4a4": ("convrot_w4a4", _ROTATED),
    "asym_w4a8_int8": ("asym_w4a8_int8", _ROTATED),
}
FORMS = [form for form, (name, _) in FORMATS.items() if name in getattr(QUANT, "QUANT_ALGOS", {})]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """The MODEL of a file whose layers within blocks are quantised."""

    def loaded(name, form, seed=5, aligned=True):
        denoiser, path = denoiser_of(name), str(tmp_path / "model.safetensors")
        made = denoiser.model(seed, torch.bfloat16)
        with torch.inference_mode(False), torch.no_grad():
            save_file(quantised(made.model.diffusion_model, form), path)
        # the host knows a network from the sizes in its file; these are smaller than all that it knows
        config = denoiser.detected(made)
        monkeypatch.setattr(comfy.model_detection, "detect_unet_config", lambda *_, **__: dict(config))
        model = comfy.sd.load_diffusion_model(path)
        for weight in model.model.diffusion_model.parameters():
            if aligned and type(weight.data) is torch.Tensor and weight.data_ptr() % 64:
                weight.data = weight.data.clone()  # where the file lies in memory, a CPU rounds products otherwise
        return model

    return loaded


def denoiser_of(name):
    """The small network of this name, wide enough for weights that are rotated."""
    denoiser = DENOISERS[name]
    return replace(denoiser, unet={**denoiser.unet, "dim": 128}) if name == "wan" else denoiser


def quantised(network, form):
    """The network's weights as a file has them."""
    name, settings = FORMATS[form]
    tensors = {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}
    for layer, module in network.named_modules():
        inside = isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in layer.split("."))
        if inside and all(size % (64 if settings else 32) == 0 for size in module.weight.shape):
            how = {"scale": "recalculate"} if name.startswith("float8") else settings
            how = {**how, "per_channel": True} if "convrot" in how else how
            layout = QUANT.QUANT_ALGOS[name]["comfy_tensor_layout"]
            weight = QUANT.QuantizedTensor.from_float(tensors.pop(f"{layer}.weight").float(), layout, **how)
            tensors |= {key: value.contiguous() for key, value in weight.state_dict(f"{layer}.weight").items()}
            said = json.dumps({"format": name, **settings}).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    return tensors


FAST = {("minimax_h3", "int8_tensorwise"), ("ltx2", "float8_e4m3fn"), ("krea2", "nvfp4"), ("z_image", "mxfp8")}


def cases():
    """Every network in every form; by default a few."""
    for name in NETWORKS:
        for form in FORMS:
            yield pytest.param(name, form, marks=() if (name, form) in FAST else pytest.mark.slow)


@pytest.mark.parametrize("name, form", list(cases()))
def test_exact_and_sharded(load, name, form):
    model = load(name, form)
    kinds = {type(tensor).__name__ for _, tensor in tensors_of(model.model.diffusion_model)}
    assert "QuantizedTensor" in kinds, kinds
    assert_exact(model, lambda each: sampled(each, denoiser_of(name)))
    held = [sum(rank.weights.values()) for rank in last_run().stats.ranks]
    assert max(held) < sum(tensor.nbytes for _, tensor in tensors_of(model.model.diffusion_model))


def with_a_lora():
    """Every network in fp8, some in what rotates weights; by default one of them."""
    yield "minimax_h3", "float8_e4m3fn"
    for name in NETWORKS[1:]:
        yield pytest.param(name, "float8_e4m3fn", marks=pytest.mark.slow)
    for form in [form for form in FORMS if FORMATS[form][1]]:
        for name in ("minimax_h3", "qwen_image", "wan", "z_image"):
            yield pytest.param(name, form, marks=pytest.mark.slow)


@pytest.mark.parametrize("name, form", list(with_a_lora()))
def test_with_a_lora(load, name, form):
    model, denoiser = load(name, form), denoiser_of(name)
    changed = comfy.sd.load_lora_for_models(model, None, lora(model), 0.8, 0)[0]
    assert not torch.equal(assert_exact(changed, lambda each: sampled(each, denoiser)), sampled(model, denoiser))


def test_weights_that_lie_as_in_the_file_are_no_reason_to_distrust(load):
    """A CPU rounds their products otherwise than those of the ranks' copies, so two results are the same up to that."""
    model, denoiser = load("minimax_h3", "float8_e4m3fn", aligned=False), denoiser_of("minimax_h3")
    stock, found = sampled(model, denoiser), sampled(attach(model, EXACT), denoiser)
    assert not last_run().notes and last_run().verified == 2
    assert torch.allclose(found, stock, rtol=1e-4, atol=1e-5)
