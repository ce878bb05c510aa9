"""Exact when synchronous: as long as the warm-up lasts, outputs are bit for bit those of the unrouted model."""

import pytest
import torch

import golden
import toys
from asyncdiff_nodes.engine import Plan
from reuse import running
from toys import TOY

# three steps of DDIM are all warm-up for the golden plans with W = 3
GOLDEN = [
    "sd15_N2_S1_W3_shift_T12",
    pytest.param("sd15_N3_S2_W3_noshift_T12_dealias", marks=pytest.mark.slow),
    pytest.param("sd15_N4_S1_W3_noshift_T12", marks=pytest.mark.slow),
    pytest.param("sdxl_N3_S1_W3_noshift_T12", marks=pytest.mark.slow),
    pytest.param("sdxl_N2_S2_W3_noshift_T12_dealias", marks=pytest.mark.slow),
]
WRAPPED = ("sd15", Plan(segments=2, warmup=4))  # the automatic placement
OTHERS = [
    ("sd15", Plan(segments=3, warmup=4)),
    ("sd15", Plan(segments=4, warmup=4)),
    ("sdxl", Plan(segments=2, warmup=4, cuts=("conv_in", "mid_block"))),
    ("sdxl", Plan(segments=3, warmup=4, cuts=("conv_in", "mid_block", "up_blocks.1"))),
    ("sdxl", Plan(segments=4, warmup=4, cuts=("conv_in", "down_blocks.1.attentions.1", "mid_block", "up_blocks.1"))),
    ("sdxl", Plan(segments=4, warmup=4)),
]


def assert_exact(layout, plan, group):
    group.begin(golden.scheduler(plan.warmup).timesteps)
    eps, latents = golden.sample(group, layout, plan.warmup)
    expected, exact = golden.sample(golden.unet(layout), layout, plan.warmup)
    assert torch.equal(eps, expected)
    assert torch.equal(latents, exact)


@pytest.mark.parametrize("name", GOLDEN)
def test_ddim_loop_at_published_cuts(name, golden_group):
    layout, plan = golden.RUNS[name]["layout"], golden.plan_of(name)
    assert_exact(layout, plan, golden_group(layout, plan))


@pytest.mark.slow
def test_ddim_loop_at_automatic_cuts(golden_group):
    group = golden_group(*WRAPPED)
    assert group.placement.wrapped
    assert_exact(*WRAPPED, group)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "plan"), OTHERS, ids=[f"{layout}-{toys.label(plan)}" for layout, plan in OTHERS])
def test_ddim_loop_of_all_other_combinations(layout, plan, golden_group):
    group = golden_group(layout, plan)
    assert group.placement.wrapped == (plan.cuts is None)
    assert_exact(layout, plan, group)


@pytest.mark.parametrize("plan", toys.PLANS, ids=toys.label)
def test_random_network(plan, toy_group):
    group, net = toy_group(plan)
    timesteps = [900, 700, 500, 300][: plan.warmup]
    group.begin(timesteps)
    with torch.no_grad():
        expected = toys.denoise(net, timesteps, batch=3)
    assert torch.equal(toys.denoise(group, timesteps, batch=3), expected)


def test_tidied_up_it_starts_over(toy_group):
    group, net = toy_group(toys.PLANS[0])
    timesteps = [900, 700, 500, 300, 100]
    group.begin(timesteps)
    first = toys.denoise(group, timesteps)
    group.tidy()
    with torch.no_grad():  # in the warm-up
        assert torch.equal(toys.denoise(group, timesteps[:2]), toys.denoise(net, timesteps[:2]))
    group.tidy()
    group.begin(timesteps)
    assert torch.equal(toys.denoise(group, timesteps), first)


def test_random_networks_cover_two_three_and_four_segments_both_linear_and_wrapped():
    explicit = {(plan.segments, plan.cuts[0] != "blocks.0") for plan in toys.PLANS if plan.cuts}
    assert explicit == {(n, wrapped) for n in (2, 3, 4) for wrapped in (False, True)}


@pytest.fixture
def wrapped_unet(golden_group):
    """A group of two and the model itself; every test has its own run."""
    group = golden_group(*WRAPPED)
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


@pytest.mark.parametrize("form", ["channels_last", "bfloat16"])
def test_memory_format_and_dtype_of_the_module(form):
    net = toys.random_net(seed=8)
    net = net.to(memory_format=torch.channels_last) if form == "channels_last" else net.to(getattr(torch, form))
    x, kwargs = toys.inputs(0)
    x, context = x.to(net.scale.dtype), kwargs["context"].to(net.scale.dtype)
    if form == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), running(net, Plan(warmup=2), family=TOY) as group:
        for t in (600, 30):
            routed, expected = group(x, t, context), net(x, t, context)
            assert routed.dtype == expected.dtype
            assert torch.equal(routed, expected)
        assert group(x, 10, context).dtype == x.dtype  # an asynchronous call, too
