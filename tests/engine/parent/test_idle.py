"""Processes that one group releases and another one takes: they bring nothing along."""

import gc
import os
import signal
import time
from dataclasses import replace

import psutil
import pytest
import torch
from test_faults import assert_gone, ours, said, script
from torch import nn

import toys
from asyncdiff_nodes.engine import GroupClosedError, IdleWorkers, Plan, RankOptions, Simulator, WorkerError, WorkerGroup
from toys import TOY

STEPS = [9, 8, 7, 6, 5]


def group(net, plan=None, **options):
    plan = plan or Plan(warmup=2)
    ranks = RankOptions(threads_per_rank=1, **options)
    return WorkerGroup(net, plan, ["cpu"] * plan.world_size, family=TOY, ranks=ranks)


def draw(call):
    with torch.no_grad():
        return toys.denoise(call, STEPS)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Plan(warmup=2, forecast=0), marks=pytest.mark.slow),
        pytest.param(Plan(warmup=2), marks=pytest.mark.slow),
        Plan(3, warmup=1),
        Plan(2, stride=2, warmup=1),
    ],
    ids=str,
)
def test_another_group_computes_in_the_same_processes(folder, plan):
    first = group(toys.random_net(5))
    pids = first.pids
    draw(first)  # the last call's values are still on their way
    idle = first.release()
    with pytest.raises(GroupClosedError, match="is closed: start a new one"):
        first.begin()
    assert first.closed and all(map(psutil.pid_exists, pids)) and list(folder.iterdir()) == []
    net = toys.random_net(3)
    with group(net, plan, idle=idle) as second:
        assert second.pids[:2] == pids
        second.begin(STEPS)
        with Simulator(net, plan, family=TOY) as simulator:
            simulator.begin(STEPS)
            torch.testing.assert_close(draw(second), draw(simulator), rtol=0, atol=1e-5)
        second.begin(STEPS, plan=replace(plan, warmup=9))
        assert torch.equal(draw(second), draw(net))
        pids = second.pids
    assert_gone(pids, within=0.5)


def test_those_that_nobody_takes_end(folder):
    idle = group(toys.chain(*[toys.ToyBlock] * 4), Plan(3)).release()
    with group(toys.random_net(1), idle=idle) as taken:
        (left,) = [worker.process.pid for worker in idle._workers]
        assert psutil.pid_exists(left) and left not in taken.pids
        idle.close()
        idle.close()
        assert_gone([left], within=0.5)
        draw(taken)
        pids = taken.pids
        idle = taken.release()
    assert all(map(psutil.pid_exists, pids))
    del idle
    gc.collect()
    assert_gone(pids, within=0.5)


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_one_that_died_meanwhile_is_replaced(folder):
    idle = group(toys.random_net(1)).release()
    dead, alive = [worker.process.pid for worker in idle._workers]
    os.kill(dead, signal.SIGKILL)
    time.sleep(0.3)
    with group(toys.random_net(1), idle=idle) as g:
        assert alive in g.pids and dead not in g.pids
        draw(g)
        idle.close()


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_a_group_that_has_failed_releases_none(folder):
    g = group(toys.random_net(1))
    pids = g.pids
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerError):
        draw(g)
    assert g.release().take("cpu") is None
    assert_gone(pids, within=0.5)


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_ranks_that_do_not_answer_are_ended(folder):
    g = group(toys.random_net(1))
    pids = g.pids
    os.kill(pids[0], signal.SIGSTOP)
    begin = time.monotonic()
    assert g.release().take("cpu") is None
    assert time.monotonic() - begin < 15.0
    assert_gone(pids, within=0.5)


def test_of_another_device_are_not_taken():
    assert IdleWorkers().take("cpu") is None
    with group(toys.random_net(1)) as g:
        idle = g.release()
        assert idle.take("cuda:0") is None and idle.take("cpu") is not None


class Heavy(toys.ToyBlock):
    """Has 64 MiB of weights of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.heavy = nn.Parameter(torch.ones(2**24))


@pytest.mark.parametrize("how", [None, {"backend": "eager"}], ids=["plain", "compiled"])
def test_weights_and_values_are_gone(folder, how):
    first = group(toys.chain(Heavy, Heavy), Plan(cuts=("blocks.0", "blocks.1")), compile=how)
    draw(first)
    loaded = [psutil.Process(pid).memory_info().rss for pid in first.pids]
    with group(toys.chain(toys.ToyBlock, toys.ToyBlock), idle=first.release()) as second:
        freed = [before - psutil.Process(pid).memory_info().rss for before, pid in zip(loaded, second.pids, strict=True)]
        assert min(freed) > 60 * 2**20, freed
        draw(second)


TAKEN = "group = WorkerGroup(toys.slow_net(0.0), family=toys.TOY, ranks=RankOptions(threads_per_rank=1, idle=idle))"


@pytest.mark.parametrize("then", [pytest.param("", marks=pytest.mark.slow), TAKEN], ids=["idle", "taken"])
def test_a_killed_parent_leaves_neither_processes_nor_files(tmp_path, then):
    process, pids = script(tmp_path, f"idle = group.release()\n{then}\nprint('ready', flush=True)\nimport time; time.sleep(60)\n")
    assert next(said(process)) == "ready\n"
    assert all(map(psutil.pid_exists, pids))
    process.kill()
    process.wait()
    process.stdout.close()
    assert_gone(pids, within=5.0)
    assert ours(tmp_path) == []
