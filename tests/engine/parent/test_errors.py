"""Wrong input is refused by name, with its value and the cure, and does no harm to the group."""

import multiprocessing

import pytest
import torch

import toys
from asyncdiff_nodes.engine import (
    AsyncDiffError,
    DeviceError,
    InputChangedError,
    Plan,
    PlanError,
    RankOptions,
    ScheduleError,
    UnsupportedModelError,
    WorkerGroup,
    find_family,
)
from toys import BATCHES, PLAIN, TOY, ToyBlock

TIMESTEPS = [900, 700, 500, 300, 100, 1]


@pytest.fixture(autouse=True)
def no_new_process():
    before = set(multiprocessing.active_children())
    yield
    left = set(multiprocessing.active_children()) - before
    assert all(process.name.startswith("asyncdiff-rank") for process in left)


def refused(error, match, net=None, plan=None, devices=("cpu", "cpu"), threads=1, **options):
    """Starting this group raises, and leaves neither a process nor a file."""
    before = set(multiprocessing.active_children())
    options = {"family": TOY, **options}
    with pytest.raises(error, match=match) as info:
        ranks = RankOptions(threads_per_rank=threads)
        WorkerGroup(net or toys.chain(ToyBlock, ToyBlock), plan or Plan(), devices, ranks=ranks, **options)
    assert isinstance(info.value, AsyncDiffError)
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize(
    ("plan", "devices", "needed"),
    [
        (Plan(), ["cpu"], 2),
        (Plan(), ["cpu"] * 3, 2),
        (Plan(), [], 2),
        (Plan(stride=2), ["cpu"] * 2, 3),
        (Plan(segments=3, stride=2), ["cpu"] * 3, 4),
    ],
    ids=str,
)
def test_wrong_number_of_devices(plan, devices, needed):
    message = rf"{len(devices)} devices for segments={plan.segments}, stride={plan.stride}, branches=1: .* = {needed} devices"
    refused(DeviceError, message, plan=plan, devices=devices)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["cpu", "cuda:99"], r"'cuda:99' does not exist"),
        (["cpu", "banana"], r"'banana' is not a device: use cpu, cuda:0"),
        (["cpu", "cuda:-1"], r"'cuda:-1' is not a device"),
        (["cpu", None], r"None is not a device"),
        ("cpu", r"devices must be a sequence such as \['cuda:0', 'cuda:1'\], not 'cpu'"),
        (["cpu", "meta"], r"'meta' "),
    ],
)
def test_device_that_is_none(devices, message):
    refused(DeviceError, message, devices=devices)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_impossible_number_of_threads(threads):
    refused(DeviceError, r"threads_per_rank=.*whole number of 1 or more", threads=threads)


class OneLayer(torch.nn.Linear):
    def forward(self, sample, timestep):
        return super().forward(sample) * timestep


def test_model_without_parts():
    inputs = (torch.zeros(2, 2), 0.5), {}
    refused(UnsupportedModelError, r"OneLayer has no parts", OneLayer(2, 2), family=None, example_inputs=inputs)


def test_more_segments_than_blocks():
    refused(PlanError, r"only 2 blocks: choose fewer segments", plan=Plan(segments=3), devices=["cpu"] * 3)


def test_unknown_cut():
    refused(PlanError, r"unknown cut 'blocks.7'.*Blocks in order: blocks.0, blocks.1", plan=Plan(cuts=("blocks.0", "blocks.7")))


def test_module_that_does_not_pickle(own_tmp):
    net = toys.chain(ToyBlock, ToyBlock)
    net.callback = lambda x: x
    refused(UnsupportedModelError, r"this ToyNet cannot be sent to a worker process .*no lambdas or hooks", net)
    assert not list(own_tmp.iterdir())


def test_module_on_the_meta_device(own_tmp):
    refused(
        UnsupportedModelError,
        r"weight .* is on the meta device: load the model before",
        toys.chain(ToyBlock, ToyBlock).to("meta"),
    )
    assert not list(own_tmp.iterdir())


def test_inputs_of_the_trace_that_do_not_fit():
    inputs = (torch.empty(2, 3, 8, 8), 0), {"context": torch.empty(2, 3)}
    with pytest.raises(RuntimeError, match="channel"):
        WorkerGroup(toys.chain(ToyBlock, ToyBlock), Plan(), family=TOY, example_inputs=inputs)


def still_works(group, net):
    group.begin(TIMESTEPS)
    with torch.no_grad():
        expected = toys.denoise(net, TIMESTEPS[: group.plan.warmup])
    assert torch.equal(toys.denoise(group, TIMESTEPS[: group.plan.warmup]), expected)


def test_stride_without_a_schedule(toy_group):
    group, net = toy_group(BATCHES)
    group.begin()
    with pytest.raises(ScheduleError, match=r"stride=2 needs the whole schedule: call begin\(timesteps\)"):
        toys.denoise(group, TIMESTEPS)
    still_works(group, net)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_timestep_that_departs_from_the_schedule(toy_group, k):
    group, net = toy_group(BATCHES)
    group.begin(TIMESTEPS)
    wrong = [*TIMESTEPS[:k], TIMESTEPS[k] + 50, *TIMESTEPS[k + 1 :]]
    message = rf"call {k + 1} has timestep {wrong[k]}, but begin\(\) announced {TIMESTEPS[k]}: .*stride=1"
    if k == 0:
        message = rf"stream None begins at timestep {wrong[0]}, which is none of those .*stride=1"
    with pytest.raises(ScheduleError, match=message):
        toys.denoise(group, wrong)
    still_works(group, net)


def test_more_calls_than_announced(toy_group):
    group, net = toy_group(BATCHES)
    for count in (2, 6):  # within the warm-up, and after it
        group.begin(TIMESTEPS[:count])
        with pytest.raises(ScheduleError, match=rf"call {count + 1} of a run that was begun with {count} timesteps"):
            toys.denoise(group, [*TIMESTEPS[:count], 0])
    still_works(group, net)


@pytest.mark.parametrize("timesteps", [[], torch.tensor([])], ids=repr)
def test_empty_schedule(toy_group, timesteps):
    group, net = toy_group(PLAIN)
    with pytest.raises(ScheduleError, match="timesteps is empty"):
        group.begin(timesteps)
    still_works(group, net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 3}, r"stream None changed within a run \(.*\(2, 4, 8, 8\).* became .*\(3, 4, 8, 8\)"),
        ({"doubled": True}, r"stream None changed within a run \(other arguments\)"),
    ],
)
def test_inputs_that_change_within_a_run(toy_group, change, message):
    group, net = toy_group(PLAIN)
    group.begin()
    toys.denoise(group, TIMESTEPS[:2])
    with pytest.raises(InputChangedError, match=message):
        toys.denoise(group, TIMESTEPS[2:3], **change)
    toys.denoise(group, TIMESTEPS[2:3])  # as before: the run goes on
    toys.denoise(group, TIMESTEPS[2:3], stream="another", **change)
    still_works(group, net)
    group.begin()
    with torch.no_grad():
        assert torch.equal(toys.denoise(group, TIMESTEPS[:2], **change), toys.denoise(net, TIMESTEPS[:2], **change))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_that_changes_within_a_run(toy_group, dtype):
    group, net = toy_group(PLAIN)
    group.begin()
    x, kwargs = toys.inputs(0)
    group(x, 900, **kwargs)
    with pytest.raises(InputChangedError, match=r"torch.float32\) became .*" + str(dtype)):
        group(x.to(dtype), 700, **kwargs)
    still_works(group, net)


def test_input_that_the_model_itself_refuses(toy_group):
    group, net = toy_group(PLAIN)
    group.begin()
    x, kwargs = toys.inputs(0)
    with pytest.raises(RuntimeError, match="channel"):
        group(x[:, :3], 900, **kwargs)
    with pytest.raises(TypeError, match="banana"):
        group(x, 900, banana=1, **kwargs)
    still_works(group, net)


def test_missing_timestep(toy_group):
    group, _ = toy_group(PLAIN)
    x, kwargs = toys.inputs(0)
    with pytest.raises(TypeError, match="missing argument 'timestep'"):
        group(x, **kwargs)


def test_autocast(toy_group):
    """Its state is this process's: the ranks would compute in another precision."""
    group, _ = toy_group(toys.PLAIN)
    group.begin(TIMESTEPS)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UnsupportedModelError, match="autocast"):
        toys.denoise(group, TIMESTEPS)


def test_find_family_names_what_is_supported():
    with pytest.raises(UnsupportedModelError, match=r"listed: .*UNet2DConditionModel.*found out in its first call"):
        find_family(torch.nn.Linear(1, 1))
