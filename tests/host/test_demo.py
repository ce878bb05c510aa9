"""The demo model inside the host: the network, its conditioning, pictures by the stock sampler, the two nodes."""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
from pathlib import Path

import comfy.sample
import latent_preview
import nodes
import numpy as np
import pytest
import torch
from comfy_extras.nodes_chroma_radiance import EmptyChromaRadianceLatentImage
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asyncdiff_nodes.host import demo
from asyncdiff_nodes.nodes.demo import AsyncDiffDemoLoader, AsyncDiffDemoTextEncode

GOLDEN = Path(__file__).parent / "goldens" / "demo_unet.safetensors"


@pytest.fixture(scope="module")
def golden():
    """Tensors and the settings of the run, as tools/demo_model/export_host_golden.py describes them."""
    with safe_open(GOLDEN, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()} | json.loads(file.metadata()["run"])  # noqa: SIM118


@pytest.fixture(scope="module")
def loaded():
    return demo.load_demo()


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


def run(unet, golden):
    with torch.inference_mode():
        return unet(golden["x"].float(), golden["t"], context=golden["context"])


def draw(model, golden):
    """The golden's prompt from the golden's noise, [1, 3, 32, 32]."""
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            golden["x"][:1].float(),
            golden["steps"],
            golden["cfg"],
            "euler",
            "simple",
            demo.encode(golden["prompt"]),
            demo.encode(""),
            torch.zeros(1, 3, 32, 32),
            disable_pbar=True,
        )


def test_network_equals_diffusers(model, golden):
    assert (run(model.model.diffusion_model, golden) - golden["v"]).abs().max() < 1e-4


def test_context_equals_diffusers(golden):
    for row, text in enumerate(["", golden["prompt"]]):
        (context, options), *rest = demo.encode(text)
        assert options == {} and rest == []
        torch.testing.assert_close(context, golden["context"][row : row + 1], rtol=0, atol=1e-5)


def test_stock_euler_draws_the_picture_of_diffusers(loaded, golden):
    model, vae = loaded
    picture = vae.decode(draw(model, golden))[0].mul(255).round()
    assert picture.shape == (32, 32, 3)
    error = (picture - golden["picture"].float()).square().mean()
    assert 10 * np.log10(255**2 / max(error.item(), 1e-9)) > 45
    # Guards the golden itself: a red heart on white.
    corner, middle = golden["picture"][0, 0].int(), golden["picture"][14, 14].int()
    assert corner.min() > 200 and middle[0] > 200 and middle[1:].max() < 110


def test_preview_is_the_picture(loaded, golden):
    model, vae = loaded
    previewer = latent_preview.Latent2RGBPreviewer(model.model.latent_format.latent_rgb_factors)
    latent = golden["x"][:1].float() / 4
    preview = np.asarray(previewer.decode_latent_to_preview(latent), dtype=np.float32)
    np.testing.assert_allclose(preview, vae.decode(latent)[0].numpy() * 255, atol=1)


def test_vae_returns_what_it_was_given(loaded):
    vae = loaded[1]
    image = torch.rand(1, 32, 32, 3)
    latent = vae.encode(image)
    assert latent.shape == (1, 3, 32, 32)
    torch.testing.assert_close(vae.decode(latent), image, rtol=0, atol=1e-6)


def test_stock_nodes_make_its_latent_and_sample_it(model):
    latents = [EmptyChromaRadianceLatentImage.execute(width=32, height=32, batch_size=1).args[0]]
    if "downscale_ratio_spacial" in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters:
        latents.append(nodes.EmptyLatentImage().generate(32, 32)[0])
    prompt, empty = demo.encode("pizza"), demo.encode("")
    with torch.inference_mode():
        drawn = [nodes.common_ksampler(model, 1, 2, 3.0, "euler", "normal", prompt, empty, x)[0]["samples"] for x in latents]
    assert {tuple(samples.shape) for samples in drawn} == {(1, 3, 32, 32)}
    assert all(torch.equal(samples, drawn[0]) for samples in drawn)


def test_network_survives_pickling(model, golden):
    unet = model.model.diffusion_model
    assert torch.equal(run(pickle.loads(pickle.dumps(unet)), golden), run(unet, golden))


def test_copies_made_by_the_host_are_independent(model):
    make, arguments = model.cached_patcher_init
    other = make(*arguments)
    assert other.model.diffusion_model is not model.model.diffusion_model
    assert not other.is_clone(model)


def test_unknown_words_are_named(caplog):
    demo.encode("zeppelin heart")
    assert "zeppelin" in caplog.text and "heart" not in caplog.text


@pytest.mark.parametrize("name", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vocab.json"])
def test_missing_file_is_named(tmp_path, name):
    folder = shutil.copytree(demo.WEIGHTS, tmp_path / "weights")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        demo.encode("", folder) if name == "vocab.json" else demo.load_demo(folder)


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_weights_must_be_complete_and_no_more(tmp_path, change):
    folder = shutil.copytree(demo.WEIGHTS, tmp_path / "weights")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["stray"] = weights["conv_out.bias"]
    if change == "missing":
        del weights["conv_out.bias"], weights["stray"]
    save_file({name: tensor.clone() for name, tensor in weights.items()}, path)
    with pytest.raises(RuntimeError, match=r"out\.2\.bias" if change == "missing" else "stray"):
        demo.load_model(folder)


def test_other_noise_schedule_is_refused(tmp_path):
    folder = shutil.copytree(demo.WEIGHTS, tmp_path / "weights")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="epsilon"):
        demo.load_model(folder)


def test_nodes(golden):
    assert list(AsyncDiffDemoLoader.GET_NODE_INFO_V1()["output"]) == ["MODEL", "VAE"]
    info = AsyncDiffDemoTextEncode.GET_NODE_INFO_V1()
    assert list(info["output"]) == ["CONDITIONING"] and info["input"]["required"]["text"][1]["multiline"]
    model, vae = AsyncDiffDemoLoader.execute().args
    assert isinstance(model.model.diffusion_model, demo.DemoUNet) and vae.latent_channels == 3
    (conditioning,) = AsyncDiffDemoTextEncode.execute("").args
    torch.testing.assert_close(conditioning[0][0], golden["context"][:1], rtol=0, atol=1e-5)
