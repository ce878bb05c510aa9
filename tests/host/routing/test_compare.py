"""The node that samples twice: each time what the host's node and ours give, and true words on them."""

import re

import nodes
import pytest
import torch

from asyncdiff_nodes.host import demo
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.nodes.compare import AsyncDiffCompare
from helpers import small

SEGMENTS = Options("Custom", "cpu,cpu", segments=2)


def sampling(**changes):
    return {
        "seed": 5, "steps": 8, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, **changes
    }  # fmt: skip


def sample(model, inputs):
    return nodes.KSampler().sample(model, **inputs)[0]["samples"]


def numbers(text):
    """PSNR, seconds of KSampler and of AsyncDiff, and their ratio."""
    times = r"KSampler ([\d.]+) s, AsyncDiff ([\d.]+) s for steps 2 to 8: ([\d.]+)x"
    match = re.search(rf"([\d.]+) dB\n{times}\nPlan: 2 segments", text)
    return [float(word) for word in match.groups()]


@pytest.mark.slow
def test_latents_are_those_of_both_samplers(sd15, prompts):
    options = SEGMENTS
    inputs = sampling(positive=prompts[0], negative=prompts[1], latent_image=small.latent())
    routed, usual, text = AsyncDiffCompare.execute(sd15, options, **inputs).args
    assert torch.equal(usual["samples"], sample(sd15, inputs))
    assert torch.equal(routed["samples"], sample(attach(sd15, options), inputs))
    psnr, slow, fast, ratio = numbers(text)
    peak, error = usual["samples"].max() - usual["samples"].min(), (usual["samples"] - routed["samples"]).double()
    assert psnr == pytest.approx(10 * torch.log10(peak**2 / error.square().mean()).item(), abs=0.06)
    assert ratio == pytest.approx(slow / fast, rel=0.2), "both are rounded"


def test_with_a_vae_pictures_are_compared():
    model, vae = demo.load_demo()
    inputs = sampling(positive=demo.encode("red heart"), negative=demo.encode(""), cfg=3.0)
    latent = {"samples": torch.zeros(1, 3, 32, 32)}
    routed, usual, text = AsyncDiffCompare.execute(model, SEGMENTS, vae, latent_image=latent, **inputs).args
    pictures = [vae.decode(found["samples"]).clamp(0, 1) for found in (usual, routed)]
    error = (pictures[0] - pictures[1]).square().mean()
    assert text.startswith("PSNR of the pictures")
    assert numbers(text)[0] == pytest.approx(-10 * torch.log10(error).item(), abs=0.06)


def test_exact_is_the_same(sd15, prompts):
    inputs = sampling(positive=prompts[0], negative=prompts[1], latent_image=small.latent(), steps=1)
    text = AsyncDiffCompare.execute(sd15, Options("Exact", "cpu,cpu"), **inputs).args[2]
    assert re.match(r"The latents are the same\nKSampler [\d.]+ s, AsyncDiff [\d.]+ s for one step: ", text)


def test_one_device_is_ksampler_twice(sd15, prompts):
    inputs = sampling(positive=prompts[0], negative=prompts[1], latent_image=small.latent())
    text = AsyncDiffCompare.execute(sd15, Options(devices="cpu"), **inputs).args[2]
    assert text.startswith("The latents are the same") and "ComfyUI sampled as usual" in text
