"""NaN in the network: the picture is the stock sampler's, and the note names the block."""

import copy

import pytest
import torch

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from helpers import small
from helpers.sampling import EXACT, ksampler

BLOCK = "output_blocks.1.0"


@pytest.fixture(scope="module")
def poisoned():
    """A model with a weight that is not a number."""
    model = small.model("sd15", seed=17)
    model.model.diffusion_model.get_parameter(f"{BLOCK}.in_layers.2.bias").data[0] = torch.nan
    return model


def test_the_note_names_block_and_device(poisoned, prompts):
    result = ksampler(attach(poisoned, EXACT), prompts)
    assert torch.equal(result.isnan(), ksampler(poisoned, prompts).isnan()) and result.isnan().any()
    (note,) = last_run().notes
    assert f"the network's result in step 1 has NaN or infinity, starting at block {BLOCK} on cpu" in note


def test_a_latent_that_is_not_a_number_is_not_blamed_on_the_network(sd15, prompts):
    latent = copy.deepcopy(small.latent())
    latent["samples"][0, 0, 0, 0] = torch.nan
    result = ksampler(attach(sd15, EXACT), prompts, latent)
    assert torch.equal(result.isnan(), ksampler(sd15, prompts, latent).isnan()) and result.isnan().any()
    assert last_run().notes == ("the latent of step 1 has NaN or infinity already before the network is called",)
