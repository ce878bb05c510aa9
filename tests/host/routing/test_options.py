"""Bad options: an error that names the input, the value and the cure, before anything is started."""

from dataclasses import replace

import pytest

from asyncdiff_nodes.engine import DeviceError, PlanError
from asyncdiff_nodes.host.choices import ALWAYS
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import OneDeviceError, Options
from helpers import small
from helpers.sampling import EXACT, exact, ksampler, segmented


@pytest.mark.parametrize(
    "options, error, words",
    [
        (Options(preset="Ludicrous"), PlanError, "preset='Ludicrous'.*Exact, Balanced, Fast, Turbo, Custom"),
        (Options(devices="cpu,gpu"), DeviceError, "'gpu' is not a device"),
        (Options(devices="cpu,cuda:7"), DeviceError, "'cuda:7' does not exist"),
        (Options(devices="ray://203.0.113.5:10001"), DeviceError, "no address is taken from a workflow.*RAY_ADDRESS=ray://203"),
        (Options("Custom", "cpu,cpu", segments=3), PlanError, "segments=3 with stride=1 and branches=1 needs 3 devices.*are 2"),
        (Options("Custom", "cpu,cpu", stride=2), PlanError, "stride=2 with branches=1 needs 3 devices"),
        (Options("Custom", "cpu,cpu,cpu", stride=2, branches=2), PlanError, "stride=2 with branches=2 needs 6 devices"),
        (Options("Custom", "cpu,cpu", branches=-1), PlanError, "branches=-1"),
        (Options("Custom", "cpu,cpu,cpu", segments=2, branches=2), PlanError, "segments=2 .*branches=2 needs 4 devices.*are 3"),
        (Options("Custom", "cpu,cpu", segments=-1), PlanError, "segments=-1"),
        (Options("Custom", "cpu,cpu", segments=2, warmup=0), PlanError, "warmup=0"),
        (Options("Custom", "cpu,cpu", segments=2, stride=9), PlanError, "stride=9"),
        (Options("Custom", "cpu,cpu", cooldown=-1), PlanError, "cooldown=-1"),
        (Options("Custom", "cpu,cpu", speedup=0.5), PlanError, "speedup=0.5"),
        (Options("Balanced", "cpu,cpu", cuts="input_blocks.3"), PlanError, "1 cuts for 2 segments"),
    ],
)
def test_refused(options, error, words):
    with pytest.raises(error, match=words):
        attach(small.model("sd15"), options)


def test_unknown_cut_is_named_when_sampling(sd15, prompts):
    model = attach(sd15, Options(devices="cpu,cpu", cuts="input_blocks.1, decoder.7"))
    with pytest.raises(PlanError, match=r"unknown cut 'decoder.7'.*output_blocks"):
        ksampler(model, prompts)


@pytest.mark.parametrize(
    "options, segments, stride, warmup, ranks",
    [
        (Options(devices="cpu,cpu"), 2, 1, 3, 2),
        (Options("Fast", "cpu cpu"), 2, 1, 2, 2),
        (Options("Fast", "cpu;cpu;cpu;cpu"), 4, 1, 2, 4),
        (Options("Turbo", "cpu cpu"), 2, 1, 2, 2),
        (Options("Turbo", "cpu;cpu;cpu;cpu"), 3, 2, 3, 4),
        (Options("Exact", "cpu,cpu,cpu"), 3, 1, ALWAYS, 3),
        (Options("Custom", "cpu,cpu,cpu", segments=2, stride=1, warmup=5), 2, 1, 5, 2),
        (Options("Custom", "cpu,cpu,cpu", stride=2), 2, 2, 3, 3),
    ],
)
def test_presets(options, segments, stride, warmup, ranks):
    plan, devices = options.resolve()
    assert (plan.segments, plan.stride, plan.warmup) == (segments, stride, warmup)
    assert devices == ("cpu",) * ranks
    assert plan.fresh_skips is (options.preset not in ("Fast", "Turbo") or stride == 2)  # Turbo on two devices is Fast
    assert plan.cooldown == options.cooldown == 1


@pytest.mark.parametrize(
    "options, branches, segments, stride",
    [
        (Options(devices="cpu,cpu"), 2, 1, 1),
        (Options("Fast", "cpu,cpu"), 2, 1, 1),
        (Options("Turbo", "cpu,cpu"), 2, 1, 1),
        (Options(devices="cpu,cpu,cpu"), 1, 3, 1),
        (Options(devices="cpu,cpu,cpu,cpu"), 2, 2, 1),
        (Options("Turbo", "cpu,cpu,cpu,cpu"), 1, 3, 2),
        (Options("Turbo", "cpu,cpu,cpu,cpu,cpu,cpu"), 2, 2, 2),
        (Options("Exact", "cpu,cpu,cpu,cpu"), 1, 4, 1),
        (Options(devices="cpu,cpu", cuts="input_blocks.1,output_blocks.2"), 1, 2, 1),
        (Options("Custom", "cpu,cpu"), 2, 1, 1),
        (Options("Custom", "cpu,cpu", branches=1), 1, 2, 1),
        (Options("Custom", "cpu,cpu,cpu,cpu", segments=2), 1, 2, 1),
        (Options("Custom", "cpu,cpu,cpu", branches=3), 3, 1, 1),
    ],
)
def test_branches_where_there_is_work_for_two(options, branches, segments, stride):
    plan, devices = options.resolve(items=2)
    assert (plan.branches, plan.segments, plan.stride) == (branches, segments, stride)
    assert len(devices) == plan.world_size
    if not options.branches:
        assert options.resolve()[0].branches == 1


@pytest.mark.parametrize(
    "options, items, microbatches",
    [
        (Options(devices="cpu,cpu,cpu"), 1, 1),
        (Options(devices="cpu,cpu,cpu"), 2, 2),
        (Options(devices="cpu,cpu,cpu"), 3, 2),
        (Options("Exact", "cpu,cpu,cpu"), 2, 1),
        (Options("Custom", "cpu,cpu", segments=2), 2, 2),
        (Options(devices="cpu,cpu,cpu,cpu"), 2, 1),
        (Options(devices="cpu,cpu,cpu,cpu"), 4, 2),
    ],
)
def test_micro_batches_where_a_branch_has_several_items(options, items, microbatches):
    assert options.resolve(items)[0].microbatches == microbatches


def test_custom_may_do_without_a_cool_down():
    plan, _ = Options("Custom", "cpu,cpu", cooldown=0).resolve()
    assert plan.cooldown == 0


def test_one_device():
    with pytest.raises(OneDeviceError, match="--cuda-device all"):
        Options().resolve()
    with pytest.raises(OneDeviceError, match="only one device"):
        Options(devices="cpu").resolve()


def test_a_run_too_short_for_an_asynchronous_step_says_so(sd15, prompts):
    def notes(steps, options):
        ksampler(attach(sd15, options), prompts, steps=steps, cfg=1.0, scheduler="simple")
        return last_run().notes

    (note,) = notes(4, segmented(warmup=3))
    assert note.startswith("all of these 4 steps are synchronous") and "warm-up of 3 and the cool-down of 1" in note
    assert notes(5, segmented(warmup=3)) == notes(4, segmented(warmup=2)) == notes(4, exact()) == ()
    assert notes(4, Options(devices="cpu,cpu")) == (), "in bands, synchronous steps are fast as well"


def test_no_step_at_all_is_the_host_s_own(sd15):
    """The end of a split schedule may hold one sigma and no step."""
    import comfy.sample
    import comfy.samplers
    import torch

    latent = small.latent()["samples"]
    arguments = latent, 5.0, comfy.samplers.sampler_object("euler"), torch.tensor([0.0])
    positive = negative = small.conditioning("sd15", 1)
    found = comfy.sample.sample_custom(attach(sd15, EXACT), *arguments, positive, negative, latent)
    assert torch.equal(found, comfy.sample.sample_custom(sd15, *arguments, positive, negative, latent))
    assert "no step" in last_run().notes[0]


def test_noise_levels_that_make_no_sense_are_left_to_the_sampler(sd15, prompts):
    """A schedule from another node may hold anything; the picture is then what the host alone would make of it."""
    import comfy.sample
    import comfy.samplers
    import torch

    sigmas = torch.tensor([14.0, 5.0, float("nan"), 1.0, 0.0])
    (positive, negative), latent = prompts, small.latent()["samples"]
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))

    def sample(model):
        sampler = comfy.samplers.sampler_object("euler")
        return comfy.sample.sample_custom(model, noise, 5.0, sampler, sigmas, positive, negative, latent)

    expected, got = sample(sd15), sample(attach(sd15, EXACT))
    assert torch.equal(torch.nan_to_num(expected), torch.nan_to_num(got))


def test_the_warm_up_follows_from_the_speed_up_wanted(sd15, prompts):
    def sample(speedup):
        ksampler(attach(sd15, Options("Custom", "cpu,cpu", branches=1, speedup=speedup)), prompts, steps=20)
        return last_run()

    def gain(record, warmup):
        plan = replace(record.plan, warmup=warmup, cooldown=2)  # the leap of this schedule is its last call but one
        return 20 / record.placement.cost(20, plan=plan)

    record = sample(1.4)
    assert gain(record, record.plan.warmup) >= 1.4 > gain(record, record.plan.warmup + 1) and not record.notes
    record = sample(1.1)  # to be had with parallel synchronous steps alone
    assert record.plan.warmup == 20 and not record.notes
    record = sample(2.0)
    (note,) = record.notes
    assert note.startswith("speedup=2 is out of reach: 20 steps") and record.plan.warmup == 1
