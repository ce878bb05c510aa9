"""One rank: what it does with each message of its parent; and the loop of a process that is one after the other."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import traceback
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine import accelerator, wire
from asyncdiff_nodes.engine.batch import Arguments, batch_of
from asyncdiff_nodes.engine.inputs import join
from asyncdiff_nodes.engine.messages import CallMessage, Opening
from asyncdiff_nodes.engine.rendezvous import PipeStore, open_store
from asyncdiff_nodes.engine.telemetry import RankReport, clock
from asyncdiff_nodes.engine.tensors import dense_on_cpu
from asyncdiff_nodes.engine.trees import unflatten

from . import numerics
from .boot import Boot
from .finite import is_finite
from .share import Share
from .split_model import SplitModel
from .transport import Transport


def serve(conn: Connection) -> None:
    """Be a rank, and then one of another group, until the parent says that it is over, or is gone; ends the process.

    Args:
        conn: duplex pipe for messages; see :mod:`.wire`.
    """
    try:
        _serve(conn)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent closed the group, or is gone
    except BaseException as error:
        with contextlib.suppress(OSError):
            wire.send(conn, last_words(error))
        os._exit(1)  # not sys.exit: links with a dead peer would hang in their destructors
    os._exit(0)


def _serve(conn: Connection) -> None:
    send = partial(wire.send, conn)
    rank: Rank | None = None
    while True:
        header, tensors = wire.receive(conn)
        if isinstance(header, Boot):
            rank = Rank(header, send, partial(wire.receive, conn))
            gc.enable()  # see asyncdiff_nodes.spawned
            continue
        assert rank is not None, "a process that rests is first told what it is to be"
        if header[0] == "rest":
            rank.close()
            device, rank = rank.device, None
            _free(device)
            send(("resting",))
        elif not rank.handle(header, tensors):
            return


def _free(device: torch.device) -> None:
    """Free what nobody holds any more: a tree of modules and its hooks hold each other."""
    gc.collect()
    accelerator.empty_cache(device)


def last_words(error: BaseException) -> tuple[str, str, str, float]:
    """Say what a rank failed with: the error's first line, the traceback, and when, on its machine's clock."""
    cause = "".join(traceback.format_exception_only(error)).splitlines()[0]
    return "failure", cause, "".join(traceback.format_exception(error)), clock()


class Rank:
    """One rank, which does what its parent's messages say.

    Args:
        boot: what it is.
        send: takes header and tensors of a message to the parent.
        receive: waits for one of the parent's, to be given where the parent hands on what ranks say to each other.

    Attributes:
        device: computes what is this rank's.
    """

    def __init__(self, boot: Boot, send: Callable[..., None], receive: Callable[[], Any] | None = None) -> None:
        self._send = send
        self._boot = boot
        self.device = torch.device(boot.locations[boot.share.rank].device)
        torch.set_num_threads(boot.threads)
        accelerator.before_direct_links(one_machine=len({location.host for location in boot.locations}) == 1)
        accelerator.enter(self.device)
        if boot.prepare is not None:
            boot.prepare()
        gc.freeze()  # what is imported by now stays: whoever looks for what nobody holds need not look there
        self._store = open_store(boot.rendezvous, boot.timeout, send, receive)
        self._transport = Transport(boot.share.rank, boot.locations, self._store, boot.timeout, boot.staged)
        self._share = boot.share
        self._model = SplitModel(_built(boot), boot.share, self.device, self._transport, boot)
        self._known: dict[Hashable, tuple[Opening, list[Any]]] = {}  # of each stream, with the leaves of its last call
        self._parameters: dict[int, torch.Tensor] = {}  # by the parent's numbers
        self._used: set[int] = set()
        self._run = 0

    @torch.inference_mode()
    def close(self) -> None:
        """Forget all that concerns the process beyond this object; the other ranks must do so, too."""
        self._model.reset()
        self._transport.close()
        if self._boot.compile is not None:
            torch._dynamo.reset()

    @torch.inference_mode()
    def handle(self, header: Any, tensors: list[torch.Tensor]) -> bool:
        """Do what one message says; returns whether there may be another one."""
        verb, *rest = header
        if verb == "call":
            self._call(rest[0], tensors)
        elif verb == "reset":
            self._run, settings = rest
            numerics.restore(settings)  # the host's modules have set their own when they were imported
            self._model.reset()
            self._known.clear()
            self._parameters = {number: self._parameters[number] for number in self._used}
            self._used.clear()
        elif verb == "forget":
            self._model.forget(rest[0])
            self._known.pop(rest[0], None)
        elif verb == "tidy":
            self._tidy()
        elif verb == "unload":
            freed = self._model.unload(rest[0])
            _free(self.device)
            self._send(("unloaded", freed))
        elif verb == "weight":
            self._model.load(rest[0], tensors[0])
        elif verb == "move":
            self._move(rest[0])
        elif verb == "connect":
            self._connect(rest[0])
        elif verb == "meet" and isinstance(self._store, PipeStore):  # of links that this rank has no part in, or has opened
            self._store.take(*rest)
        elif verb == "report":
            self._send_records(wait=True)
            self._send(("report", rest[0], self._report()))
        return bool(verb != "close")

    def _tidy(self) -> None:
        """Keep nothing of the last run, and give the device's memory back, which other processes cannot have otherwise."""
        self._send_records(wait=True)
        self._model.reset()
        self._known.clear()
        self._transport.flush()
        accelerator.empty_cache(self.device)

    def _move(self, share: Share) -> None:
        """Take another share of the model: keep the weights of blocks that stay, free those of others; the rest will follow."""
        self._send_records(wait=True)
        self._model.reset()
        self._known.clear()
        model = SplitModel(_built(self._boot), share, self.device, self._transport, self._boot)
        model.take_over(self._model)
        self._share, self._model = share, model
        _free(self.device)

    def _connect(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Link up with the other ranks, now that all weights are in, and tell the parent."""
        if missing := self._model.missing():
            raise RuntimeError(f"no value was received for {missing[:5]}")
        if self._boot.compile is not None:
            self._model.compile(self._boot.compile)
        self._transport.open(pairs)
        self._send(("ready", self._transport.bandwidth, self._transport.refusals))

    def _call(self, message: CallMessage, tensors: list[torch.Tensor]) -> None:
        opening, known = self._known.get(message.stream, (None, []))
        if message.opening is not None:
            opening = message.opening
            self._model.open(message.stream, opening)
        assert opening is not None, "a stream begins with one"
        leaves = [
            known[i] if kind == "same" else self._leaf(kind, what, tensors) for i, (kind, what) in enumerate(message.leaves)
        ]
        self._known[message.stream] = opening, leaves
        times = [self._leaf(*packed, tensors) for packed in message.timestep]
        timestep = unflatten(times, message.timestep_structure)
        args, kwargs = join(leaves, opening.structure, timestep, self._boot.timestep, opening.positional)
        result = self._model.call(message, self._parts(args, kwargs, message.parts))
        if result is not None:
            leaves, structure = [dense_on_cpu(leaf) for leaf in result[0]], result[1]
            self._send(("result", message.run, message.stream, message.result, structure, is_finite(leaves)), leaves)
        self._model.note_drift()
        self._send_records()

    def _parts(self, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> list[tuple[int, Arguments]]:
        """Divide the call into ``count`` parts: items of the batch, and arguments, of each."""
        sample, batch = self._boot.sample, batch_of(args, kwargs, self._boot.sample)
        if count == 1:
            return [(batch, (args, kwargs))]
        parts = self._boot.divide(args, kwargs, batch, count)
        if len(parts) != count:
            raise RuntimeError(f"the batch was to be divided into {count} parts, not {len(parts)}")
        return [(batch_of(*part, sample), part) for part in parts]

    def _send_records(self, wait: bool = False) -> None:
        for record in self._model.records(wait):
            self._send(("record", self._run, record))

    def _leaf(self, kind: str, what: Any, tensors: list[torch.Tensor]) -> Any:
        if kind == "unused":
            return self._model.placeholder(what)
        if kind == "parameter":
            number, index = what
            if index is not None:
                self._parameters[number] = self._here(tensors[index])
            self._used.add(number)
            return self._parameters[number]
        return self._here(tensors[what]) if kind == "tensor" else what

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move a tensor to the rank's device; a GPU's queue is not waited for."""
        return tensor.to(self.device, non_blocking=True)

    def _report(self) -> RankReport:
        return RankReport(
            rank=self._share.rank,
            pid=os.getpid(),
            device=self._boot.locations[self._share.rank].name,
            segment=self._share.segment,
            weights=self._model.weights(),
            replicated_bytes=self._boot.replicated_bytes,
        )


def _built(boot: Boot) -> nn.Module:
    """Unpickle the module tree on the meta device, or what makes it."""
    found = pickle.loads(boot.skeleton)
    return found if isinstance(found, nn.Module) else found()
