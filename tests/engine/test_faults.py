"""Nothing waits for ever, nothing survives its parent, and the next group works."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from raising_unet import inputs, slow_unet

from asyncdiff_nodes.engine import DeadlineError, GroupClosedError, Plan, WorkerError, WorkerGroup

HERE = Path(__file__).parent


def group(seconds=0.0, **options):
    return WorkerGroup(slow_unet(seconds), Plan(warmup=1), threads_per_rank=1, **options)


def assert_gone(pids, folder, within=5.0):
    end = time.monotonic() + within
    while time.monotonic() < end and any(map(psutil.pid_exists, pids)):
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not os.path.exists(folder)


def call(g):
    args, kwargs = inputs()
    return g(*args, **kwargs)[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_is_named_within_two_seconds_and_a_new_group_works(victim):
    g = group(seconds=3.0)
    pids, folder = g.pids, g._ranks.folder
    killed = []

    def kill():
        killed.append(time.monotonic())
        os.kill(pids[victim], signal.SIGKILL)

    threading.Timer(0.7, kill).start()
    with pytest.raises(WorkerError, match=rf"rank {victim} .*signal 9") as failure:
        call(g)
    assert time.monotonic() - killed[0] < 2.0
    assert failure.value.rank == victim
    assert g.closed
    assert_gone(pids, folder)
    with pytest.raises(GroupClosedError, match="start a new one"):
        call(g)
    if victim == 0:
        with group() as new:
            assert torch.isfinite(call(new)).all()


def test_rank_killed_between_calls_is_noticed():
    g = group()
    call(g)
    os.kill(g.pids[0], signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 0 .*signal 9"):
        while time.monotonic() < begin + 2.0:  # one call may still succeed: its stale values had arrived before
            call(g)
    assert time.monotonic() - begin < 2.0


def test_stopped_rank_misses_the_deadline_and_nothing_is_left():
    g = group(call_timeout=1.5)
    call(g)
    pids, folder = g.pids, g._ranks.folder
    os.kill(pids[1], signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(DeadlineError, match="waited too long for the result of call 2"):
        call(g)
    assert time.monotonic() - begin < 6.0
    assert_gone(pids, folder)


def test_exception_in_a_block_comes_with_its_traceback():
    g = group()
    pids, folder = g.pids, g._ranks.folder
    (sample, t), kwargs = inputs()
    with pytest.raises(WorkerError, match="not a number in conv_in") as failure:
        g(sample * float("nan"), t, **kwargs)
    assert "raising_unet.py" in failure.value.worker_traceback
    assert_gone(pids, folder)


def test_wrong_input_is_refused_before_any_rank_sees_it():
    with group() as g:
        (sample, t), kwargs = inputs()
        with pytest.raises(RuntimeError):
            g(sample[:, :3], t, **kwargs)
        g.begin()
        assert torch.isfinite(call(g)).all()


def test_interrupt_leaves_the_group_usable_and_the_late_result_is_dropped():
    interrupt = threading.Event()

    def poll():
        if interrupt.is_set():
            raise KeyboardInterrupt

    unet = slow_unet(0.5)
    (sample, t), kwargs = inputs()
    with torch.no_grad():
        expected = unet(sample, t, **kwargs)[0]
    with WorkerGroup(unet, Plan(warmup=9), threads_per_rank=1, poll=poll) as g:
        g.begin()
        threading.Timer(0.2, interrupt.set).start()
        with pytest.raises(KeyboardInterrupt):
            g(sample + 1, t, **kwargs)
        interrupt.clear()
        g.begin()
        torch.testing.assert_close(g(sample, t, **kwargs)[0], expected)


def test_close_twice_and_call_after_close():
    g = group()
    pids, folder = g.pids, g._ranks.folder
    g.close()
    g.close()
    assert_gone(pids, folder)
    with pytest.raises(GroupClosedError, match="closed"):
        call(g)
    with pytest.raises(GroupClosedError, match="closed"):
        g.begin()


def test_forgotten_group_ends_its_ranks():
    g = group()
    pids, folder = g.pids, g._ranks.folder
    del g
    gc.collect()
    assert_gone(pids, folder)


def test_listens_on_loopback_only():
    with group() as g:
        call(g)
        listening = [
            connection.laddr.ip
            for pid in [os.getpid(), *g.pids]
            for connection in psutil.Process(pid).net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening, "gloo listens somewhere, so this test looks in the wrong place"
        assert set(listening) <= {"127.0.0.1", "::1"}
        assert os.stat(g._ranks.folder).st_mode & 0o077 == 0
        for file in Path(g._ranks.folder).iterdir():
            assert file.stat().st_mode & 0o077 == 0


def script(tmp_path, body):
    """Start a program of its own, without a ``__main__`` guard; returns it and its first line of output."""
    path = tmp_path / "program.py"
    path.write_text(
        f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parents[1])!r}]\n"
        "from raising_unet import inputs, slow_unet\n"
        "from asyncdiff_nodes.engine import *\n" + textwrap.dedent(body)
    )
    process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True, start_new_session=True)
    return process, process.stdout.readline().split()


BODY = """
    group = WorkerGroup(slow_unet(0.3), threads_per_rank=1)
    print(*group.pids, group._ranks.folder, flush=True)
    args, kwargs = inputs()
    while True:
        group(*args, **kwargs)
"""


def test_ranks_end_with_a_killed_parent(tmp_path):
    process, (*pids, _) = script(tmp_path, BODY)
    time.sleep(0.5)
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while time.monotonic() < end and any(psutil.pid_exists(int(pid)) for pid in pids):
        time.sleep(0.05)
    assert not any(psutil.pid_exists(int(pid)) for pid in pids)


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    process, (*pids, folder) = script(tmp_path, BODY)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=15) != 0
    assert_gone([int(pid) for pid in pids], folder)


def test_program_without_a_guard_ends_by_itself(tmp_path):
    process, words = script(tmp_path, "with WorkerGroup(slow_unet(0), threads_per_rank=1) as g:\n    print(*g.pids, flush=True)\n")
    assert process.wait(timeout=60) == 0
    assert len(words) == 2
