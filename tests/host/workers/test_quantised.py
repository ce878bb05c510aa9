"""Checkpoints with quantised weights, written to a file and read by the host's own loader: the ranks have them quantised, too."""

import json
import pickle
from dataclasses import replace

import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.wan.model import WanModel
from comfy_extras import nodes_model_advanced
from safetensors.torch import save_file
from torch.utils._pytree import tree_map

from asyncdiff_nodes.engine.planning.placement import Placement, place
from asyncdiff_nodes.engine.planning.trace import trace
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers import quantised
from asyncdiff_nodes.host.workers.found import family_of
from asyncdiff_nodes.host.workers.pool import POOL
from asyncdiff_nodes.host.workers.skeleton import fingerprint_of, skeleton_of
from helpers import sampling, small
from helpers.sampling import EXACT, ksampler, prompts_for
from helpers.simulated import loaded, simulated

if not hasattr(comfy.utils, "detect_layer_quantization"):
    pytest.skip("this ComfyUI has no layers of mixed precision", allow_module_level=True)

from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

FP8 = torch.float8_e4m3fn
# class, changes to the small one by which the host knows it (the width of heads or of the first layer), CFG, width of a prompt
_LEAST = {"model_channels": 320, "channel_mult": (1,), "num_res_blocks": [1], "num_heads": 8, "transformer_depth": [1]}
NETWORKS = {
    "flux": (Flux, {"hidden_size": 256, "axes_dim": [16, 56, 56], "mlp_ratio": 4.0}, 1.0, 64),
    "sd15": (UNetModel, {**_LEAST, "transformer_depth_output": [1, 1]}, 5.0, 768),
    "wan": (WanModel, {"dim": 256, "ffn_dim": 512, "freq_dim": 256, "text_dim": 4096}, 5.0, 4096),
}
_QUANTISED = ("double_blocks", "single_blocks", "input_blocks", "middle_block", "output_blocks", "blocks")


def layers(network):
    """Names of the linear layers that are quantised: not those of embeddings and of the output."""
    return [n for n, layer in network.named_modules() if isinstance(layer, torch.nn.Linear) and n.startswith(_QUANTISED)]


def plain(network, tensors):
    """Without any scale: the user chooses the type of weights in the loader."""


def scaled(network, tensors):
    """As files of 2025 are: a mark, and a scale for each layer."""
    tensors["scaled_fp8"] = torch.zeros(0, dtype=FP8)
    for name in layers(network):
        weight = tensors[f"{name}.weight"].float()
        scale = tensors[f"{name}.scale_weight"] = weight.abs().max() / torch.finfo(FP8).max
        tensors[f"{name}.weight"] = (weight / scale).to(FP8)


def by_layer(form, **settings):
    """As files of 2026 are: each layer says how it is quantised. These have one layer in eight in another format."""

    def quantise(network, tensors):
        for index, name in enumerate(layers(network)):
            own = form if index % 8 else "float8_e5m2"
            given = {"scale": "recalculate"} if own.startswith("float8") else {}
            weight = QuantizedTensor.from_float(
                tensors.pop(f"{name}.weight").float(), QUANT_ALGOS[own]["comfy_tensor_layout"], **given
            )
            tensors |= {key: tensor.contiguous() for key, tensor in weight.state_dict(f"{name}.weight").items()}
            said = json.dumps({"format": own, **settings}).encode()
            tensors[f"{name}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
            tensors[f"{name}.input_scale"] = torch.tensor(0.5 + index % 2)

    quantise.__name__ = form
    return quantise


def load(folder, kind, quantise, seed=5):
    """The MODEL of a file with random weights."""
    cls, changes, *_ = NETWORKS[kind]
    path = str(folder / "model.safetensors")
    with torch.inference_mode(False), torch.no_grad():
        config = small.unet_config(kind) | changes
        network = cls(**config, dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
        small.randomise(network, seed)
        tensors = {name: value.detach().clone() for name, value in network.state_dict().items()}
        quantise(network, tensors)
        save_file(tensors, path)
    return comfy.sd.load_diffusion_model(path, model_options={"dtype": FP8} if quantise is plain else {})


def sampled(model, kind, steps=4):
    *_, cfg, width = NETWORKS[kind]
    return ksampler(model, prompts_for(kind, width=width), kind=kind, steps=steps, cfg=cfg, scheduler="simple")


def assert_exact(model, kind, devices="cpu,cpu", steps=4):
    return sampling.assert_exact(model, lambda m: sampled(m, kind, steps), Options("Exact", devices))


def assert_as_small_as_loaded(model):
    """Of the last run: the ranks' weights are the model's, each as large, and no rank has all."""
    ranks = last_run().stats.ranks
    distinct = {name: size for rank in ranks for name, size in rank.weights.items()}
    loaded = model.model.diffusion_model.state_dict()
    assert sum(distinct.values()) == sum(weight.nbytes for name, weight in loaded.items() if not name.endswith("comfy_quant"))
    assert max(sum(rank.weights.values()) for rank in ranks) < 0.9 * sum(distinct.values())


def files():
    """Every network in every kind of file; by default two of them."""
    fast = ("flux", "scaled"), ("sd15", "float8_e4m3fn")
    for kind in NETWORKS:
        for quantise in (plain, scaled, by_layer("float8_e4m3fn")):
            marks = () if (kind, quantise.__name__) in fast else pytest.mark.slow
            yield pytest.param(kind, quantise, marks=marks, id=f"{kind}-{quantise.__name__}")


@pytest.mark.parametrize("kind, quantise", list(files()))
def test_fp8(tmp_path, kind, quantise):
    model = load(tmp_path, kind, quantise)
    assert_exact(model, kind)
    assert_as_small_as_loaded(model)
    held = [sum(rank.weights.values()) for rank in last_run().stats.ranks]
    group, memory = POOL._held[-1].group, POOL._held[-1].memory
    assert held == [group.placement.weight_bytes(d) for d in (0, 1)] == [rank.model_size() for rank in memory]


@pytest.mark.parametrize("kind, quantise", list(files()))
def test_in_bands(tmp_path, kind, quantise):
    """Each rank has all of the weights, as small as in the file."""
    model = load(tmp_path, kind, quantise)
    sampling.assert_near(model, lambda m: sampled(m, kind), sampling.banded(branches=1), 1e-4)
    loaded = model.model.diffusion_model.state_dict()
    whole = sum(weight.nbytes for name, weight in loaded.items() if not name.endswith("comfy_quant"))
    assert [rank.weight_bytes for rank in last_run().stats.ranks] == [whole, whole]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [pytest.param("sd15", marks=pytest.mark.slow), "flux"])
def test_asynchronous_steps_are_the_simulators(tmp_path, kind, ranks):
    model, devices = load(tmp_path, kind, scaled), ", ".join(["cpu"] * ranks)
    stock = assert_exact(model, kind, devices, steps=8)
    found = sampled(attach(model, Options("Custom", devices, segments=ranks, branches=1, warmup=3)), kind, 8)
    assert not last_run().notes and len(last_run().stats.ranks) == ranks
    oracle, simulator = simulated(model, last_run().plan, "euler")
    with simulator:
        expected = sampled(oracle, kind, 8)
    assert (found - stock).abs().max() > 0 and (found - expected).abs().max() <= 0.01 * (found - stock).abs().max()


# in nvfp4, a weight's scales are in two tensors, one of them in fp8; in the last two, weights are rotated
FORMATS = ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"]


def formats(*fast):
    """All that this ComfyUI knows; by default only ``fast`` ones."""
    return [form if form in fast else pytest.param(form, marks=pytest.mark.slow) for form in FORMATS if form in QUANT_ALGOS]


@pytest.mark.parametrize("form", ["scaled", *formats()])
def test_lora(tmp_path, form):
    """The host quantises what a LoRA changes again; the running ranks are sent that."""
    model = load(tmp_path, "flux", scaled if form == "scaled" else by_layer(form))
    without = assert_exact(model, "flux")
    pids = POOL._held[-1].group.pids
    for strength in (0.8, 0.3):
        changed = comfy.sd.load_lora_for_models(model, None, small.lora(model), strength, 0)[0]
        assert not torch.equal(assert_exact(changed, "flux"), without)
        assert POOL._held[-1].group.pids == pids
    assert torch.equal(assert_exact(model, "flux"), without)


@pytest.mark.parametrize("form", formats("nvfp4"))
def test_formats(tmp_path, form):
    model = load(tmp_path, "flux", by_layer(form))
    assert_exact(model, "flux", "cpu,cpu,cpu")
    assert_as_small_as_loaded(model)


def test_activations_that_a_quantised_layer_takes_in(tmp_path):
    """The host reads the weight beside the layer, and computes both in one, where that is in int8."""
    assert_exact(load(tmp_path, "wan", by_layer("int8_tensorwise")), "wan")


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["in the file", "by a node"])
def test_products_in_full_precision(tmp_path, chosen):
    settings = {"full_precision_matrix_mult": True} if chosen == "in the file" else {}
    model = load(tmp_path, "flux", by_layer("int8_tensorwise", **settings))
    if chosen == "by a node":
        model = small.node(nodes_model_advanced.ModelComputeDtype, model, "bf16")
    assert_exact(model, "flux")
    layer = skeleton_of(model).get_submodule("double_blocks.1.img_attn.qkv")
    assert layer.quant_format == "int8_tensorwise"
    assert layer._full_precision_mm == (chosen == "in the file")
    assert getattr(layer, "comfy_force_cast_weights", False) == (chosen == "by a node")


def test_products_in_fp8(tmp_path, monkeypatch):
    """Where the device has them, activations are quantised, too. A rank looks at its own device, whatever the host's."""

    def fresh():
        quantised._picked.cache_clear()
        quantised._layer_class.cache_clear()

    generator = torch.Generator().manual_seed(1)
    model = load(tmp_path, "flux", scaled)
    with monkeypatch.context() as able:
        able.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
        fresh()
        capable = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"))
        skeleton = skeleton_of(capable)

        def drawn(*shape):
            return torch.randn(shape, generator=generator)

        args = drawn(1, 16, 16, 16), drawn(1)
        kwargs = {"context": drawn(1, 256, 64), "y": drawn(1, 32), "guidance": drawn(1), "transformer_options": {}}
        args, kwargs = tree_map(lambda leaf: leaf.to(capable.model.get_dtype_inference()), (args, kwargs))
        places = (0, "x"), (1, "timestep")
        family = family_of(skeleton, capable, fingerprint_of(capable), "forward", places, (args, kwargs))
        assert trace(skeleton, family, args, kwargs).macs > 0
        sent = pickle.dumps(skeleton)
        rank = loaded(pickle.loads(sent), capable)
        expected = capable.model.diffusion_model(*args, **kwargs)
        assert torch.equal(rank(*args, **kwargs), expected)
        assert not torch.equal(model.model.diffusion_model(*args, **kwargs), expected), "or nothing was quantised"
    fresh()
    rank = loaded(pickle.loads(sent), capable)
    assert torch.equal(rank(*args, **kwargs), model.model.diffusion_model(*args, **kwargs))
    fresh()


@pytest.mark.slow
def test_a_group_serves_files_that_are_quantised_alike(tmp_path):
    assert_exact(load(tmp_path, "flux", scaled), "flux")
    pids = POOL._held[-1].group.pids
    assert_exact(load(tmp_path, "flux", scaled, seed=6), "flux")
    assert POOL._held[-1].group.pids == pids
    assert_exact(load(tmp_path, "flux", by_layer("float8_e4m3fn")), "flux")
    assert POOL._held[-1].group.pids != pids


@pytest.mark.slow
def test_blocks_move(tmp_path):
    model = load(tmp_path, "flux", scaled)
    stock = assert_exact(model, "flux")
    group = POOL._held[-1].group
    placed = group.placement
    try:
        for cuts in (("img_in", "double_blocks.1"), ("img_in", "single_blocks.2")):
            moved = place(placed.graph, replace(placed.plan, cuts=cuts))
            POOL.move(group, Placement(placed.graph, placed.plan, moved.starts), model)
            assert torch.equal(sampled(attach(model, EXACT), "flux"), stock)
            assert POOL._held[-1].group is group and not last_run().notes
    finally:
        POOL.release()
