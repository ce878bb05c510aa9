"""The same laws with ranks that Ray places on two machines: here two nodes of one machine, on addresses of their own."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from test_faults import assert_gone

import toys
from asyncdiff_nodes.engine import (
    CallRecord,
    DeadlineError,
    DeviceError,
    GroupClosedError,
    Plan,
    RankOptions,
    Simulator,
    WorkerError,
    WorkerGroup,
)
from asyncdiff_nodes.engine.devices import resolve_devices
from ray_cluster import BOTH, HOSTS, needs_linux, ray, two_nodes, until
from toys import TOY, denoise, random_net

pytestmark = needs_linux

HERE = Path(__file__).parents[1]
TIMESTEPS = [900, 700, 500, 300, 200, 100]
PLAN = Plan(warmup=2)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with two_nodes(HERE, HERE.parent, HERE.parents[1]) as client_address:
        yield client_address


@pytest.fixture
def client_address(cluster):
    return cluster


@pytest.fixture(scope="module")
def net():
    return random_net(3)


@pytest.fixture(scope="module")
def group(cluster, net):
    """One rank on each machine."""
    with WorkerGroup(net, PLAN, ["ray:auto/cpu"], ranks=RankOptions(threads_per_rank=1), family=TOY) as group:
        yield group


def slow(seconds, devices=BOTH, **options):
    """Two ranks, the first of which takes its time; ``options`` of these ranks."""
    plan = Plan(warmup=1, cuts=("blocks.0", "blocks.1"))
    ranks = RankOptions(threads_per_rank=1, **options)
    return WorkerGroup(toys.slow_net(seconds), plan, devices, family=TOY, ranks=ranks)


def call(group, **kwargs):
    x, given = toys.inputs(0)
    return group(x, 10, **{**given, **kwargs})


def rooms():
    """Placement groups that there are."""
    return [room for room in ray.util.placement_group_table().values() if room["state"] != "REMOVED"]


def test_ranks_are_on_two_machines_and_linked_by_their_addresses(group):
    group.begin(TIMESTEPS)
    denoise(group, TIMESTEPS)
    for rank, host in zip(group.stats().ranks, HOSTS, strict=True):
        assert rank.device == f"{host} cpu"
        listening = [c.laddr.ip for c in psutil.Process(rank.pid).net_connections() if c.status == psutil.CONN_LISTEN]
        assert set(listening) == {host, "::"}
        assert listening.count("::") == 1  # Ray's own
    assert 1e6 < group.bandwidth < 1e12  # of a link between two machines, as far as it can see


def test_synchronous_run_is_bit_identical(group, net):
    group.begin(TIMESTEPS, replace(PLAN, warmup=len(TIMESTEPS)))
    with torch.no_grad():
        assert torch.equal(denoise(group, TIMESTEPS), denoise(net, TIMESTEPS))


def test_asynchronous_run_equals_the_simulation_and_sends_what_crosses(group, net):
    group.begin(TIMESTEPS)
    actual, stats = denoise(group, TIMESTEPS), group.stats()
    with Simulator(net, PLAN, family=TOY) as simulator:
        simulator.begin(TIMESTEPS)
        torch.testing.assert_close(actual, denoise(simulator, TIMESTEPS), atol=1e-5, rtol=1e-5)
    assert stats.bytes_per_call == stats.planned_bytes


def test_weights_change_and_records_are_on_this_machine_s_clock(group, net):
    other = random_net(3)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    begin = time.monotonic()
    group.load_weights(other.named_parameters())
    group.begin(TIMESTEPS, replace(PLAN, warmup=len(TIMESTEPS)))
    with torch.no_grad():
        assert torch.equal(denoise(group, TIMESTEPS), denoise(other, TIMESTEPS))
    records = group.stats().records
    assert len(records) == 2 * len(TIMESTEPS)
    assert all(begin < record.start < record.end < time.monotonic() for record in records)
    group.load_weights(net.named_parameters())


def test_a_record_moves_to_another_clock_as_a_whole():
    record = CallRecord("", 0, 0, 0, True, start=1.0, end=4.0, compute=2.0, wait=1.0, bytes_sent=0, waits=((2.0, 3.0),))
    assert record.shifted(10.0) == replace(record, start=11.0, end=14.0, waits=((12.0, 13.0),))


def test_large_tensors_arrive_as_they_are(group, net):
    x, given = toys.inputs(1)
    x = x.repeat(1, 1, 40, 40)  # beyond what Ray puts into a message
    group.begin()
    with torch.no_grad():
        assert torch.equal(group(x, 10, **given), net(x, 10, **given))


@pytest.mark.slow
def test_several_ranks_of_one_machine_are_neighbours():
    plan, net = Plan(segments=3, warmup=2, forecast=0), random_net(4)
    with WorkerGroup(net, plan, ["ray:auto/cpu"] * 3, ranks=RankOptions(threads_per_rank=1), family=TOY) as group:
        group.begin(TIMESTEPS)
        actual, places = denoise(group, TIMESTEPS), [rank.device for rank in group.stats().ranks]
        with Simulator(net, plan, family=TOY) as simulator:
            simulator.begin(TIMESTEPS)
            torch.testing.assert_close(actual, denoise(simulator, TIMESTEPS), atol=1e-5, rtol=1e-5)
    assert places == sorted(places)
    assert {place.removesuffix(" cpu") for place in places} == set(HOSTS)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_actor_is_named_and_the_next_group_works(victim):
    g = slow(30.0)
    pids, killed, others = g.pids, [], len(rooms())

    def kill():
        killed.append(time.monotonic())
        os.kill(pids[victim], signal.SIGKILL)

    threading.Timer(0.7, kill).start()
    with pytest.raises(WorkerError, match=rf"rank {victim} \(process {pids[victim]}, {HOSTS[victim]} cpu\) died") as failure:
        call(g)
    assert time.monotonic() - killed[0] < 4.0
    assert failure.value.rank == victim
    assert_gone(pids)
    assert len(rooms()) == others - 1
    with pytest.raises(GroupClosedError, match=rf"(?s)has failed before \(rank {victim}.*start a new one"):
        call(g)
    if victim == 0:
        with slow(0.0) as new, torch.no_grad():
            assert torch.equal(call(new), call(toys.slow_net(0)))


@pytest.mark.slow
def test_exception_in_a_block_comes_with_its_traceback():
    g = slow(0.0)
    with pytest.raises(WorkerError, match="the trap has sprung") as failure:
        call(g, context=torch.full((2, 3), 101.0))
    assert failure.value.rank == 0
    assert "toys.py" in failure.value.worker_traceback
    assert_gone(g.pids)


@pytest.mark.slow
def test_rank_killed_between_runs_is_noticed_however_often_runs_are_begun():
    g = slow(0.0, call_timeout=10.0)
    os.kill(g.pids[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match="rank 1"):
        while True:
            g.begin()
            time.sleep(0.01)


@pytest.mark.slow
def test_stopped_rank_misses_the_deadline_and_an_interrupt_leaves_the_group_usable():
    interrupt = threading.Event()

    def poll():
        if interrupt.is_set():
            raise KeyboardInterrupt

    g = slow(0.5, poll=poll, call_timeout=2.0)
    with torch.no_grad():
        expected = call(toys.slow_net(0))
    threading.Timer(0.2, interrupt.set).start()
    with pytest.raises(KeyboardInterrupt):
        call(g)
    interrupt.clear()
    g.begin()
    assert torch.equal(call(g), expected)
    os.kill(g.pids[1], signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(DeadlineError, match="waited too long for the result of call 2; all ranks were stopped"):
        call(g)
    assert time.monotonic() - begin < 10.0
    assert_gone(g.pids)


def test_group_that_finds_no_room_says_so_and_leaves_nothing(group):
    before = rooms()
    with pytest.raises(DeadlineError, match="waited too long for Ray to find room for 5 ranks"):
        WorkerGroup(
            random_net(3), Plan(segments=2, stride=4), ["ray:auto/cpu"] * 5, family=TOY, ranks=RankOptions(start_timeout=1.0)
        )
    assert rooms() == before


@pytest.mark.slow
def test_killed_parent_leaves_no_actor(tmp_path):
    path = tmp_path / "program.py"
    program = """
        import toys
        from asyncdiff_nodes.engine import *
        ranks = RankOptions(threads_per_rank=1)
        group = WorkerGroup(toys.slow_net(0.3), devices=["ray:auto/cpu"] * 2, family=toys.TOY, ranks=ranks)
        print(*group.pids, flush=True)
        x, kwargs = toys.inputs(0)
        while True: group(x, 10, **kwargs)
        """
    path.write_text(textwrap.dedent(program), encoding="utf-8")
    process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    before = len(rooms())
    process.kill()
    process.wait()
    assert_gone(pids, within=20.0)
    until(lambda: len(rooms()) == before - 1)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["ray:auto"], "this cluster has 0 GPUs, and 6 CPU cores on 2 machines; name cores with /cpu"),
        (["ray:auto/cpu"] * 7, "6 CPU cores on 2 machines"),
        (["ray:auto/cpu", "cpu"], "are not of one cluster"),
        (["ray:auto/cpu", "ray://127.0.0.2:1/cpu"], "are not of one cluster"),
        (["ray:some"], "'ray:some' is no device of a Ray cluster: use ray:auto"),
        (["ray://nowhere"], "'ray://nowhere' is no device of a Ray cluster"),
        (["ray://127.0.0.2:1/cpu"], "is connected to another Ray cluster"),
    ],
)
def test_devices_that_the_cluster_does_not_have(devices, message):
    with pytest.raises(DeviceError, match=message):
        resolve_devices(devices)


def run(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, timeout=100
    ).stdout


FIRST = "from asyncdiff_nodes.engine.devices import resolve_devices\ntry: resolve_devices(['ray:auto'])\n"
LAST = "except Exception as error: print(type(error).__name__, error)"


def test_without_ray_the_error_says_what_to_install():
    out = run("import sys; sys.modules['ray'] = None\n" + FIRST + LAST)
    assert out.startswith("DeviceError devices: ray:auto needs Ray")
    assert 'pip install "comfyui-asyncdiff[ray]"' in out


@pytest.mark.slow
def test_a_wrong_token_is_refused_and_said():
    out = run(FIRST + LAST, RAY_AUTH_TOKEN="0" * 64)
    assert out.startswith("DeviceError devices: ray:auto: no Ray cluster can be reached there")


@pytest.mark.slow
@pytest.mark.parametrize("by_environment", [False, True])
def test_a_program_outside_the_cluster_comes_in_through_ray_client(by_environment, client_address):
    pytest.importorskip("grpc", reason="Ray Client needs grpcio")
    device = f"{'ray:auto' if by_environment else client_address}/cpu"
    program = f"""
import torch, toys
from asyncdiff_nodes.engine import *
torch.set_num_threads(1)  # as the ranks
x, kwargs = toys.inputs(0)
ranks = RankOptions(threads_per_rank=1)
with WorkerGroup(toys.random_net(3), Plan(), [{device!r}], family=toys.TOY, ranks=ranks) as group, torch.no_grad():
    for x in (x, x.repeat(1, 1, 40, 40)):
        group.begin()
        print(torch.equal(group(x, 10, **kwargs), toys.random_net(3)(x, 10, **kwargs)))
print(len(group.devices), group.closed)
"""
    assert run(program, RAY_ADDRESS=client_address).split() == ["True", "True", "2", "True"]
