"""The same laws on CUDA devices. Two ranks on one GPU talk through gloo, on two GPUs through NCCL."""

import pytest
import torch

from asyncdiff_nodes.engine import Placement, Plan, Simulator, WorkerGroup
from asyncdiff_nodes.engine.tensors import tensors_of
from toys import TOY, TRANSFORMER, ToyTransformer, denoise, random_net

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TIMESTEPS = [900, 700, 500, 300, 200, 100]
PLACES = [
    ["cuda:0", "cuda:0"],
    pytest.param(["cuda:0", "cuda:1"], marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="only one GPU")),
    ["cuda:0", "cpu"],
]


@pytest.fixture(scope="module", autouse=True)
def same_kernels():
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


@pytest.mark.parametrize("devices", PLACES)
@pytest.mark.parametrize("forecast", [0, 1])
def test_asynchronous_run_equals_the_simulation(devices, forecast):
    plan, net = Plan(warmup=2, forecast=forecast), random_net(3).cuda()
    with Simulator(net, plan, family=TOY) as simulator:
        expected = denoise(lambda x, t, context: simulator(x.cuda(), t, context=context.cuda()).cpu(), TIMESTEPS)
    with WorkerGroup(net, plan, devices, family=TOY) as group:
        group.begin(TIMESTEPS)
        actual = denoise(group, TIMESTEPS)
        stats = group.stats()
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert stats.bytes_sent == stats.planned_bytes * len(TIMESTEPS)
    assert all(record.compute > 0 and record.end >= record.start for record in stats.records)


@pytest.mark.parametrize("devices", PLACES)
@torch.no_grad()
def test_hidden_states_are_made_afresh(devices):
    """Where blocks add what does not depend on the sample, nothing is stale, whatever the samples."""
    net, plan = ToyTransformer(mix=0).cuda(), Plan(warmup=2)
    generator = torch.Generator().manual_seed(0)
    samples, context = torch.randn(len(TIMESTEPS), 2, 6, 4, generator=generator), torch.randn(2, 3, 8, generator=generator).cuda()
    with WorkerGroup(net, plan, devices, family=TRANSFORMER) as group:
        group.begin(TIMESTEPS)
        for x, t in zip(samples.cuda(), TIMESTEPS, strict=True):
            torch.testing.assert_close(group(x, t, context=context), net(x, t, context=context), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("devices", PLACES[:2])
def test_synchronous_run_is_bit_identical(devices):
    net = random_net(4).cuda()
    expected = denoise(lambda x, t, context: net(x.cuda(), t, context=context.cuda()).detach().cpu(), TIMESTEPS)
    with WorkerGroup(net, Plan(warmup=len(TIMESTEPS)), devices, family=TOY) as group:
        assert torch.equal(denoise(group, TIMESTEPS), expected)


@pytest.mark.parametrize("devices", PLACES)
def test_blocks_move_and_are_timed(devices):
    net = random_net(4).cuda()
    plan = Plan(warmup=len(TIMESTEPS), forecast=0)
    expected = denoise(lambda x, t, context: net(x.cuda(), t, context=context.cuda()).detach().cpu(), TIMESTEPS)
    with WorkerGroup(net, plan, devices, family=TOY) as group:
        graph, here = group.placement.graph, group.placement.starts
        there = next(starts for starts in ((0, 2), (0, 5)) if starts != here)
        for starts in (there, here):
            group.move(Placement(graph, plan, starts), lambda names: tensors_of(net))
            group.begin(TIMESTEPS)
            actual = denoise(group, TIMESTEPS)
            records = group.stats().records
            assert all(sum(record.blocks.values()) <= record.compute + 1e-3 for record in records)
            assert {name for record in records for name in record.blocks} == set(graph.names)
            if "cpu" not in devices:
                assert torch.equal(actual, expected)


def test_memory_is_given_back():
    net = random_net(5).cuda()
    before = torch.cuda.mem_get_info(0)[0]
    with WorkerGroup(net, Plan(), ["cuda:0", "cuda:0"], family=TOY) as group:
        denoise(group, TIMESTEPS)
        assert torch.cuda.mem_get_info(0)[0] < before
    assert torch.cuda.mem_get_info(0)[0] >= before - 2**20
