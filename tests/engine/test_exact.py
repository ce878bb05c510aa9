"""Exact when synchronous: as long as the warm-up lasts, outputs are bit for bit those of the unrouted model."""

import golden
import pytest
import toys
import torch
from toys import TOY

from asyncdiff_nodes.engine import Plan, WorkerGroup

# three steps of DDIM are all warm-up for the golden plans with W = 3
GOLDEN = [
    "sd15_N2_S1_W3_shift_T12",
    "sd15_N3_S2_W3_noshift_T12_dealias",
    "sd15_N4_S1_W3_noshift_T12",
    "sdxl_N3_S1_W3_noshift_T12",
    "sdxl_N2_S2_W3_noshift_T12_dealias",
]
OTHERS = [
    ("sd15", Plan(segments=2, warmup=4)),  # automatic, hence wrapped
    ("sdxl", Plan(segments=2, warmup=4, cuts=("conv_in", "mid_block"))),
    pytest.param("sd15", Plan(segments=3, warmup=4), marks=pytest.mark.slow),
    pytest.param("sd15", Plan(segments=4, warmup=4), marks=pytest.mark.slow),
    pytest.param("sdxl", Plan(3, warmup=4, cuts=("conv_in", "mid_block", "up_blocks.1")), marks=pytest.mark.slow),
    pytest.param(
        "sdxl",
        Plan(4, warmup=4, cuts=("conv_in", "down_blocks.1.attentions.1", "mid_block", "up_blocks.1")),
        marks=pytest.mark.slow,
    ),
    pytest.param("sdxl", Plan(segments=4, warmup=4), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("layout", "plan"), [*((golden.RUNS[n]["layout"], golden.plan_of(n)) for n in GOLDEN), *OTHERS], ids=str
)
def test_ddim_loop_of_a_unet(layout, plan, golden_group):
    group = golden_group(layout, plan)
    steps = plan.warmup
    group.begin(golden.scheduler(steps).timesteps)
    eps, latents = golden.sample(group, layout, steps)
    expected, exact = golden.sample(golden.unet(layout), layout, steps)
    assert torch.equal(eps, expected)
    assert torch.equal(latents, exact)


TOY_CUTS = {
    "linear": {n: tuple(f"blocks.{i}" for i in (0, 2, 4, 5)[:n]) for n in (2, 3, 4)},
    "wrapped": {n: tuple(f"blocks.{i}" for i in (2, 3, 5, 6)[:n]) for n in (2, 3, 4)},
}


@pytest.mark.parametrize("kind", ["linear", "wrapped"])
@pytest.mark.parametrize("segments", [2, 3, 4])
def test_random_network(segments, kind):
    net = toys.random_net(seed=segments)
    plan = Plan(segments=segments, warmup=5, cuts=TOY_CUTS[kind][segments])
    with WorkerGroup(net, plan, ["cpu"] * segments, threads_per_rank=1, family=TOY) as group, torch.no_grad():
        assert group.placement.wrapped == (kind == "wrapped")
        group.begin()
        routed = toys.denoise(group, [900, 700, 500, 300, 100], batch=3)
        assert torch.equal(routed, toys.denoise(net, [900, 700, 500, 300, 100], batch=3))


@pytest.fixture
def wrapped_unet(golden_group):
    """A group of two and the model itself; every test has its own run."""
    group = golden_group(*OTHERS[0])
    group.begin()
    latents = golden.inputs("sd15")["latents"]
    return group, golden.unet("sd15"), torch.cat([latents, latents]), golden.conditioning("sd15")


@pytest.mark.parametrize(
    "timestep", [500, 500.0, torch.tensor(500), torch.tensor([500, 500]), torch.tensor(500.0, dtype=torch.float64)], ids=repr
)
def test_every_form_of_timestep(wrapped_unet, timestep):
    group, unet, x, kwargs = wrapped_unet
    with torch.no_grad():
        expected = unet(x, timestep, return_dict=False, **kwargs)[0]
    assert torch.equal(group(x, timestep, return_dict=False, **kwargs)[0], expected)


def test_different_timesteps_in_a_batch(wrapped_unet):
    group, unet, x, kwargs = wrapped_unet
    with torch.no_grad():
        expected = unet(x, torch.tensor([900, 20]), **kwargs).sample
    assert torch.equal(group(x, torch.tensor([900, 20]), **kwargs).sample, expected)


def test_output_has_the_model_s_own_type(wrapped_unet):
    group, unet, x, kwargs = wrapped_unet
    with torch.no_grad():
        expected = unet(x, 1, return_dict=True, **kwargs)
    routed = group(x, 1, return_dict=True, **kwargs)
    assert type(routed) is type(expected)
    assert torch.equal(routed.sample, expected.sample)
    assert isinstance(group(x, 1, stream="tuple", return_dict=False, **kwargs), tuple)


def test_arguments_by_keyword(wrapped_unet):
    group, unet, x, kwargs = wrapped_unet
    with torch.no_grad():
        expected = unet(sample=x, timestep=7, **kwargs).sample
    assert torch.equal(group(sample=x, timestep=7, **kwargs).sample, expected)


def test_result_belongs_to_the_caller(wrapped_unet):
    group, unet, x, kwargs = wrapped_unet
    with torch.no_grad():
        expected = unet(x, 7, **kwargs).sample
    group(x, 7, **kwargs).sample.zero_()
    assert torch.equal(group(x, 7, **kwargs).sample, expected)


def test_input_changed_in_place_between_calls(wrapped_unet):
    group, unet, x, kwargs = wrapped_unet
    x, embeds = x.clone(), kwargs["encoder_hidden_states"].clone()
    for _ in range(2):
        with torch.no_grad():
            expected = unet(x, 7, encoder_hidden_states=embeds).sample
        assert torch.equal(group(x, 7, encoder_hidden_states=embeds).sample, expected)
        x.mul_(0.5)
        embeds.add_(1)


def test_missing_timestep_is_named(wrapped_unet):
    group, _, x, kwargs = wrapped_unet
    with pytest.raises(TypeError, match="missing argument 'timestep'"):
        group(x, **kwargs)


@pytest.mark.parametrize("form", ["channels_last", "bfloat16", "float64"])
def test_memory_format_and_dtype_of_the_module(form):
    net = toys.random_net(seed=8)
    net = net.to(memory_format=torch.channels_last) if form == "channels_last" else net.to(getattr(torch, form))
    x, kwargs = toys.inputs(0)
    x, context = x.to(net.scale.dtype), kwargs["context"].to(net.scale.dtype)
    if form == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), WorkerGroup(net, Plan(warmup=2), threads_per_rank=1, family=TOY) as group:
        for t in (600, 30):
            routed, expected = group(x, t, context), net(x, t, context)
            assert routed.dtype == expected.dtype
            assert torch.equal(routed, expected)
        group(x, 10, context)  # an asynchronous call, too
        assert sum(group.stats().ranks[0].weights.values()) > 0
