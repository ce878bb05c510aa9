"""Bands: one call on several ranks, each with a part of the tokens or rows, gives the model's result up to rounding."""

import os
import signal
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch
from torch import nn

import banded
import unlisted
from asyncdiff_nodes.engine import (
    InputChangedError,
    Placement,
    Plan,
    PlanError,
    RankOptions,
    Simulator,
    UnsupportedModelError,
    WorkerError,
    WorkerGroup,
    place,
)

NEAR = 1e-5  # relative
TIMESTEPS = [900, 800, 700, 600, 500, 400, 300, 200]


def flux(height=12, heads=4):
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=heads, joint_attention_dim=32,
        pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    ids = torch.stack([torch.zeros(height, 10), *torch.meshgrid(torch.arange(height), torch.arange(10), indexing="ij")], -1)

    def call(batch):
        return (), {
            "hidden_states": torch.randn(batch, height * 10, 64), "encoder_hidden_states": torch.randn(batch, 9, 32),
            "pooled_projections": torch.randn(batch, 16), "timestep": torch.full((batch,), 0.5), "img_ids": ids.reshape(-1, 3),
            "txt_ids": torch.zeros(9, 3), "return_dict": False,
        }  # fmt: skip

    return net, call


def wan():
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=128,
        num_layers=2,
    )  # fmt: skip
    given = {"timestep": torch.tensor([5]), "return_dict": False}
    return net, lambda batch: (
        (),
        {**given, "hidden_states": torch.randn(batch, 4, 3, 14, 10), "encoder_hidden_states": torch.randn(batch, 7, 32)},
    )


def unet(height, width=16):
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    return net, lambda batch: (
        (torch.randn(batch, 4, height, width), torch.tensor(5), torch.randn(batch, 7, 16)),
        {"return_dict": False},
    )


def joint():
    def call(batch):
        mask = torch.rand(batch, 6) > 0.3
        return (torch.randn(batch, 4, 8, 8), torch.full((batch,), 300.0), torch.randn(batch, 6, unlisted.WIDTH), mask), {}

    return banded.JointTransformer(), call


def odd(net):
    def call(batch):
        return (torch.randn(batch, 5, unlisted.WIDTH), torch.full((batch,), 300.0), torch.randn(batch, 4, 8, 8)), {}

    return net, call


def marked(own=6):
    def call(batch):
        return (torch.randn(batch, 4, 8, 8), torch.full((batch,), 300.0), torch.randn(batch, 6, unlisted.WIDTH), own), {}

    return banded.MarkedTransformer(), call


NETS = {
    "tokens": lambda: odd(unlisted.OddTransformer()),
    "joint streams with a mask": joint,
    "parts told by numbers": marked,
    "parts told by an object": lambda: marked(banded.Layout(6)),
    "flux": flux,
    "wan": wan,
    "unet": lambda: unet(16),
    "unet of odd size": lambda: unet(19, 17),
}


def compared(net, call, ranks, batch=1, **plan):
    torch.manual_seed(0)
    net = net.eval()
    args, kwargs = call(batch)
    with torch.inference_mode():
        expected = net(*args, **kwargs)
    with WorkerGroup(net, Plan(segments=1, bands=ranks, **plan), ["cpu"] * ranks * plan.get("branches", 1)) as group:
        group.begin()
        for _ in range(2):
            result = group(*args, **kwargs)
        stats = group.stats()
    expected, result = (each if isinstance(each, torch.Tensor) else each[0] for each in (expected, result))
    assert (result - expected).abs().max() <= NEAR * expected.abs().max()
    assert stats.bytes_per_call == stats.planned_band_bytes > 0
    return stats


@pytest.mark.parametrize("name", NETS)
def test_bands_are_the_model(name):
    compared(*NETS[name](), ranks=2)


@pytest.mark.parametrize(("ranks", "batch"), [(3, 3), pytest.param(4, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        each if each in ("joint streams with a mask", "unet of odd size") else pytest.param(each, marks=pytest.mark.slow)
        for each in NETS
    ],
)
def test_more_ranks_and_items(name, ranks, batch):
    compared(*NETS[name](), ranks=ranks, batch=batch)


def test_heads_are_traded_where_that_is_fewer_bytes():
    two, three = (compared(*flux(heads=6), ranks=ranks).planned_band_bytes for ranks in (2, 3))
    assert three < 1.5 * two, "keys and values of all would be twice as many"


def test_branches_have_bands_of_their_own():
    stats = compared(*unet(16), ranks=2, batch=2, branches=2)
    assert len(stats.ranks) == 4


def test_every_rank_has_the_whole_network():
    net, call = odd(unlisted.OddTransformer())
    stats = compared(net, call, ranks=2)
    whole = sum(weight.nbytes for weight in net.parameters())
    assert [rank.weight_bytes for rank in stats.ranks] == [whole, whole]


def test_the_simulator_is_the_model():
    net, call = odd(unlisted.OddTransformer().eval())
    args, kwargs = call(1)
    with torch.inference_mode():
        expected = net(*args, **kwargs)
        with Simulator(net, Plan(segments=1, bands=2), example_inputs=(args, kwargs)) as simulator:
            assert torch.equal(simulator(*args, **kwargs), expected)


@pytest.mark.parametrize("layer", banded.MIXING, ids=lambda layer: layer.__name__)
def test_what_needs_all_tokens_is_refused_by_name(layer):
    net, call = odd(banded.mixing(layer).eval())
    args, kwargs = call(1)
    with (
        pytest.raises(UnsupportedModelError, match=f"cannot be computed in bands .*{banded.MIXING[layer]}"),
        WorkerGroup(net, Plan(segments=1, bands=2), example_inputs=(args, kwargs)),
    ):
        pass


def test_tokens_that_are_looked_at_in_halves_are_bands_of_each_half():
    compared(*odd(banded.mixing(banded._Paired)), ranks=2)


def test_what_exchanges_something_else_than_was_found_out_fails_by_name():
    """Its picture would be a wrong one."""
    net, call = odd(banded.mixing(banded._Unseen).eval())
    args, kwargs = call(1)
    with WorkerGroup(net, Plan(segments=1, bands=2), example_inputs=(args, kwargs)) as group:
        group.begin()
        with pytest.raises(WorkerError, match="exchanges something else than was found out"):
            group(*args, **kwargs)


@torch.inference_mode()
def test_other_numbers_may_be_other_parts():
    net, call = marked()
    args, _ = call(1)
    with WorkerGroup(net.eval(), Plan(segments=1, bands=2), example_inputs=call(1)) as group:
        for own in (6, 9):
            group.begin()
            expected = net(*args[:3], own)
            assert (group(*args[:3], own) - expected).abs().max() <= NEAR * expected.abs().max()
        with pytest.raises(InputChangedError, match=r"its bands are those of \[9\], not of \[6\]"):
            group(*args)


def test_other_parts_than_were_found_out_fail_by_name():
    """Nobody can tell by the arguments."""
    net, call = marked(banded.Layout(6))
    args, _ = call(1)
    with WorkerGroup(net.eval(), Plan(segments=1, bands=2), example_inputs=call(1)) as group:
        group.begin()
        with pytest.raises(WorkerError, match="exchanges something else than was found out"):
            group(*args[:3], banded.Layout(9))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(segments=2, warmup=3, cooldown=1, bands=2),
        Plan(segments=2, stride=2, warmup=3, bands=3),
        Plan(segments=2, warmup=3, forecast=0, bands=2),
        pytest.param(Plan(segments=3, warmup=2, bands=3), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["tokens", pytest.param("joint streams with a mask", marks=pytest.mark.slow)])
@torch.inference_mode()
def test_segments_whose_synchronous_calls_are_in_bands_are_the_simulators(name, plan):
    net, call = NETS[name]()
    net, calls = net.eval(), [call(1) for _ in range(len(TIMESTEPS))]
    with Simulator(net, plan, example_inputs=calls[0]) as simulator:
        expected = denoised(simulator, *calls[0])
    with WorkerGroup(net, plan, ["cpu"] * plan.world_size, example_inputs=calls[0]) as group:
        found, records = denoised(group, *calls[0]), group.stats().records
    assert (found - expected).abs().max() <= NEAR * expected.abs().max()
    # what the first asynchronous call reads is there after it, unless it is worked ahead
    last = plan.warmup if plan.forecast else plan.warmup - 1
    synchronous = {record.call for record in records if record.synchronous and not record.ahead}
    assert synchronous == {*range(plan.warmup), *range(len(TIMESTEPS) - plan.cooldown, len(TIMESTEPS))}
    assert {record.call for record in records if record.banded} == synchronous - ({last} if last < plan.warmup else set())


@torch.inference_mode()
def test_a_run_of_segments_may_do_without_bands():
    net, call = NETS["tokens"]()
    net, inputs, plan = net.eval(), call(1), Plan(segments=2, warmup=3, cooldown=1, bands=2)
    without = replace(plan, bands=1)
    with Simulator(net, without, example_inputs=inputs) as simulator:
        expected = denoised(simulator, *inputs)
    with WorkerGroup(net, plan, example_inputs=inputs) as group:
        found = [denoised(group, *inputs, plan=each) for each in (plan, without, plan)]
        with pytest.raises(PlanError, match="does not fit a group"):
            group.begin(TIMESTEPS, plan=replace(plan, segments=1))
        group.begin(TIMESTEPS, plan=without)
        group(*inputs[0], **inputs[1])
        assert not any(record.banded for record in group.stats().records)
    assert torch.equal(found[1], expected)
    assert torch.equal(found[0], found[2]) and (found[0] - expected).abs().max() <= NEAR * expected.abs().max()


def denoised(net, args, kwargs, **how):
    """The sample after a run of all steps."""
    args, position, times = list(args), *((2, 1) if len(args) == 3 else (0, 1))
    net.begin(TIMESTEPS, **how)
    for t in TIMESTEPS:
        args[times] = torch.full_like(args[times], t)
        args[position] = args[position] - 0.05 * net(*args, **kwargs)
    return args[position]


def test_segments_do_without_where_a_model_cannot_be_computed_so():
    net, call = odd(banded.mixing(banded._Mean).eval())
    args, kwargs = call(1)
    plan = Plan(segments=2, warmup=9, bands=2)
    with torch.inference_mode(), WorkerGroup(net, plan, example_inputs=(args, kwargs)) as group:
        assert torch.equal(group(*args, **kwargs), net(*args, **kwargs))
        assert group.plan.bands == 1 and "mean of all tokens" in group.bandless
        held = [rank.weight_bytes for rank in group.stats().ranks]
    assert max(held) < sum(weight.nbytes for weight in net.parameters()), "each has its part only"


@torch.inference_mode()
def test_blocks_that_move_leave_bands_as_they_are():
    net, call = odd(unlisted.OddTransformer().eval())
    args, kwargs = call(1)
    plan = Plan(segments=2, warmup=9, bands=2)
    with WorkerGroup(net, plan, example_inputs=(args, kwargs)) as group:
        for cut in ("layers.2", "layers.4"):
            moved = place(group.placement.graph, replace(plan, cuts=("layers.0", cut)))
            group.move(
                Placement(group.placement.graph, plan, moved.starts),
                lambda names: [] if not names else pytest.fail(f"{names} are there"),
            )
            expected = net(*args, **kwargs)
            assert (group(*args, **kwargs) - expected).abs().max() <= NEAR * expected.abs().max()


def test_compiled_blocks():
    net, call = odd(unlisted.OddTransformer().eval())
    args, kwargs = call(1)
    ranks = RankOptions(compile={"backend": "eager"})
    with torch.inference_mode(), WorkerGroup(net, Plan(segments=1, bands=2), example_inputs=(args, kwargs), ranks=ranks) as group:
        expected = net(*args, **kwargs)
        assert (group(*args, **kwargs) - expected).abs().max() <= NEAR * expected.abs().max()


def test_bands_narrower_than_a_convolution_reaches_are_refused():
    call = (torch.tensor([3.0]), torch.randn(1, 5, unlisted.WIDTH), torch.randn(1, 4, 4, 4))
    with pytest.raises(UnsupportedModelError, match="a convolution reaches 3 rows far, and a band has 2"):
        WorkerGroup(banded.Reaching().eval(), Plan(segments=1, bands=2), example_inputs=(call, {}))


def test_too_small_a_picture_is_refused():
    net, _ = odd(unlisted.OddUNet().eval())
    call = (torch.tensor([3.0]), torch.randn(1, 5, unlisted.WIDTH), torch.randn(1, 4, 4, 4))
    with pytest.raises(UnsupportedModelError, match="4 rows in steps of 2 are too few for 3 ranks"):
        WorkerGroup(net, Plan(segments=1, bands=3), ["cpu"] * 3, example_inputs=(call, {}))


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_dies_in_a_call_stops_nobody(victim):
    net, call = odd(banded.mixing(banded.Slow).eval())
    args, kwargs = call(1)
    group = WorkerGroup(net, Plan(segments=1, bands=2), example_inputs=(args, kwargs))
    pids = group.pids
    threading.Timer(0.5, os.kill, (pids[victim], signal.SIGKILL)).start()
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=rf"rank {victim} .*killed by signal 9"):
        group(*args, **kwargs)
    assert time.monotonic() - begin < 10 and group.closed
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize("wrong", [{"bands": 0}, {"bands": True}, {"bands": 2, "segments": 3}])
def test_wrong_plans_are_refused_by_name(wrong):
    with pytest.raises(PlanError, match="bands"):
        Plan(**{"segments": 1, **wrong})


def test_too_few_devices_are_named():
    with pytest.raises(Exception, match=r"bands=3: name branches \* bands = 3 devices"):
        WorkerGroup(nn.Linear(1, 1), Plan(segments=1, bands=3), ["cpu"] * 2)
