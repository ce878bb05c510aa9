"""What a rehearsal foretells, against the calls that the host's own samplers really make."""

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from asyncdiff_nodes.host.routing.rehearsal import rehearse
from helpers.sampling import ksampler

NOISY = ("ancestral", "_sde", "lcm", "ddpm", "sa_solver", "seeds_", "er_sde")
ADAPTIVE = ("dpm_adaptive",)  # chooses its steps by what the model says


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_every_call_of_a_sampler_is_foretold(sampler, sd15, prompts):
    seen, schedule = [], []

    def watch(executor, *args, **kwargs):
        options = args[5] if len(args) > 5 else kwargs["transformer_options"]
        seen.append(options["sigmas"][0].item())
        schedule[:] = [options["sample_sigmas"]]
        return executor(*args, **kwargs)

    model = sd15.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", watch)
    ksampler(model, prompts, steps=6, cfg=1.0, sampler=sampler, scheduler="karras")
    before = torch.get_rng_state()
    foretold, noisy = rehearse(comfy.samplers.sampler_object(sampler), schedule[0], sd15)
    assert torch.equal(torch.get_rng_state(), before)
    assert (foretold.tolist() == pytest.approx(seen, rel=1e-4)) is (sampler not in ADAPTIVE)
    assert noisy is any(word in sampler for word in NOISY)
