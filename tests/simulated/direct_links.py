"""Links between simulated devices that need no host, as NCCL's: a transfer is the device's work, on a stream of the link's own.

It waits there for its counterpart on the other device. The host goes on, unless ``CUDA_LAUNCH_BLOCKING`` is set; a stream waits
only if it is told to, and whatever synchronises a device waits for all of its transfers. Buffers are read and written when the
transfer is carried out. They may be told not to open, to hang, or to bring other values, as those of GPUs do where a system's
settings forbid transfers between them.
"""

import functools
import os
import queue
import threading
from datetime import timedelta

import sim
import torch
import torch.distributed as dist

from asyncdiff_nodes.engine import accelerator
from asyncdiff_nodes.engine.rank import links

LOOPBACK = "127.0.0.1"


class _Work:
    def __init__(self, stream):
        self._stream, self.done = stream, threading.Event()

    def wait(self):
        """Have the stream wait."""
        self._stream.wait_for(self.done)


class Link:
    """A process group of two, with a fault or without."""

    def __init__(self, store, side, timeout, fault=""):
        if fault == "fails":
            raise RuntimeError("no shared memory\nand much more")
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._threads, options._timeout = 1, timedelta(seconds=timeout)
        self._fault, self._works = fault, []
        self._gloo, self._jobs = dist.ProcessGroupGloo(store, side, 2, options), queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    @torch.inference_mode()
    def _run(self):
        while True:
            verb, raw, arguments, done = self._jobs.get()
            getattr(self._gloo, verb)([raw], *arguments).wait()
            done.set()

    def _post(self, verb, tensors, arguments):
        (tensor,) = tensors
        stream = sim.stream_of(tensor)
        work = _Work(stream)
        self._works.append(work)
        stream.transfers.append(work.done)
        if self._fault != "hangs":
            raw = torch.zeros_like(tensor.raw) if self._fault == "garbles" else tensor.raw
            self._jobs.put((verb, raw, arguments, work.done))
        if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
            work.done.wait()
        return work

    def send(self, tensors, *arguments):
        return self._post("send", tensors, arguments)

    def recv(self, tensors, *arguments):
        return self._post("recv", tensors, arguments)

    def abort(self):
        """Let nobody wait any longer."""
        for work in self._works:
            work.done.set()


def prepare(fault="", trial_seconds=links.TRIAL_SECONDS):
    """In a rank, before its links are there: all of them have the fault."""
    sim.prepare()
    accelerator.links_directly = lambda kind: kind == sim.KIND
    accelerator.direct_link = functools.partial(Link, fault=fault)
    links.TRIAL_SECONDS = trial_seconds


def prepare_beside(host, **faults):
    """In a rank of ComfyUI, which ``host`` prepares: the same."""
    prepare(**faults)
    host()
