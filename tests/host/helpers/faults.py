"""Break things on purpose, on real ranks of the real host, and see what becomes of the picture, the processes and the files."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import multiprocessing.resource_tracker
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import folder_paths
import psutil
import torch
from comfy.model_patcher import ModelPatcher

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.host.workers import pool
from asyncdiff_nodes.host.workers.block_times import Balance
from asyncdiff_nodes.host.workers.host_settings import HostSettings
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import injected, small
from helpers.failing import STEPS, sample
from helpers.sampling import EXACT, prompts_for

_REUSE = {"segments": 2, "warmup": 1, "forecast": False, "cooldown": 0}
PLANS = {
    "exact": EXACT,
    "asynchronous": Options("Custom", "cpu,cpu", **_REUSE),
    "stride": Options("Custom", "cpu,cpu,cpu", stride=2, **_REUSE),
}
RANKS = {"exact": 2, "asynchronous": 2, "stride": 3}
START_TIMEOUT, CALL_TIMEOUT = 60.0, 6.0  # seconds
LATE = 90.0  # seconds that a picture with a fault may take on two busy cores: two starts, and one of the waits above
TOLERANCE = 1e-5  # of a picture that was begun in the middle, whose latent is rounded when it is scaled

_ENDS = ("sigkill", "sigsegv", "exit_0", "exception", "out_of_memory")
_SIGNALS = ("sigkill", "sigsegv", "sigterm", "sigstop")
_STAYS = ("suspended", "slower", "clock_jumps")  # after these the ranks go on
_CALLS = ("warm-up", "asynchronous", "stride pair")
# (kinds, phases, how often): less often what takes another start or a long wait
TABLE = (
    (_ENDS, ("spawn", "weights"), 2),
    (("pipe_closed", *_ENDS), _CALLS, 8),
    (("hangs",), ("weights", *_CALLS, "shutdown"), 1),
    (_STAYS, _CALLS, 14),
    (("suspended", *_ENDS), ("shutdown",), 2),
    (_SIGNALS, ("between prompts",), 5),
    (_SIGNALS, ("any time",), 3),
    (("folder_vanishes", "parent_killed"), ("any time",), 2),
    (("no_temporary_folder", "disk_full"), ("spawn",), 2),
)
PAIRS = [(kind, phase) for kinds, phases, _ in TABLE for kind in kinds for phase in phases]
_OFTEN = [weight for kinds, phases, weight in TABLE for _ in kinds for _ in phases]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        call: the number of the call that it comes with, where the phase is one of calls.
        after: seconds after which it comes, where the phase is *any time*.
    """

    kind: str
    phase: str
    plan: str
    rank: int
    call: int
    after: float
    on_failure: str

    @classmethod
    def drawn(cls, kind: str, phase: str, rng: random.Random) -> Fault:
        """A fault of this kind, the rest by chance."""
        plan = {"asynchronous": "asynchronous", "stride pair": "stride"}.get(phase) or rng.choice(list(PLANS))
        if phase == "warm-up":
            call = rng.randrange(STEPS) if plan == "exact" else 0
        else:  # what is computed for a pair comes with its first call: 1, 3, 5
            call = rng.randrange(1, STEPS, 2) if plan == "stride" else rng.randrange(1, STEPS)
        on_failure = rng.choice(("restart", "restart", "finish"))
        return cls(kind, phase, plan, rng.randrange(RANKS[plan]), call, rng.uniform(0.0, 6.0), on_failure)


def drawn(count: int, seed: int) -> list[Fault]:
    """So many faults: each kind in each of its phases at least once, then by chance."""
    rng = random.Random(seed)
    pairs = PAIRS[:count] + rng.choices(PAIRS, _OFTEN, k=max(0, count - len(PAIRS)))
    rng.shuffle(pairs)
    # one plan after the other, since each has ranks of its own to start
    return sorted((Fault.drawn(kind, phase, rng) for kind, phase in pairs), key=lambda fault: fault.plan)


@dataclass
class Outcome:
    """What became of it.

    Attributes:
        how: ``undisturbed``, ``restarted``, ``finished by ComfyUI``, or an error.
        wrong: the picture is none that it may be, or the next one is not bit for bit the undisturbed one.
        orphans, leaked_files: left behind, of processes and in the temporary folder.
    """

    how: str
    seconds: float
    wrong: bool
    late: bool
    orphans: int
    leaked_files: int


class Chaos:
    """Breaks one thing after the other, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._orders, self._temporary = folder / "orders", folder / "temporary"
        self._another, self._user = folder / "another", folder / "user"
        for path in (self._orders, self._temporary, self._another, self._user):
            path.mkdir()
        self._process = psutil.Process()
        self._strangers = {child.pid for child in self._process.children(recursive=True)}
        self._shared = _shared_memory()
        self._others: list[psutil.Process] = []  # of another host that was killed
        self._model = small.model("sd15", seed=9)
        self._prompts = prompts_for("sd15")
        self._pictures: dict[str, dict[tuple[str, int], torch.Tensor]] = {}  # plan -> on_failure, call that others begin with

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """While faults are injected: ranks take orders, deadlines are short, and cuts are always the same."""
        settings = HostSettings.current()
        changes = (
            (tempfile, "tempdir", str(self._temporary)),
            (folder_paths, "user_directory", str(self._user)),
            (pool, "_START_TIMEOUT", START_TIMEOUT),
            (pool, "_CALL_TIMEOUT", CALL_TIMEOUT),
            (HostSettings, "current", lambda: injected.Injected(settings, str(self._orders))),
            (Balance, "estimate", lambda *_: None),
        )
        with contextlib.ExitStack() as stack:
            stack.callback(POOL.release)
            for owner, name, value in changes:
                stack.enter_context(mock.patch.object(owner, name, value))
            POOL.release()
            yield

    def sample(self, model: ModelPatcher, at: Callable[[int, Any], None] | None = None, **begin: Any) -> torch.Tensor:
        """A picture, [1, 4, h, w].

        Args:
            at: called with the number of each step, and what it begins with.
            begin: where it does not begin at the first: ``latent`` and ``start_step``.
        """
        return sample(model, self._prompts, at, **begin)

    def _references(self, options: Options) -> dict[tuple[str, int], torch.Tensor]:
        """The sampler's own pictures, begun with the latent that the undisturbed run had at each step."""
        scale = self._model.model.latent_format.scale_factor
        began: dict[int, torch.Tensor] = {}
        model = attach(self._model, options)
        found = {("restart", 0): self.sample(model, began.__setitem__), ("finish", 0): self.sample(self._model)}
        for call in range(1, STEPS):
            for on_failure, other in (("restart", model), ("finish", self._model)):
                picture = self.sample(other, latent=began[call] / scale, start_step=call, force_full_denoise=True)
                found[on_failure, call] = picture
        return found

    def inject(self, fault: Fault) -> Outcome:
        """Sample with ``fault``, then without, and look at what is left."""
        if fault.plan not in self._pictures:
            self._pictures[fault.plan] = self._references(PLANS[fault.plan])
        model = attach(self._model, replace(PLANS[fault.plan], on_failure=fault.on_failure))
        with contextlib.ExitStack() as stack:
            self._prepare(fault, model, stack)
            begin = time.monotonic()
            try:
                how, right = self._judge(fault, self.sample(model))
                if fault.phase == "shutdown":
                    POOL.release()
            except Exception as error:
                how, right = f"{type(error).__name__}: {error}".splitlines()[0], False
            seconds = time.monotonic() - begin
        for order in self._orders.iterdir():
            order.unlink()
        undisturbed = torch.equal(self.sample(model), self._pictures[fault.plan]["restart", 0]) and not last_run().notes
        wrong = not (right and undisturbed)
        return Outcome(how, seconds, wrong, seconds > LATE, self._orphans(), self._leaked_files())

    def state(self) -> dict[str, int]:
        """Of this process: what must not grow."""
        gc.collect()
        return {
            "memory": self._process.memory_info().rss,
            "descriptors": self._process.num_fds(),
            "threads": self._process.num_threads(),
            "processes": len(self._process.children(recursive=True)),
        }

    # -- before ------------------------------------------------------------------------------------------------------

    def _prepare(self, fault: Fault, model: ModelPatcher, stack: contextlib.ExitStack) -> None:
        """Have it happen when its time comes; ``stack`` ends what would go on."""
        if fault.phase in ("spawn", "weights", "any time"):
            POOL.release()
        else:
            self.sample(model)  # so that ranks are there
        if fault.kind == "parent_killed":
            self._kill_another_host(fault.after, stack)
        elif fault.kind == "no_temporary_folder":
            stack.enter_context(mock.patch.object(tempfile, "tempdir", str(self._folder / "missing")))
        elif fault.kind == "disk_full":
            self._fill_a_disk(stack)
        elif fault.kind == "folder_vanishes":
            self._later(fault.after, self._remove_rendezvous, stack)
        elif fault.phase == "any time":
            self._later(fault.after, functools.partial(self._signal, fault), stack)
        elif fault.phase == "between prompts":
            self._signal(fault)
            time.sleep(fault.after / 20)
        else:
            if fault.kind == "clock_jumps":
                stack.enter_context(mock.patch.object(time, "time", lambda clock=time.time: clock() - injected.JUMP))
            if fault.kind == "suspended":
                self._wake(stack)
            place = fault.phase if fault.phase in ("spawn", "weights", "shutdown") else f"call {fault.call}"
            (self._orders / str(fault.rank)).write_text(json.dumps({"kind": fault.kind, "place": place}), encoding="utf-8")

    def _signal(self, fault: Fault) -> None:
        for child in multiprocessing.active_children():
            if child.name == f"asyncdiff-rank-{fault.rank}":
                os.kill(child.pid, getattr(signal, fault.kind.upper()))

    def _remove_rendezvous(self) -> None:
        for folder in self._temporary.iterdir():
            shutil.rmtree(folder, ignore_errors=True)

    def _later(self, seconds: float, act: Callable[[], None], stack: contextlib.ExitStack) -> None:
        timer = threading.Timer(seconds, act)
        timer.start()
        stack.callback(time.sleep, 0.3)  # if it came at the very end, the next prompt is to know
        stack.callback(timer.join)
        stack.callback(timer.cancel)

    def _wake(self, stack: contextlib.ExitStack) -> None:
        """Ranks that are suspended go on after a second."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                for child in self._process.children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if child.status() == psutil.STATUS_STOPPED:
                            over.wait(1.0)
                            child.resume()

        thread = threading.Thread(target=watch)
        thread.start()
        stack.callback(thread.join)
        stack.callback(over.set)

    def _fill_a_disk(self, stack: contextlib.ExitStack) -> None:
        """A small one of its own, which only root can make; Linux."""
        disk = self._folder / "disk"
        disk.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        stack.enter_context(mock.patch.object(tempfile, "tempdir", str(disk)))

    def _kill_another_host(self, seconds: float, stack: contextlib.ExitStack) -> None:
        """Another ComfyUI on the same machine is killed while this one works, some time after it began to start ranks."""
        environment = {**os.environ, "TMPDIR": str(self._another), "PYTHONPATH": os.pathsep.join(sys.path)}
        script = Path(__file__).with_name("another_host.py")
        other = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)

        def kill() -> None:
            assert other.stdout.readline() == "sampling\n"
            time.sleep(seconds)
            self._others += psutil.Process(other.pid).children(recursive=True)
            other.kill()
            other.communicate()

        thread = threading.Thread(target=kill)
        thread.start()
        stack.callback(thread.join)

    # -- after -------------------------------------------------------------------------------------------------------

    def _judge(self, fault: Fault, picture: torch.Tensor) -> tuple[str, bool]:
        """How it ended, and whether the picture is one that may come of that."""
        record = last_run()
        notes = [note for note in record.notes if "there is no report" not in note]  # the picture was done
        if not notes:
            return "undisturbed", torch.equal(picture, self._pictures[fault.plan]["restart", 0])
        if record.plan is None or any("finishes the picture" in note for note in notes):
            how, on_failure, calls = "finished by ComfyUI", "finish", range(STEPS)
        else:  # with stride, not every call is told about
            how, on_failure, told = "restarted", "restart", record.stats is not None and fault.plan != "stride"
            calls = [STEPS - len(record.stats.calls)] if told else range(STEPS)
        expected = [self._pictures[fault.plan][on_failure, call] for call in calls]
        return how, any((picture - right).abs().max() <= TOLERANCE * right.abs().max() for right in expected)

    def _orphans(self) -> int:
        """Processes that are nobody's, zombies included; those of a killed parent have five seconds to notice."""
        ours = {pid for held in POOL._held for pid in held.group.pids}
        tracker = multiprocessing.resource_tracker._resource_tracker._pid
        known = {*ours, *self._strangers, tracker}
        children = [child for child in self._process.children(recursive=True) if child.pid not in known]
        _, left = psutil.wait_procs([*self._others, *children], timeout=5.0)
        self._others.clear()
        return len(left)

    def _leaked_files(self) -> int:
        """In the temporary folder, the user's, and shared memory."""
        temporary = [*self._temporary.iterdir(), *self._another.iterdir()]
        kept = [path for path in self._user.rglob("*") if path.is_file() and path.name != "block_times.json"]
        leaked = len(temporary) + len(kept) + len(_shared_memory() - self._shared)
        for path in temporary:  # counted once
            shutil.rmtree(path)
        return leaked


def _shared_memory() -> set[str]:
    """Names that Python and PyTorch give to it; Linux."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("torch_", "psm_", "sem.mp-"))}
