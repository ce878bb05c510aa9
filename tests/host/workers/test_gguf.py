"""Models that the pack ComfyUI-GGUF has loaded from a file: the ranks have its layers, and the bytes of the file."""

from types import SimpleNamespace

import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.ldm.flux.model import Flux

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import denoisers, packs, sampling, small
from helpers.denoisers import DENOISERS
from helpers.sampling import EXACT, ksampler
from helpers.simulated import simulated

NAME = "ComfyUI-GGUF"
if not hasattr(comfy.utils, "detect_layer_quantization"):
    pytest.skip("this ComfyUI takes FLUX.1 at its true width only", allow_module_level=True)
gguf = pytest.importorskip("gguf")
pytestmark = packs.needs(NAME)

SHAPE = {"hidden_size": 256, "axes_dim": [16, 56, 56], "mlp_ratio": 4.0}  # by which the host knows the heads' width


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    """The pack's nodes, as the host imports it, and the folder that they load from."""
    folder = tmp_path_factory.mktemp("unet")
    folder_paths.add_model_folder_path("unet", str(folder))
    return folder, packs.loaded(packs.place_of(NAME))


def network(**where):
    return Flux(**small.unet_config("flux") | SHAPE, dtype=torch.float32, operations=comfy.ops.disable_weight_init, **where)


def flux(seed):
    with torch.inference_mode(False), torch.no_grad():
        made = network()
        small.randomise(made, seed)
    return made


def write(path, made, form, architecture="flux"):
    """A network's weights: matrices in ``form``, or in 8 bits at each eighth layer, the rest in 16 or 32."""
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, architecture)
    for index, (name, weight) in enumerate(made.named_parameters()):
        kind = kinds[form] if index % 8 else kinds.Q8_0
        layer = made.get_submodule(name.rpartition(".")[0])
        if not (isinstance(layer, torch.nn.Linear) and weight.ndim == 2 and weight.shape[1] % 32 == 0) or "_in." in name:
            kind = kinds.F32 if index % 2 else kinds.F16
        writer.add_tensor(name, gguf.quants.quantize(weight.detach().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def load(loaders):
    """The MODEL of a file of this form, as a loader of the pack makes it."""

    def loaded(form, seed=5, loader="UnetLoaderGGUF", **options):
        folder, mappings = loaders
        write(folder / f"{form}{seed}.gguf", flux(seed), form)
        return mappings[loader]().load_unet(f"{form}{seed}.gguf", **options)[0]

    return loaded


def sampled(model, steps=4):
    return ksampler(model, kind="flux", steps=steps, cfg=1.0, scheduler="simple")


def assert_exact(model, devices="cpu,cpu", steps=4):
    return sampling.assert_exact(model, lambda m: sampled(m, steps), Options("Exact", devices))


@pytest.mark.parametrize("form", ["Q4_0", *(pytest.param(form, marks=pytest.mark.slow) for form in ("Q5_1", "BF16"))])
def test_exact_and_as_small_as_in_the_file(load, loaders, form):
    model = load(form)
    assert_exact(model)
    distinct = {name: size for rank in last_run().stats.ranks for name, size in rank.weights.items()}
    held = [sum(rank.weights.values()) for rank in last_run().stats.ranks]
    assert sum(distinct.values()) == sum(weight.nbytes for weight in model.model.diffusion_model.parameters())
    assert max(held) < 0.75 * sum(distinct.values()) < (loaders[0] / f"{form}5.gguf").stat().st_size
    group = POOL._held[-1].group
    assert held == [group.placement.weight_bytes(segment) for segment in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_asynchronous_steps_are_the_simulators(load, ranks):
    """Of other formats a faster test shows it, in test_quantised.py."""
    model, devices = load("Q4_0"), ", ".join(["cpu"] * ranks)
    stock = assert_exact(model, devices, 8)
    found = sampled(attach(model, Options("Custom", devices, segments=ranks, branches=1, warmup=3)), 8)
    assert not last_run().notes
    oracle, simulator = simulated(model, last_run().plan, "euler")
    with simulator:
        expected = sampled(oracle, 8)
    assert (found - stock).abs().max() > 0 and (found - expected).abs().max() <= 0.01 * (found - stock).abs().max()


@pytest.mark.slow
def test_a_group_serves_files_that_are_quantised_alike(load):
    assert_exact(load("Q4_0"))
    pids = POOL._held[-1].group.pids
    assert_exact(load("Q4_0", seed=6))
    assert POOL._held[-1].group.pids == pids
    assert_exact(load("Q5_1"))
    assert POOL._held[-1].group.pids != pids


def test_options_of_the_loader(load):
    usual = assert_exact(load("Q4_0"))
    others = load("Q4_0", loader="UnetLoaderGGUFAdvanced", dequant_dtype="bfloat16")
    assert not torch.equal(assert_exact(others), usual)
    load("Q4_0")  # the options are those of the loader that ran last


def adapted(model, strength, seed=4):
    unquantised = SimpleNamespace(model=SimpleNamespace(diffusion_model=network(device="meta")))
    return comfy.sd.load_lora_for_models(model, None, small.lora(unquantised, seed), strength, 0)[0]


def test_lora(load):
    """The pack adds it in every call. Ranks are sent the LoRA alone while they have one of these sizes."""
    model = load("Q4_0")
    plain, found = assert_exact(model), []
    for strength in (0.8, 0.3):
        found.append(assert_exact(adapted(model, strength)))
    pids = POOL._held[-1].group.pids
    found.append(assert_exact(adapted(model, 0.3, seed=5)))
    assert POOL._held[-1].group.pids == pids
    assert len({tuple(latent.flatten().tolist()) for latent in (plain, *found)}) == 4
    twice = adapted(adapted(model, 0.8), 0.5, seed=5)
    assert_exact(twice)
    held = [name for rank in last_run().stats.ranks for name in rank.weights if ".patch" in name]
    assert held and len(held) == len(set(held)), "each rank has the LoRA of its own blocks"
    assert torch.equal(assert_exact(model), plain)


@pytest.mark.slow
def test_lora_where_segments_work_ahead(load):
    model = adapted(load("Q4_0"), 0.8)
    stock = assert_exact(model, steps=8)
    found = sampled(attach(model, Options("Custom", "cpu,cpu", segments=2, branches=1, warmup=3)), 8)
    oracle, simulator = simulated(model, last_run().plan, "euler")
    with simulator:
        expected = sampled(oracle, 8)
    assert (found - stock).abs().max() > 0 and (found - expected).abs().max() <= 0.01 * (found - stock).abs().max()


def test_patches_of_another_kind_are_the_hosts_by_name(load):
    model = load("Q4_0")
    changed = model.clone()
    key = ("diffusion_model.double_blocks.0.img_attn.qkv.weight", None, lambda change: 0.5 * change)
    change = torch.randn(768, 256, generator=torch.Generator().manual_seed(1)) * 0.05
    assert changed.add_patches({key: (change,)}, 0.5)
    stock = sampled(changed)
    assert torch.equal(sampled(attach(changed, EXACT)), stock) and not torch.equal(stock, sampled(model))
    assert "a patch on its quantised weights has a function, which a rank cannot get" in last_run().notes[0]


# network -> what its files say that it is
OTHERS = {"qwen_image": "qwen_image", "wan": "wan", "z_image": "lumina2", "ltx2": "ltxv"}


@pytest.fixture
def load_other(loaders, monkeypatch):
    """The MODEL of a file of a small network of this name, and the same network as it was before."""

    def loaded(name, form):
        folder, mappings = loaders
        made = DENOISERS[name].model(seed=5)
        config = DENOISERS[name].detected(made)
        monkeypatch.setattr(comfy.model_detection, "detect_unet_config", lambda *_, **__: dict(config))
        write(folder / f"{name}{form}.gguf", made.model.diffusion_model, form, OTHERS[name])
        return mappings["UnetLoaderGGUF"]().load_unet(f"{name}{form}.gguf")[0], made

    return loaded


def other_files():
    """Every network in several forms; by default LTX-2, which keeps what its layers were made of."""
    for name in [name for name in OTHERS if name in DENOISERS]:
        for form in ("Q4_0", "Q5_1", "Q8_0"):
            yield pytest.param(name, form, marks=() if (name, form) == ("ltx2", "Q4_0") else pytest.mark.slow)


@pytest.mark.parametrize("name, form", list(other_files()))
def test_other_networks(load_other, name, form):
    denoiser = DENOISERS[name]
    model, made = load_other(name, form)
    kinds = [getattr(weight, "tensor_type", None) for weight in model.model.diffusion_model.parameters()]
    assert kinds.count(gguf.GGMLQuantizationType[form]) > len(kinds) / 8, "hardly any matrix is quantised"
    plain = sampling.assert_exact(model, lambda each: denoisers.sampled(each, denoiser))
    held = [sum(rank.weights.values()) for rank in last_run().stats.ranks]
    assert max(held) < sum(weight.nbytes for weight in model.model.diffusion_model.parameters())
    changed = comfy.sd.load_lora_for_models(model, None, denoisers.lora(made), 0.8, 0)[0]
    assert not torch.equal(sampling.assert_exact(changed, lambda each: denoisers.sampled(each, denoiser)), plain)
