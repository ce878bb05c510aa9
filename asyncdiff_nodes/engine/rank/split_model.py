"""A model of which this rank has its share: own blocks compute, stubs of the others hand back what was received."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine.bands import BandMode
from asyncdiff_nodes.engine.batch import Arguments, concatenated, sample_of
from asyncdiff_nodes.engine.messages import CallMessage, Opening
from asyncdiff_nodes.engine.planning.profile import block_marks
from asyncdiff_nodes.engine.stub import make_stub, runner
from asyncdiff_nodes.engine.telemetry import CallRecord, Stopwatch
from asyncdiff_nodes.engine.tensors import TensorMeta, tensors_of
from asyncdiff_nodes.engine.trees import flatten, unflatten

from .boot import Boot
from .call_log import CallLog, LoggedCall
from .exchange import RankExchange
from .finite import origins
from .hidden_states import add_states, take_states
from .receiver import Receiver
from .share import Share
from .stream_state import Pass, StreamState
from .transport import Transport


class SplitModel:
    """Runs the model's own forward with stubs for foreign blocks; see :class:`~.share.Share`.

    A model runs ``a``, ``b``, ``c`` and ``d``; rank 1 of two owns the last two, of which ``c`` reads ``b``. In a call of rank 1
    the stub of ``a`` hands back a tensor that nobody reads, and that of ``b`` what rank 0 has sent, in this call or an earlier
    one. ``c`` and ``d`` compute. What another rank reads of them is sent as soon as it is there.
    """

    def __init__(self, module: nn.Module, share: Share, device: torch.device, transport: Transport, boot: Boot) -> None:
        """Put stubs into ``module`` (on the meta device); for weights see :meth:`load`."""
        self._module = module.eval()
        self._run = runner(self._module, boot.entry)
        self._share = share
        self._device = device
        self._transport = transport
        self._streams: dict[Hashable, StreamState] = {}
        self._placeholders: dict[TensorMeta, torch.Tensor] = {}
        self._running: Pass | None = None
        self._foreign: dict[str, nn.Module] = {}  # blocks that are stubs in calls that are not in bands
        self._carriers: Mapping[str, int] = share.hidden.carriers if share.hidden else {}
        self._compiled = False
        self._watch = Stopwatch(device)
        self._receiver = Receiver(share, transport, self._watch)
        self._log = CallLog(self._watch)
        self._exchange = RankExchange(share, transport, self._watch)
        self._bands = BandMode(self._exchange, boot.banded)
        for name in share.blocks:
            block = module.get_submodule(name)
            if name not in share.owned and share.bands == 1:
                make_stub(block, partial(self._handed_back, name))
            elif name not in share.owned:
                self._foreign[name] = block
            elif name in share.sinks:
                block.register_forward_hook(partial(self._send, name))
        if share.hidden is not None:
            keep = partial(self._keep_states, share.hidden.argument)
            module.get_submodule(share.hidden.block).register_forward_pre_hook(keep, with_kwargs=True)

    # -- weights -----------------------------------------------------------------------------------------------------

    def load(self, name: str, value: torch.Tensor) -> None:
        """Attach the parameter or buffer ``name``, for the first time or in place of the one before."""
        self._attach(name, value.to(self._device))

    def _attach(self, name: str, value: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self._module.get_submodule(owner)
        if leaf in module._parameters:
            value = nn.Parameter(value, requires_grad=False)
        setattr(module, leaf, value)

    def unload(self, least: int | None) -> dict[str, int]:
        """Free parameters and buffers, the largest first: all, or ``least`` bytes of them. Their names and shapes stay.

        Returns:
            Names and bytes of what was freed.
        """
        freed, left = dict[str, int](), math.inf if least is None else least
        held = ((name, tensor) for name, tensor in tensors_of(self._module) if not tensor.is_meta)
        for name, tensor in sorted(held, key=lambda each: -each[1].nbytes):
            if left <= 0:
                break
            freed[name] = tensor.nbytes
            left -= tensor.nbytes
            self._attach(name, tensor.to("meta"))
        return freed

    def take_over(self, other: SplitModel) -> None:
        """Attach the parameters and buffers of ``other``, another share of the same model, that this one has as well."""
        mine = {name for name, _ in tensors_of(self._module)}
        for name, tensor in tensors_of(other._module):
            if name in mine:
                self.load(name, tensor)

    def weights(self) -> dict[str, int]:
        """Bytes of every parameter and buffer held, by name."""
        return {name: tensor.nbytes for name, tensor in tensors_of(self._module) if not tensor.is_meta}

    def missing(self) -> list[str]:
        """Names of parameters and buffers that no value was loaded for."""
        return [name for name, tensor in tensors_of(self._module) if tensor.is_meta]

    def compile(self, how: Mapping[str, Any]) -> None:
        """Have each own block compiled when it is next called, but in bands, by ``torch.compile`` with these arguments."""
        # blocks of one class share their code, and torch gives up on code that it has compiled so many times
        dynamo = torch._dynamo.config
        dynamo.cache_size_limit = max(dynamo.cache_size_limit, 2 * len(self._share.owned))
        for name in self._share.owned:
            block = self._module.get_submodule(name)
            block.forward = torch.compile(block.forward, **how)  # not the block: its hooks send and measure
        self._compiled = True

    # -- streams -----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every stream and record."""
        for key in list(self._streams):
            self.forget(key)
        self._log.clear()
        self._placeholders.clear()
        self._watch.restart()

    def forget(self, key: Hashable) -> None:
        """Forget a stream, if it is known. Values on their way are received first, to keep the links in step."""
        if (stream := self._streams.pop(key, None)) is not None:
            stream.settle()

    def open(self, key: Hashable, opening: Opening) -> None:
        """Take what stays as it is in all calls of this stream; before its first one."""
        stream = self._streams.setdefault(key, StreamState(self._share))
        stream.layouts = dict(zip(self._share.blocks, opening.layouts, strict=True))
        stream.bands = opening.bands

    # -- one call ----------------------------------------------------------------------------------------------------

    def call(self, message: CallMessage, parts: Sequence[tuple[int, Arguments]]) -> tuple[list[torch.Tensor], Any] | None:
        """Do what a computing call of the group asks of this rank.

        A rank that does not compute, a replica in a synchronous call, takes the values that others send, and no more.

        Args:
            parts: items of the batch, and arguments, of each of the call's parts; the whole, or micro-batches.

        Returns:
            Leaves and structure of the model's output, if this rank's is asked for.
        """
        stream = self._streams[message.stream]
        start, sent = self._watch.mark(), self._transport.bytes_sent
        self._transport.begin_call(message.synchronous or message.banded)
        self._exchange.waits = []
        passes = self._receiver.expect(stream, message, [items for items, _ in parts])
        output: tuple[list[torch.Tensor], Any] | None = None
        blocks: Mapping[str, Any] = {}
        not_finite: Sequence[str] = ()
        if message.computes:
            output, blocks, not_finite = self._compute(message, passes, [arguments for _, arguments in parts])
        else:
            self._transport.end_call()
            stream.settle(leave=1)
            if message.ahead:  # nothing was done here that anybody would want to know of
                return None
        waits = self._receiver.waits + self._exchange.waits
        record = CallRecord(
            stream=str(message.stream),
            call=message.index,
            rank=self._share.rank,
            segment=self._share.segment,
            synchronous=message.synchronous and not message.ahead,
            start=0.0,  # times follow when the device has come so far, see CallLog
            end=0.0,
            compute=0.0,
            wait=0.0,
            why=message.why,
            ahead=message.ahead,
            banded=message.banded,
            bytes_sent=self._transport.bytes_sent - sent,
            not_finite=tuple(not_finite),
        )
        self._log.add(LoggedCall(record, start, self._watch.mark(), waits, blocks, stream.inboxes))
        return output

    def _compute(
        self, message: CallMessage, passes: Sequence[Pass], arguments: Sequence[Arguments]
    ) -> tuple[tuple[list[torch.Tensor], Any] | None, Mapping[str, Any], Sequence[str]]:
        """Run the model, once for each part of the call.

        Returns:
            What :meth:`call` does; marks of when each block began and ended, if they were to be timed; the blocks that NaN or
            infinity come from, if these were to be looked for.
        """
        own, outputs = self._share.owned, []
        bands = passes[0].stream.bands if message.banded else None
        with contextlib.ExitStack() as stack:
            blocks = stack.enter_context(block_marks(self._module, own, self._watch)) if message.timed else {}
            not_finite = stack.enter_context(origins(self._module, own)) if message.checked else []
            if bands is None:
                stack.enter_context(self._stubs())
            else:
                if self._compiled:  # the compiler would leave out what functions exchange
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(self._bands.scoped(self._module, bands))
            for part, (args, kwargs) in zip(passes, arguments, strict=True):
                self._running = part
                output = self._run(*args, **kwargs) if bands is None else self._bands.run(bands, self._run, args, kwargs)
                outputs.append(flatten(output))
        self._running = None
        for part in passes:
            part.states = None  # a video's hidden states are large
        self._transport.end_call()
        if len(passes) > 1:  # all of it is there
            passes[0].stream.settle()
        result = None if message.result is None else (concatenated([leaves for leaves, _ in outputs]), outputs[0][1])
        return result, blocks, not_finite

    @contextlib.contextmanager
    def _stubs(self) -> Iterator[None]:
        """While this lasts, blocks of others are stubs whose weights this rank has as well."""
        for name, block in self._foreign.items():
            block.forward = partial(self._stub, name)
        try:
            yield
        finally:
            for block in self._foreign.values():
                del block.forward

    def _stub(self, name: str, *_: Any, **__: Any) -> Any:
        return self._handed_back(name)

    def note_drift(self) -> None:
        """Note how much the values of the last call differ from those before; see :meth:`.CallLog.note_drift`."""
        self._log.note_drift()

    def records(self, wait: bool = False) -> Iterator[CallRecord]:
        """Yield telemetry of calls that the device has finished; see :meth:`.CallLog.records`."""
        return self._log.records(wait)

    # -- while the forward runs --------------------------------------------------------------------------------------

    @property
    def _pass(self) -> Pass:
        """The one that is running."""
        assert self._running is not None, "blocks run within calls only"
        return self._running

    @property
    def _states(self) -> torch.Tensor:
        """The hidden states that the first block took."""
        assert self._pass.states is not None, "it runs before all that hand them on"
        return self._pass.states

    def _handed_back(self, name: str) -> Any:
        """Make up the output of a stub."""
        running = self._pass
        metas, structure = running.layouts[name]
        inbox = running.stream.inboxes.get(name)
        if inbox is None:  # no block of this rank reads it: only its shape matters
            leaves: Sequence[torch.Tensor] = [self.placeholder(meta) for meta in metas]
        elif name in running.arrivals:
            leaves = [leaf.clone() for leaf in running.arrivals[name]()]
        else:
            leaves = inbox.current() if running.message.synchronous else inbox.stale(running.message.reads)
            if inbox.change:
                add_states(leaves[self._carriers[name]], self._states)
        return unflatten(leaves, structure)

    def placeholder(self, meta: TensorMeta) -> torch.Tensor:
        """Return a tensor of this layout whose values do not matter."""
        # one per layout, not per block: at high resolutions they would add up to more than the segment needs. Not one for all,
        # since glue may add one to another in place
        if meta not in self._placeholders:
            self._placeholders[meta] = torch.zeros(meta.shape, dtype=meta.dtype, device=self._device)
        return self._placeholders[meta]

    def _keep_states(self, place: tuple[int, str], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the hidden states that the first block of a transformer takes, at ``place`` among its arguments."""
        if self._pass.message.changes_cross:
            # a block may add to them in place
            self._pass.states = sample_of(args, kwargs, place).clone()

    def _send(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        """Send what an own block has returned to the ranks that read it."""
        running, leaves = self._pass, flatten(output)[0]
        if running.message.banded:
            return
        if running.message.changes_cross and name in self._carriers:
            index = self._carriers[name]
            leaves = [*leaves[:index], leaves[index].clone(), *leaves[index + 1 :]]
            take_states(leaves[index], self._states)
        for number, (leaf, meta) in enumerate(zip(leaves, running.layouts[name][0], strict=True)):
            if tuple(leaf.shape) != meta.shape or leaf.dtype != meta.dtype:
                raise RuntimeError(
                    f"block {name} returned {leaf.dtype} {tuple(leaf.shape)}, but the trace says {meta.dtype} {meta.shape}"
                )
            value, layout = running.stream.encoders[name, number](leaf, meta, running.message.compression)
            receivers = [self._share.first + receiver for receiver in self._share.sinks[name]]
            self._transport.send(receivers, value, layout)
