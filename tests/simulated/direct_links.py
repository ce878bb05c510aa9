"""Links between simulated devices that need no host, as NCCL's: a transfer is the device's work, on a stream of the link's own.

It waits there for its counterpart on the other device. The host goes on, unless ``CUDA_LAUNCH_BLOCKING`` is set; a stream waits
only if it is told to, and whatever synchronises a device waits for all of its transfers. Buffers are read and written when the
transfer is carried out.
"""

import os
import queue
import threading
from datetime import timedelta

import sim
import torch
import torch.distributed as dist

from asyncdiff_nodes.engine import accelerator

LOOPBACK = "127.0.0.1"


class _Work:
    def __init__(self, stream):
        self._stream, self.done = stream, threading.Event()

    def wait(self):
        """Have the stream wait."""
        self._stream.wait_for(self.done)


class Link:
    """A process group of two."""

    def __init__(self, store, side, timeout):
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._threads, options._timeout = 1, timedelta(seconds=timeout)
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
        stream.transfers.append(work.done)
        self._jobs.put((verb, tensor.raw, arguments, work.done))
        if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
            work.done.wait()
        return work

    def send(self, tensors, *arguments):
        return self._post("send", tensors, arguments)

    def recv(self, tensors, *arguments):
        return self._post("recv", tensors, arguments)


def prepare():
    """In a rank, before its links are there."""
    sim.prepare()
    accelerator.links_directly = lambda kind: kind == "sim"
    accelerator.direct_link = Link
