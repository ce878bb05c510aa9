"""Every denoising network that the host builds has a tiny model here, which its own KSampler samples."""

import pytest
import torch

from helpers.denoisers import DENOISERS, FROM_NOTHING, NO_DENOISERS, network_classes, sampled

FAST = ("aura_flow", "cogvideox", "stable_audio", "hunyuan3d2", "lens")  # others are in test_any_network.py
# networks without a model, and why
NOT_BUILT: dict[str, str] = {}


def apart(first, second):
    return float((first - second).norm() / first.norm())


def test_every_network_has_a_case():
    built = {denoiser.base for denoiser in DENOISERS.values()}
    missing = {network: bases for network, bases in network_classes().items() if not bases & built}
    assert missing.keys() <= NO_DENOISERS.keys() | NOT_BUILT.keys(), "a network that no test has seen"


def test_nothing_that_has_a_case_is_excused():
    known = network_classes()
    built = {network for network, bases in known.items() if bases & {denoiser.base for denoiser in DENOISERS.values()}}
    assert not built & (NO_DENOISERS.keys() | NOT_BUILT.keys())


def test_every_way_to_build_a_network_has_a_case():
    built = {denoiser.base for denoiser in DENOISERS.values()}
    missing = {network: bases - built for network, bases in network_classes().items() if bases - built}
    assert missing.keys() <= NO_DENOISERS.keys() | NOT_BUILT.keys(), missing


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in DENOISERS])
def test_the_host_samples_it(name):
    denoiser = DENOISERS[name]
    model = denoiser.model()
    assert type(model.model).__name__ == denoiser.base
    picture = sampled(model, denoiser)
    assert picture.isfinite().all() and picture.std() > 0.1
    assert torch.equal(sampled(model, denoiser), picture), "state is kept from one sampling to the next"
    assert apart(picture, sampled(model, denoiser, prompt=3)) > 1e-3, "it does not read its prompt"
    if name not in FROM_NOTHING:
        assert apart(picture, sampled(model, denoiser, latent=7, denoise=0.5)) > 1e-3, "it does not read its latent"


def test_seeds_change_weights_prompts_and_latents():
    denoiser = DENOISERS["sd15"]
    first, other = (dict(denoiser.model(seed).model.diffusion_model.named_parameters()) for seed in (0, 1))
    assert all(not torch.equal(weight, other[name]) for name, weight in first.items())
    assert not torch.equal(denoiser.conditioning(1)[0][0], denoiser.conditioning(2)[0][0])
    assert not torch.equal(denoiser.latent(1)["samples"], denoiser.latent(2)["samples"])
