"""The pipeline adapter, on real diffusers pipelines with small random networks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from asyncdiff_nodes.diffusers import accelerate, noise_levels
from asyncdiff_nodes.engine import Plan, RankOptions, Simulator, find_family, meta_copy, place, trace

STEPS = 6
ONE_THREAD = RankOptions(threads_per_rank=1)


@pytest.fixture(scope="module")
def pipe():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, 8, 32, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 8, 32, generator=generator),
    }


def run(pipe, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return pipe(**embeds(seed), num_inference_steps=STEPS, output_type="latent", generator=generator, **options).images


def plan_runs(routed, monkeypatch, **changes):
    """Have the runs to come follow the group's plan with ``changes``: another one would be another group to start."""
    plan = replace(routed.group.plan, **changes)
    monkeypatch.setattr(routed.group, "begin", partial(type(routed.group).begin, routed.group, plan=plan))


def test_synchronous_run_is_the_pipelines_own_and_the_unet_comes_back(pipe):
    original, expected = pipe.unet, run(pipe)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    image_to_image = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    expected_image = run(image_to_image, image=picture, strength=0.5)
    seen = []
    with accelerate(pipe, Plan(warmup=STEPS), ranks=ONE_THREAD) as routed:
        assert pipe.unet is routed
        actual = run(pipe, callback_on_step_end=lambda p, i, t, k: seen.append(i) or k)
        assert torch.equal(actual, expected)
        assert seen == list(range(STEPS))
        assert len({record.call for record in routed.stats().records}) == STEPS
        assert all(record.synchronous for record in routed.stats().records)
        image_to_image.unet = routed
        assert torch.equal(run(image_to_image, image=picture, strength=0.5), expected_image)
        assert len({record.call for record in routed.stats().records}) == STEPS // 2
    assert pipe.unet is original
    assert torch.equal(run(pipe), expected)


@pytest.mark.slow
def test_asynchronous_stride_run_begins_anew_each_time_and_follows_another_scheduler(pipe):
    plan = Plan(segments=2, stride=2, warmup=1)

    def simulated():
        original = pipe.unet
        with Simulator(original, plan) as simulator:

            class Routed(torch.nn.Module):
                config, dtype, device = original.config, original.dtype, original.device

                def forward(self, *args, **kwargs):
                    return simulator(*args, **kwargs)

            pipe.scheduler.set_timesteps(STEPS)
            simulator.begin(pipe.scheduler.timesteps, noise_levels(pipe.scheduler))
            pipe.unet = Routed()
            try:
                return run(pipe)
            finally:
                pipe.unet = original

    sequential, expected = run(pipe), simulated()
    with accelerate(pipe, plan, ["cpu"] * 3, ranks=ONE_THREAD):
        first = run(pipe)
        assert torch.allclose(first, expected, atol=1e-5)
        assert not torch.equal(first, sequential)
        assert torch.equal(run(pipe), first)  # nothing of the first run is left
        before, pipe.scheduler = pipe.scheduler, EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        try:
            assert torch.isfinite(run(pipe)).all()
        finally:
            pipe.scheduler = before


@pytest.mark.slow
def test_blocks_move_to_where_the_measured_times_say(pipe):
    draw = partial(run, height=64, width=64)  # what a busy machine adds to a block must be little beside what blocks take
    expected = draw(pipe)
    blocks = len(place(trace_of(pipe.unet), Plan()))
    lopsided = [1000.0] + [50.0] * (blocks - 1)  # what the planner is told, so that one rank gets a single block
    with accelerate(pipe, Plan(warmup=STEPS), estimate=lambda _: (lopsided, [1.0, 1.0], 0.0), ranks=ONE_THREAD) as routed:
        assert not routed.rebalance(), "nothing is known yet"
        assert torch.equal(draw(pipe), expected)
        before = routed.group.placement.starts
        assert routed.rebalance()
        assert routed.group.placement.starts != before
        assert torch.equal(draw(pipe), expected)
        weights = [sum(rank.weights.values()) for rank in routed.stats().ranks]
        assert weights == [routed.group.placement.weight_bytes(segment) for segment in (0, 1)]
    with accelerate(pipe, Plan(warmup=STEPS, cuts=("conv_in", "mid_block")), ranks=ONE_THREAD) as routed:
        run(pipe)
        assert not routed.rebalance(), "the cuts were chosen"


def trace_of(unet):
    family = find_family(unet)
    skeleton = meta_copy(unet)
    return trace(skeleton, family, *family.example_inputs(skeleton, None, 2))


def test_a_pipeline_without_a_unet_is_refused():
    with pytest.raises(TypeError, match="no unet"), accelerate(object()):
        pass


def test_a_pipeline_with_a_transformer(pipe, monkeypatch):
    """PixArt: exact in the warm-up, ahead after it, and the transformer comes back."""
    torch.manual_seed(1)
    transformer = PixArtTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=4, num_attention_heads=2, attention_head_dim=24,
        cross_attention_dim=48, caption_channels=32, use_additional_conditions=False,
    ).eval()  # fmt: skip
    pixart = PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=pipe.vae, transformer=transformer, scheduler=pipe.scheduler
    )
    pixart.set_progress_bar_config(disable=True)
    masks = {f"{name}prompt_attention_mask": torch.ones(1, 8) for name in ("", "negative_")}

    def draw():
        return run(pixart, prompt=None, negative_prompt=None, use_resolution_binning=False, height=16, width=16, **masks)

    sequential = draw()
    with accelerate(pixart, Plan(warmup=2), ranks=ONE_THREAD) as routed:
        for warmup in (2, STEPS):
            plan_runs(routed, monkeypatch, warmup=warmup)
            assert torch.equal(draw(), sequential) is (warmup == STEPS)
            records = routed.stats().records
            assert {record.call for record in records} == set(range(STEPS))
            assert {record.call for record in records if record.synchronous} == set(range(warmup))
    assert pixart.transformer is transformer


def flux():
    """Its transformer takes timesteps in thousandths, and one prompt."""
    torch.manual_seed(1)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=transformer, **nothing)
    given = {"prompt_embeds": torch.randn(1, 8, 32), "pooled_prompt_embeds": torch.randn(1, 32), "height": 64, "width": 64}
    return pipe, given, {"cond"}


def wan():
    """Evaluates its prompts one after the other."""
    torch.manual_seed(1)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, ffn_dim=32, num_layers=4,
    ).eval()  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, None, scheduler, transformer)
    embeds = {"prompt_embeds": torch.randn(1, 8, 16), "negative_prompt_embeds": torch.randn(1, 8, 16)}
    return pipe, {**embeds, "height": 32, "width": 32, "num_frames": 5}, {"cond", "uncond"}


@pytest.mark.parametrize("make, dtype", [(flux, torch.bfloat16), pytest.param(wan, torch.float32, marks=pytest.mark.slow)])
def test_flow_matching_pipelines(make, dtype, monkeypatch):
    """In bfloat16 a timestep has three digits."""
    pipe, given, streams = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.to(dtype)
    given = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in given.items()}

    def draw():
        return pipe(
            **given, num_inference_steps=8, output_type="latent", generator=torch.Generator().manual_seed(0), return_dict=False
        )[0]

    sequential = draw()
    with accelerate(pipe, Plan(warmup=3, cooldown=1), ranks=ONE_THREAD) as routed:
        ahead = draw()
        calls = routed.stats().calls
        assert {call.stream for call in calls} == streams
        assert {call.call for call in calls if not call.synchronous} == {3, 4, 5, 6}
        error = (ahead - sequential).abs().mean()
        assert 0 < error < 0.05 * sequential.abs().mean()
        plan_runs(routed, monkeypatch, warmup=8)
        assert torch.equal(draw(), sequential)


@pytest.mark.parametrize(
    "plan",
    [pytest.param(Plan(), marks=pytest.mark.slow), Plan(segments=1, branches=2)],
    ids=["segments", "branches"],
)
def test_animatediff(plan):
    """The pipeline repeats its prompts for every frame: each branch gets those of its own videos."""
    torch.manual_seed(2)
    unet = UNetMotionModel(
        block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8, num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), motion_max_seq_length=4, motion_num_attention_heads=2,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    ).eval()  # fmt: skip
    pipe = AnimateDiffPipeline(None, None, None, unet, None, DDIMScheduler(clip_sample=False, steps_offset=1))
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe(
            **embeds(3), num_frames=4, height=64, width=64, num_inference_steps=STEPS, output_type="latent", generator=generator
        ).frames

    sequential = draw()
    with accelerate(pipe, replace(plan, warmup=STEPS), ranks=ONE_THREAD) as routed:
        assert (draw() - sequential).abs().max() <= (0 if plan.branches == 1 else 1e-5 * sequential.abs().max())
        assert {rank.rank for rank in routed.stats().ranks if rank.records} == {0, 1}
    if plan.branches == 1:
        with accelerate(pipe, replace(plan, warmup=2), ranks=ONE_THREAD):
            error = (draw() - sequential).abs().mean()
            assert 0 < error < 0.05 * sequential.abs().mean()


def test_levels_of_a_flow():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    levels = noise_levels(scheduler)
    assert levels.sigmas == tuple(scheduler.sigmas[:-1].tolist()) and levels.scales == (1.0,) * 4 and levels.rest == 0.0
    assert levels.leap == 1
