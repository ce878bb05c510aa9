"""Sends from a device through host memory, off the thread that launches kernels."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

import torch

from asyncdiff_nodes.engine import accelerator
from asyncdiff_nodes.engine.tensors import TensorMeta, flat


class Stager:
    """Sends tensors of a device over links between hosts, one after the other, each once its copy from the device is complete.

    Its thread begins with the first one. What fails there is raised by whatever is called next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._jobs: queue.SimpleQueue[tuple[accelerator.Event, Sequence[Any], torch.Tensor] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def send(self, links: Sequence[Any], value: torch.Tensor, meta: TensorMeta) -> None:
        """Send ``value`` over each of ``links`` in layout ``meta``. Its memory may be changed as soon as this returns."""
        self.check()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        copy = accelerator.staging(meta)
        copy.copy_(value, non_blocking=True)
        self._jobs.put((accelerator.event(self._device), links, copy))

    def check(self) -> None:
        """Raise what has failed in the thread: nothing that follows can be sent."""
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        """Wait until all was sent."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self) -> None:
        try:
            accelerator.enter(self._device)
            while (job := self._jobs.get()) is not None:
                ready, links, copy = job
                ready.synchronize()
                for work in [link.send([flat(copy)], 1, 0) for link in links]:
                    work.wait()
        except BaseException as error:
            self._error = error
