"""Laws 1 and 2 for families beside the UNets of the goldens: diffusers' own classes, small, with random weights."""

from dataclasses import replace
from itertools import pairwise

import diffusers
import pytest
import torch
from torch.utils._pytree import tree_map

from asyncdiff_nodes.cli.example_calls import example_call
from asyncdiff_nodes.engine import Plan, Simulator, family_of, meta_copy, place, trace
from asyncdiff_nodes.engine.inputs import Inputs
from asyncdiff_nodes.engine.tensors import tensors_of
from reuse import running

UNET = {
    "sample_size": 8, "block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1, "cross_attention_dim": 24,
}  # fmt: skip
SMALL = {  # of enough layers that none has more than a quarter of the work, nor the embeddings a notable part, as in true ones
    "sd15": ("UNet2DConditionModel", UNET | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }),
    # three layers per attention where it has ten
    "sdxl": ("UNet2DConditionModel", UNET | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 3), "attention_head_dim": (2, 4), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 72,
    }),
    "flux": ("FluxTransformer2DModel", {
        "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
    }),
    "sd3": ("SD3Transformer2DModel", {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 5, "attention_head_dim": 8, "num_attention_heads": 4,
        "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 64,
    }),
    "qwen_image": ("QwenImageTransformer2DModel", {
        "in_channels": 16, "out_channels": 4, "num_layers": 10, "attention_head_dim": 32, "num_attention_heads": 3,
        "joint_attention_dim": 16, "axes_dims_rope": (16, 8, 8),
    }),
    "wan": ("WanTransformer3DModel", {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16, "ffn_dim": 32,
        "num_layers": 4,
    }),
    "ltxv": ("LTXVideoTransformer3DModel", {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
        "num_layers": 4, "caption_channels": 16,
    }),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
        "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
    }),
    "pixart": ("PixArtTransformer2DModel", {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 8, "num_attention_heads": 2,
        "attention_head_dim": 24, "cross_attention_dim": 48, "caption_channels": 24,
    }),
    "animatediff": ("UNetMotionModel", {
        "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 32, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "num_attention_heads": 2,
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "motion_max_seq_length": 4,
        "motion_num_attention_heads": 2,
    }),
    "svd": ("UNetSpatioTemporalConditionModel", {
        "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "num_attention_heads": 2,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), "num_frames": 3,
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "projection_class_embeddings_input_dim": 96, "addition_time_embed_dim": 32,
    }),
}  # fmt: skip
FAST = ("sdxl", "flux", "hunyuan_video", "animatediff", "svd")
TIMESTEPS = [900, 700, 500, 300, 100]


def small(kind):
    torch.manual_seed(0)
    cls, config = SMALL[kind]
    return getattr(diffusers, cls)(**config).eval().requires_grad_(False)


def family_of_small(model):
    skeleton = meta_copy(model)
    return family_of(skeleton, *example_call(skeleton, 8))


@torch.no_grad()
def denoise(call, model, batch=2, noise=0.0):
    """Results of a short run of made-up inputs, to which ``noise`` is added that nobody can foresee."""
    generator, example, family = torch.Generator().manual_seed(1), example_call(model, 8, batch), family_of_small(model)

    def real(leaf):
        return torch.rand(leaf.shape, generator=generator) if isinstance(leaf, torch.Tensor) else leaf

    first = Inputs.take(*tree_map(real, example), family.timestep)
    (sample,), found = first.samples(family.sample), []
    for k, t in enumerate(TIMESTEPS):
        leaves = list(first.leaves)
        leaves[sample] = leaves[sample] * (1 - k / 7) + noise * torch.randn(leaves[sample].shape, generator=generator)
        args, kwargs = replace(first, leaves=leaves, timestep=first.timestep_like(t)).arguments()
        found.append(call(*args, **kwargs)[0])
    return found


@pytest.mark.covers("exact", "async", "sharded")
@pytest.mark.parametrize("segments", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in SMALL])
def test_exact_when_synchronous_and_as_simulated_when_not(kind, segments, record_property):
    model, plan = small(kind), Plan(segments)
    with running(model, plan) as group:
        exact = denoise(model, model)
        group.begin(TIMESTEPS, replace(plan, warmup=len(TIMESTEPS)))
        assert all(map(torch.equal, denoise(group, model), exact))
        with Simulator(model, plan) as simulator:
            simulator.begin(TIMESTEPS)
            expected = denoise(simulator, model)
        group.begin(TIMESTEPS)
        got = denoise(group, model)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert not torch.equal(got[segments - 1], exact[segments - 1])
        ranks = group.stats().ranks
        assert set().union(*(rank.weights for rank in ranks)) == {name for name, _ in tensors_of(model)}
        record_property("class", type(model).__name__)
        record_property("found", group.family.found is not None)
        assert max(sum(rank.weights.values()) for rank in ranks) < sum(tensor.nbytes for _, tensor in tensors_of(model))


@pytest.mark.parametrize("kind", SMALL)
def test_a_cut_of_a_transformer_is_crossed_by_its_stream_alone(kind):
    model = small(kind)
    skeleton = meta_copy(model)
    graph = trace(skeleton, family_of_small(model), *example_call(skeleton, 8))
    if "Transformer" in type(model).__name__:
        placement = place(graph, Plan(2, forecast=0, cuts=(graph.names[0], graph.names[len(graph.names) // 2])))
        (producer,) = placement.incoming(1)
        assert producer == len(graph.names) // 2 - 1
    assert max(place(graph, Plan(2, fresh_skips=False)).shares) < 0.7


@pytest.mark.parametrize("segments", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("kind", [kind for kind, (name, _) in SMALL.items() if "Transformer" in name])
@torch.no_grad()
def test_hidden_states_are_where_the_family_says(kind, segments):
    """Blocks without weights add nothing: if every segment makes hidden states of its own input, no result is stale."""
    model = small(kind)
    for blocks in family_of_small(model).hidden.lists:
        for parameter in model.get_submodule(blocks).parameters():
            parameter.zero_()
    expected = denoise(model, model, noise=1.0)
    assert all((a - b).abs().max() > 0.01 for a, b in pairwise(expected))
    plan = Plan(segments)
    with Simulator(model, plan) as simulator:
        simulator.begin(TIMESTEPS)
        torch.testing.assert_close(denoise(simulator, model, noise=1.0), expected, rtol=0, atol=1e-5)
        assert simulator.placement.hidden is not None
    with Simulator(model, replace(plan, forecast=0)) as stale:
        stale.begin(TIMESTEPS)
        assert (denoise(stale, model, noise=1.0)[-1] - expected[-1]).abs().max() > 0.01


DEEP = ("down_blocks.1.attentions.0.transformer_blocks.1", "mid_block.attentions.0.proj_out", "up_blocks.0.attentions.1")


@pytest.mark.parametrize("cuts", [DEEP[:2], pytest.param(DEEP, marks=pytest.mark.slow)], ids=["2", "3"])
def test_unet_cut_within_its_deep_attentions(cuts):
    unet = small("sdxl")
    plan = Plan(len(cuts), cuts=cuts)
    with running(unet, plan) as group:
        exact = denoise(unet, unet)
        group.begin(TIMESTEPS, replace(plan, warmup=len(TIMESTEPS)))
        assert all(map(torch.equal, denoise(group, unet), exact))
        with Simulator(unet, plan) as simulator:
            simulator.begin(TIMESTEPS)
            expected = denoise(simulator, unet)
        group.begin(TIMESTEPS)
        torch.testing.assert_close(denoise(group, unet), expected, rtol=0, atol=1e-5)
        held = [set(rank.weights) for rank in group.stats().ranks]
        assert {name for weights in held for name in weights} == set(unet.state_dict())
        divided = [{n.split(".")[3] for n in weights if n.startswith("mid_block.attentions.0.")} for weights in held]
        assert divided[:2] == [{"norm", "proj_in", "transformer_blocks"}, {"proj_out"}]
