"""Laws 1 and 2 for families beside the UNets of the goldens, as small instances of diffusers' own classes with random weights."""

from dataclasses import replace

import pytest
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

from asyncdiff_nodes.engine import Plan, Simulator, WorkerGroup

TIMESTEPS = [900, 700, 500, 300, 100]


def pixart(**extras):
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=6, num_attention_heads=2, attention_head_dim=24,
        cross_attention_dim=48, caption_channels=24, **extras,
    ).eval().requires_grad_(False)  # fmt: skip


@torch.no_grad()
def denoise(model, begin=None, **extras):
    """Results of a short run of made-up inputs, two items."""
    generator = torch.Generator().manual_seed(1)
    start, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 24, generator=generator)
    if begin:
        begin(TIMESTEPS)
    return [
        model(start * (1 - k / 7), encoder_hidden_states=context, timestep=torch.tensor([t, t]), return_dict=False, **extras)[0]
        for k, t in enumerate(TIMESTEPS)
    ]


@pytest.mark.parametrize("segments", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_transformer_is_exact_when_synchronous_and_as_simulated_when_not(segments):
    """The larger one with the size conditions of PixArt-alpha, which every rank computes."""
    model, extras = pixart(use_additional_conditions=segments == 3), {}
    if segments == 3:
        extras["added_cond_kwargs"] = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    plan = Plan(segments)
    with WorkerGroup(model, plan, ["cpu"] * segments, threads_per_rank=1) as group:
        exact = denoise(model, **extras)
        got = denoise(group, lambda ts: group.begin(ts, plan=replace(plan, warmup=len(ts))), **extras)
        assert all(map(torch.equal, got, exact))
        with Simulator(model, plan) as simulator:
            expected = denoise(simulator, simulator.begin, **extras)
        got = denoise(group, group.begin, **extras)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert not torch.equal(got[segments - 1], exact[segments - 1])


DEEP = ("down_blocks.1.attentions.0.transformer_blocks.1", "mid_block.attentions.0.proj_out", "up_blocks.0.attentions.1")


@pytest.mark.parametrize("cuts", [DEEP[:2], pytest.param(DEEP, marks=pytest.mark.slow)], ids=["2", "3"])
def test_unet_cut_within_its_deep_attentions(cuts):
    """SDXL's layout, with three layers per attention where it has ten."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 3), attention_head_dim=(2, 4),
        cross_attention_dim=24, use_linear_projection=True, layers_per_block=1,
    ).eval().requires_grad_(False)  # fmt: skip
    plan = Plan(len(cuts), cuts=cuts)
    with WorkerGroup(unet, plan, ["cpu"] * plan.segments, threads_per_rank=1) as group:
        exact = denoise(unet)
        got = denoise(group, lambda ts: group.begin(ts, plan=replace(plan, warmup=len(ts))))
        assert all(map(torch.equal, got, exact))
        with Simulator(unet, plan) as simulator:
            expected = denoise(simulator, simulator.begin)
        torch.testing.assert_close(denoise(group, group.begin), expected, rtol=0, atol=1e-5)
        held = [set(rank.weights) for rank in group.stats().ranks]
        assert {name for weights in held for name in weights} == set(unet.state_dict())
        divided = [{n.split(".")[3] for n in weights if n.startswith("mid_block.attentions.0.")} for weights in held]
        assert divided[:2] == [{"norm", "proj_in", "transformer_blocks"}, {"proj_out"}]
