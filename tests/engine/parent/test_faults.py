"""Nothing waits for ever, nothing survives its parent, and the next group works."""

import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import psutil
import pytest
import torch

import toys
from asyncdiff_nodes import spawned as entry
from asyncdiff_nodes.engine import DeadlineError, GroupClosedError, Plan, RankOptions, WorkerError, WorkerGroup, wire
from asyncdiff_nodes.engine.parent.worker_processes import spawning
from toys import TOY

HERE = Path(__file__).parents[1]

needs_posix = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")


def group(seconds=0.0, plan=None, **options):
    """Two ranks, the first of which takes its time; ``options`` of these ranks."""
    plan = plan or Plan(warmup=1, cuts=("blocks.0", "blocks.1"))
    return WorkerGroup(toys.slow_net(seconds), plan, family=TOY, ranks=RankOptions(threads_per_rank=1, **options))


class Interrupt(threading.Event):
    """What a group polls; an interrupt from when it is set until it is cleared."""

    def poll(self):
        if self.is_set():
            raise KeyboardInterrupt


def call(g, **kwargs):
    x, given = toys.inputs(0)
    return g(x, 10, **{**given, **kwargs})


def assert_gone(pids, within=5.0):
    """No process with one of these ids is left, not even a zombie."""
    end = time.monotonic() + within
    while time.monotonic() < end and any(map(psutil.pid_exists, pids)):
        time.sleep(0.05)
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []


@pytest.mark.timing
@needs_posix
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_rank_is_named_within_two_seconds_and_a_new_group_works(victim, folder):
    g = group(seconds=30.0)
    pids, killed = g.pids, []

    def kill():
        killed.append(time.monotonic())
        os.kill(pids[victim], signal.SIGKILL)

    threading.Timer(0.7, kill).start()
    with pytest.raises(WorkerError, match=rf"rank {victim} \(process {pids[victim]}\) was killed by signal 9") as failure:
        call(g)
    assert time.monotonic() - killed[0] < 2.0
    assert failure.value.rank == victim
    assert failure.value.worker_traceback is None
    assert g.closed
    assert_gone(pids, within=0.5)
    assert list(folder.iterdir()) == []
    with pytest.raises(GroupClosedError, match=rf"has failed before \(rank {victim}.*start a new one"):
        call(g)
    with pytest.raises(GroupClosedError):
        g.begin()
    with pytest.raises(GroupClosedError):
        g.stats()
    g.close()
    if victim == 0:
        with group() as new, torch.no_grad():
            assert torch.equal(call(new), call(toys.slow_net(0)))


def abort_at_the_end():
    """In a rank: as a device's driver does after an error, which the rank has just told."""
    os._exit = lambda code: os.abort()


@needs_posix
def test_an_error_is_told_though_the_process_is_aborted_then(folder):
    net = toys.chain(toys.ToyBlock, toys.Trap)
    options = RankOptions(threads_per_rank=1, prepare=abort_at_the_end)
    g = WorkerGroup(net, Plan(), ["cpu"] * 2, family=toys.TOY, ranks=options)
    x, given = toys.inputs(0)
    with pytest.raises(WorkerError, match=r"rank 1 failed \(ArithmeticError: the trap has sprung\)"):
        g(x, 900, **{**given, "context": torch.full_like(given["context"], 101.0)})
    assert_gone(g.pids, within=0.5)


@pytest.mark.timing
@needs_posix
def test_rank_killed_between_calls_is_noticed_by_the_next_call(folder):
    g = group()
    call(g)
    os.kill(g.pids[0], signal.SIGKILL)
    time.sleep(0.5)
    begin, pids = time.monotonic(), g.pids
    with pytest.raises(WorkerError, match="rank 0"):
        call(g)
    assert time.monotonic() - begin < 2.0
    assert_gone(pids, within=0.5)


@pytest.mark.timing
@needs_posix
def test_rank_killed_between_runs_is_noticed_however_often_runs_are_begun(folder):
    g = group(call_timeout=5.0)
    os.kill(g.pids[1], signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1"):
        while True:
            g.begin()
            time.sleep(0.01)
    assert time.monotonic() - begin < 2.0


@needs_posix
def test_stopped_rank_misses_the_deadline_and_nothing_is_left(folder):
    g = group(call_timeout=1.5)
    call(g)
    pids = g.pids
    os.kill(pids[1], signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(DeadlineError, match="waited too long for the result of call 2; all ranks were stopped"):
        call(g)
    assert 1.4 < time.monotonic() - begin < 6.0
    assert_gone(pids, within=0.5)


@needs_posix
def test_rank_that_stops_while_large_inputs_are_on_their_way_misses_the_deadline(folder):
    g = group(call_timeout=1.5)
    os.kill(g.pids[0], signal.SIGSTOP)
    begin, pids = time.monotonic(), g.pids
    x, kwargs = toys.inputs(0)
    with pytest.raises((DeadlineError, WorkerError)):  # of the parent, or of the rank that waits for the other one
        g(x.repeat(1, 1, 100, 100), 10, **kwargs)
    assert time.monotonic() - begin < 10.0
    assert_gone(pids, within=0.5)


@pytest.mark.parametrize("before", [0, 1], ids=["synchronous", "asynchronous"])
def test_exception_in_a_block_comes_with_its_traceback(folder, before):
    g = group()
    pids = g.pids
    for _ in range(before):
        call(g)
    with pytest.raises(WorkerError, match="the trap has sprung") as failure:
        # the result of an asynchronous call does not depend on the other rank's part of it: that of the next call does
        for _ in range(1 + before):
            call(g, context=torch.full((2, 3), 101.0))
    assert failure.value.rank == 0
    assert "toys.py" in failure.value.worker_traceback
    assert "ArithmeticError" in failure.value.worker_traceback
    assert_gone(pids, within=0.5)


def test_group_that_is_not_ready_in_time_leaves_nothing_behind(folder, spawned):
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(DeadlineError, match=r"waited too long for ranks \[0, 1\] to start"):
        group(start_timeout=0.2)
    assert {child.pid for child in psutil.Process().children()} <= before


@pytest.mark.slow
def test_failures_leave_no_descriptor_open_and_no_group_in_memory(folder, spawned):
    def fail():
        with pytest.raises(DeadlineError):
            group(start_timeout=0.2)
        g = group(call_timeout=3.0, seconds=20.0)
        with pytest.raises((DeadlineError, WorkerError)):  # of the parent, or of the rank that waits for the other one
            call(g)
        groups.append(weakref.ref(g))

    groups, descriptors = [], []
    for _ in range(3):
        fail()
        gc.collect()
        descriptors.append(psutil.Process().num_fds() if os.name == "posix" else psutil.Process().num_handles())
    assert descriptors[0] == descriptors[1] == descriptors[2]
    assert not any(ref() for ref in groups)


def test_rank_that_fails_while_its_weights_are_on_their_way_says_why_at_once(folder, spawned):
    net = toys.chain(*[toys.ToyBlock] * 30, toys.Unloadable, channels=64)
    before = {child.pid for child in psutil.Process().children()}
    begin = time.monotonic()
    with pytest.raises(WorkerError, match="not in a worker") as failure:
        WorkerGroup(net, Plan(), family=TOY, ranks=RankOptions(threads_per_rank=1, start_timeout=25.0))
    assert time.monotonic() - begin < 20.0
    assert "toys.py" in failure.value.worker_traceback
    assert {child.pid for child in psutil.Process().children()} <= before


def test_interrupt_while_starting_leaves_nothing_behind(folder, spawned):
    before = {child.pid for child in psutil.Process().children()}
    begin = time.monotonic()

    def poll():
        if time.monotonic() - begin > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        group(poll=poll)
    assert {child.pid for child in psutil.Process().children()} <= before


@pytest.mark.timing
def test_interrupt_leaves_the_group_usable_and_the_late_result_is_dropped(folder):
    interrupt = Interrupt()
    net = toys.slow_net(0.5)
    x, kwargs = toys.inputs(0)
    plan = Plan(warmup=2, cuts=("blocks.0", "blocks.1"))
    with torch.no_grad():
        expected = net(x, 10, **kwargs)
    with WorkerGroup(net, plan, family=TOY, ranks=RankOptions(threads_per_rank=1, poll=interrupt.poll)) as g:
        for finished in (0, 3):  # interrupted in a synchronous and in an asynchronous call
            g.begin()
            for _ in range(finished):
                g(x, 10, **kwargs)
            timer = threading.Timer(0.2, interrupt.set)
            timer.start()
            begin = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                g(x + 1, 10, **kwargs)
                g(x + 1, 10, **kwargs)
            assert time.monotonic() - begin < 0.9
            timer.join()
            interrupt.clear()
            g.begin()
            assert torch.equal(g(x, 10, **kwargs), expected)
            assert not g.closed


def test_a_result_that_nobody_takes_holds_up_no_later_run(folder):
    """It is more than a pipe holds: its rank cannot go on before it is read."""
    interrupt = Interrupt()
    net = toys.slow_net(0.3)
    x, kwargs = toys.inputs(0)
    large = x.repeat(1, 1, 100, 100)
    plan = Plan(warmup=1, cuts=("blocks.0", "blocks.1"))
    with WorkerGroup(net, plan, family=TOY, ranks=RankOptions(threads_per_rank=1, poll=interrupt.poll)) as g:
        interrupt.set()
        with pytest.raises(KeyboardInterrupt):
            g(large, 10, **kwargs)
        interrupt.clear()
        time.sleep(1.0)
        g.tidy()
        g.begin()
        with torch.no_grad():
            assert torch.equal(g(large, 10, **kwargs), net(large, 10, **kwargs))


def test_the_rank_that_failed_first_is_named_however_late_they_are_heard(folder):
    interrupt = Interrupt()
    net = toys.chain(toys.Slow, toys.Slow)
    net.blocks[0].seconds, net.blocks[1].seconds = 0.8, 0.4
    plan = Plan(warmup=1, cuts=("blocks.0", "blocks.1"))
    with WorkerGroup(net, plan, family=TOY, ranks=RankOptions(threads_per_rank=1, poll=interrupt.poll)) as g:
        call(g)
        interrupt.set()
        with pytest.raises(KeyboardInterrupt):
            call(g, context=torch.full((2, 3), 101.0))
        interrupt.clear()
        time.sleep(1.5)
        with pytest.raises(WorkerError, match="the trap has sprung") as failure:
            call(g)
        assert failure.value.rank == 1


def test_close_twice_and_call_after_close(folder):
    g = group()
    pids = g.pids
    assert not g.closed
    g.close()
    g.close()
    assert g.closed
    assert_gone(pids, within=0.5)
    for use in (lambda: call(g), g.begin, g.stats):
        with pytest.raises(GroupClosedError, match="this worker group is closed: start a new one"):
            use()


def test_close_from_another_thread_ends_a_call(folder):
    g = group(seconds=30.0)
    pids = g.pids
    closer = threading.Timer(0.5, g.close)
    closer.start()
    begin = time.monotonic()
    with pytest.raises((GroupClosedError, WorkerError)):
        call(g)
    closer.join()  # it may still be tidying up
    assert time.monotonic() - begin < 8.0
    assert_gone(pids)


def test_forgotten_group_ends_its_ranks(folder):
    g = group()
    pids = g.pids
    del g
    gc.collect()
    assert_gone(pids)


def test_failure_within_a_with_block_ends_the_ranks(folder):
    with pytest.raises(ZeroDivisionError), group() as g:
        pids = g.pids
        call(g)
        raise ZeroDivisionError
    assert_gone(pids, within=0.5)


def test_listens_on_loopback_only(folder, spawned):
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


HEAD = f"""
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where these tests run in a shell's background
    sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}, {str(HERE.parents[1])!r}]
    import toys
    from asyncdiff_nodes.engine import *
    """
STARTED = """
    group = WorkerGroup(toys.slow_net(0.3), family=toys.TOY, ranks=RankOptions(threads_per_rank=1))
    print(*group.pids, flush=True)
    x, kwargs = toys.inputs(0)
    """


def program(tmp_path, body, before=()):
    """Start a program of its own, without a ``__main__`` guard, which has a temporary folder of its own."""
    path, temporary = tmp_path / "program.py", tmp_path / "temporary"
    path.write_text(textwrap.dedent(HEAD) + body, encoding="utf-8")
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [*before, sys.executable, path], stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )


def script(tmp_path, body, before=()):
    """As :func:`program`, with a group; returns it and its ranks' process ids."""
    process = program(tmp_path, textwrap.dedent(STARTED) + body, before)
    pids = [int(word) for word in next(said(process)).split()]
    assert len(pids) == 2
    return process, pids


def ours(tmp_path):
    """What is in the program's temporary folder, but for what PyTorch leaves there."""
    return [path.name for path in (tmp_path / "temporary").iterdir() if path.name.startswith("asyncdiff")]


def assert_over(session, within=2.0):
    """No process of this session is alive; of those that are dead, the system may not have taken note yet."""

    def alive():
        found = []
        for process in psutil.process_iter(["status"]):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    end = time.monotonic() + within
    while time.monotonic() < end and alive():
        time.sleep(0.05)
    assert alive() == []


def said(process):
    """Lines of its output, without those in which PyTorch 2.8 tells of its links."""
    return (line for line in process.stdout if not line.startswith("[Gloo]"))


FOREVER = "while True: group(x, 10, **kwargs)\n"


@needs_posix
@pytest.mark.parametrize(
    ("name", "whom"),
    [
        ("SIGTERM", "group"),
        pytest.param("SIGHUP", "group", marks=pytest.mark.slow),
        pytest.param("SIGKILL", "group", marks=pytest.mark.slow),
        pytest.param("SIGINT", "group", marks=pytest.mark.slow),
        pytest.param("SIGTERM", "parent", marks=pytest.mark.slow),
        ("SIGKILL", "parent"),
    ],
)
def test_a_signal_leaves_neither_processes_nor_files(tmp_path, name, whom):
    """A service manager, ``timeout`` and a closed terminal send theirs to all at once: nobody is left to tidy up."""
    process, _ = script(tmp_path, FOREVER)
    time.sleep(0.5)
    (os.killpg if whom == "group" else os.kill)(process.pid, getattr(signal, name))
    assert process.wait(timeout=15) != 0
    assert_over(process.pid)
    assert ours(tmp_path) == []


@needs_posix
@pytest.mark.parametrize("whom", ["parent", pytest.param("group", marks=pytest.mark.slow)])
def test_a_signal_in_the_midst_of_a_start_leaves_neither_processes_nor_files(tmp_path, whom):
    body = """
        def weights():
            yield from net.state_dict().items()
            print("all are there", flush=True)

        net = toys.slow_net(0.3)
        WorkerGroup(net, family=toys.TOY, weights=weights(), ranks=RankOptions(threads_per_rank=1))
        """
    process = program(tmp_path, textwrap.dedent(body))
    assert next(said(process)) == "all are there\n"
    (os.killpg if whom == "group" else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    assert_over(process.pid)
    assert ours(tmp_path) == []


def test_nothing_of_ours_is_on_disk(tmp_path):
    """Neither of a group, nor of one whose blocks move to other ranks, nor of one in processes of another."""
    body = """
        import os, tempfile
        from dataclasses import replace
        from asyncdiff_nodes.engine.tensors import tensors_of
        from asyncdiff_nodes.engine.parent.rank_shares import shares_of

        def look(what):
            print(what, *[name for name in os.listdir(tempfile.gettempdir()) if name.startswith("asyncdiff")], flush=True)

        def links(placement):
            return {(sender, own.rank) for own in shares_of(placement) for sender in own.sources.values()}

        look("started")
        idle = group.release()
        look("released")
        net, plan = toys.random_net(2), Plan(3, warmup=1, forecast=0, cuts=("blocks.0", "blocks.2", "blocks.4"))
        group = WorkerGroup(net, plan, ["cpu"] * 3, family=toys.TOY, ranks=RankOptions(threads_per_rank=1, idle=idle))
        group(x, 10, **kwargs)
        look("taken")
        graph = group.placement.graph
        other = type(group.placement)(graph, plan, place(graph, replace(plan, cuts=("blocks.1", "blocks.3", "blocks.5"))).starts)
        assert links(other) - links(group.placement), "no link is new"
        group.move(other, lambda names: tensors_of(net))
        group(x, 10, **kwargs)
        look("moved")
        group.close()
        look("closed")
        """
    process, _ = script(tmp_path, textwrap.dedent(body))
    assert list(said(process)) == [f"{what}\n" for what in ("started", "released", "taken", "moved", "closed")]
    assert process.wait(timeout=30) == 0
    assert ours(tmp_path) == []


def test_a_rank_whose_parent_is_gone_before_it_is_heard_ends(folder):
    """Whichever of its two threads learns of it first."""
    context = multiprocessing.get_context("spawn")
    (conn, child_conn), (child_death, death) = wire.pipe(context), context.Pipe(duplex=False)
    rank = context.Process(target=entry.main, args=(child_conn, child_death))
    with spawning():
        rank.start()
    for end in (conn, child_conn, child_death, death):
        end.close()
    rank.join(60)
    assert rank.exitcode is not None


def test_a_folder_put_first_does_not_hide_the_standard_library(folder, spawned, tmp_path_factory, monkeypatch):
    """ComfyUI and its packs do so; the parent has imported its own long before."""
    first = tmp_path_factory.mktemp("first")
    for module in ("logging", "math"):
        (first / f"{module}.py").write_text("raise ImportError('not the module that was meant')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(first))
    before = sys.path[:]
    with group() as g:
        call(g)
    assert sys.path == before


@pytest.mark.slow
def test_full_shared_memory_does_not_matter(tmp_path):
    """Nothing of ours is there: tensors go through pipes and links."""
    own = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount of its own can be had here")
    fill = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full && exec "$@"'
    process, pids = script(tmp_path, "print(group(x, 10, **kwargs).shape, flush=True)\n", [*own, "sh", "-c", fill, "sh"])
    assert next(said(process)).startswith("torch.Size([2, 4, 8, 8])")
    assert process.wait(timeout=30) == 0
    assert_gone(pids)


def test_program_without_a_guard_works_and_ends_by_itself(tmp_path):
    process, pids = script(tmp_path, "print(group(x, 10, **kwargs).shape, flush=True)\n")
    assert next(said(process)).startswith("torch.Size([2, 4, 8, 8])")
    assert process.wait(timeout=30) == 0
    assert_gone(pids)
    assert ours(tmp_path) == []
