"""One rank's share of a model: its own blocks, stubs for the others, and the bookkeeping of what crosses."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine.batch import Arguments, concatenated, sample_of
from asyncdiff_nodes.engine.compression import Decoder, Encoder
from asyncdiff_nodes.engine.parent.calls import CallMessage
from asyncdiff_nodes.engine.planning.graph import Hidden, TensorMeta, tensors_of
from asyncdiff_nodes.engine.planning.profile import block_marks
from asyncdiff_nodes.engine.telemetry import CallRecord, Stopwatch
from asyncdiff_nodes.engine.trees import flatten, unflatten

from .finite import origins
from .stub import Inbox, drift, make_stub, shift
from .transport import Transport

Layout = tuple[tuple[TensorMeta, ...], Any]  # a block's output: its tensors, and the structure they make up
Arrival = Callable[[], tuple[torch.Tensor, ...]]  # waits for a value


@dataclass(frozen=True)
class Share:
    """What one rank owns and exchanges. Blocks are named; sequences are in execution order.

    Attributes:
        first: the first rank of its branch; the others below are counted from there.
        sources: block of another segment that this rank reads -> the rank that sends it.
        sinks: own block -> the ranks that read it.
        hidden: as in :class:`~.plan.Placement`.
    """

    rank: int
    first: int
    segment: int
    blocks: tuple[str, ...]
    owned: frozenset[str]
    sources: dict[str, int]
    sinks: dict[str, tuple[int, ...]]
    hidden: Hidden | None = None


class _Stream:
    """State of one stream in one run.

    Attributes:
        layouts: of the outputs of all blocks, for the whole batch.
        encoders, decoders: of what crosses, by block and number of the tensor in its output.
    """

    def __init__(self, share: Share) -> None:
        self.layouts: dict[str, Layout] = {}
        self.encoders: defaultdict[tuple[str, int], Encoder] = defaultdict(Encoder)
        self.decoders: defaultdict[tuple[str, int], Decoder] = defaultdict(Decoder)
        # what a segment works ahead for is read as many batches later as there are segments between
        self.inboxes = {name: Inbox(share.segment - sender) for name, sender in share.sources.items()}


@dataclass(frozen=True)
class _Part:
    """What is running: a call, or a part of its batch.

    Attributes:
        layouts: of the outputs of all blocks, for this part.
        values: block of another segment -> waits for this part of its value; empty where it is the whole, which inboxes have.
    """

    stream: _Stream
    message: CallMessage
    layouts: dict[str, Layout]
    values: dict[str, Arrival]


@dataclass
class _Logged:
    """What is known of a call, the times as marks that are read when somebody asks.

    Attributes:
        facts: fields of its record.
        waits: where each began and ended.
        blocks: where each began and ended, if they were timed.
        inboxes: of its stream.
        norms: see :meth:`~.stub.Inbox.norms`; of all blocks, on the CPU once ``noted`` is reached.
        counts: how many of them each block has, in this order.
    """

    facts: dict[str, Any]
    start: Any
    end: Any
    waits: list[tuple[Any, Any]]
    blocks: dict[str, Any]
    inboxes: dict[str, Inbox]
    norms: torch.Tensor | None = None
    counts: dict[str, int] = field(default_factory=dict)
    noted: Any = None


class SplitModel:
    """Runs the model's own forward with stubs for foreign blocks; see :class:`Share`."""

    def __init__(self, module: nn.Module, share: Share, device: torch.device, transport: Transport) -> None:
        """Put stubs into ``module`` (on the meta device); weights follow with :meth:`load`."""
        self._module = module.eval()
        self._share = share
        self._device = device
        self._transport = transport
        self._streams: dict[Hashable, _Stream] = {}
        self._placeholders: dict[TensorMeta, torch.Tensor] = {}
        self._now: _Part | None = None
        self._carriers: Mapping[str, int] = share.hidden.carriers if share.hidden else {}
        self._states: torch.Tensor | None = None  # hidden ones, of what is running, where their changes cross
        self._watch = Stopwatch(device)
        self._waits: list[tuple[Any, Any]] = []
        self._log: deque[_Logged] = deque()
        for name in share.blocks:
            block = module.get_submodule(name)
            if name not in share.owned:
                make_stub(block, partial(self._fetch, name))
            elif name in share.sinks:
                block.register_forward_hook(partial(self._produced, name))
        if share.hidden is not None:
            module.get_submodule(share.hidden.block).register_forward_pre_hook(self._begun, with_kwargs=True)

    def load(self, name: str, value: torch.Tensor) -> None:
        """Attach the parameter or buffer ``name``, for the first time or in place of the one before."""
        owner, _, leaf = name.rpartition(".")
        module = self._module.get_submodule(owner)
        value = value.to(self._device)
        if leaf in module._parameters:
            value = nn.Parameter(value, requires_grad=False)
        setattr(module, leaf, value)

    def take_over(self, other: SplitModel) -> None:
        """Attach the parameters and buffers of ``other``, another share of the same model, that this one has as well."""
        mine = {name for name, _ in tensors_of(self._module)}
        for name, tensor in tensors_of(other._module):
            if name in mine:
                self.load(name, tensor)

    def weights(self) -> dict[str, int]:
        """Bytes of every parameter and buffer held, by name."""
        return {name: tensor.nbytes for name, tensor in tensors_of(self._module)}

    def missing(self) -> list[str]:
        """Names of parameters and buffers that no value was loaded for."""
        return [name for name, tensor in tensors_of(self._module) if tensor.is_meta]

    def compile(self, how: Mapping[str, Any]) -> None:
        """Have each own block compiled when it is next called, by ``torch.compile`` with these arguments."""
        # blocks of one class share their code, and torch gives up on code that it has compiled so many times
        dynamo = torch._dynamo.config
        dynamo.cache_size_limit = max(dynamo.cache_size_limit, 2 * len(self._share.owned))
        for name in self._share.owned:
            block = self._module.get_submodule(name)
            block.forward = torch.compile(block.forward, **how)  # not the block: its hooks send and measure

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
            for inbox in stream.inboxes.values():
                inbox.settle()

    def set_layouts(self, key: Hashable, layouts: Sequence[Layout]) -> None:
        """Output layouts of all blocks for the inputs of this stream; before its first call."""
        stream = self._streams.setdefault(key, _Stream(self._share))
        stream.layouts = dict(zip(self._share.blocks, layouts, strict=True))

    def call(self, message: CallMessage, parts: Sequence[tuple[int, Arguments]]) -> tuple[list[torch.Tensor], Any] | None:
        """One computing call of the group.

        A rank that does not compute, a replica in a synchronous call, takes the values that others send, and no more.

        Args:
            parts: items of the batch, and arguments, of each of the call's parts; the whole, or micro-batches.

        Returns:
            Leaves and structure of the model's output, if this rank's is asked for.
        """
        stream = self._streams[message.stream]
        start, sent = self._watch.mark(), self._transport.bytes_sent
        self._waits = []
        self._transport.begin_call(message.synchronous)
        running = self._expect(stream, message, [items for items, _ in parts])
        output, blocks, not_finite = None, {}, []
        if message.computes:
            own = self._share.owned
            timed = block_marks(self._module, own, self._watch) if message.timed else contextlib.nullcontext({})
            checked = origins(self._module, own) if message.checked else contextlib.nullcontext([])
            with timed as blocks, checked as not_finite:
                outputs = []
                for part, (_, (args, kwargs)) in zip(running, parts, strict=True):
                    self._now = part
                    outputs.append(flatten(self._module(*args, **kwargs)))
            self._now = self._states = None  # a video's hidden states are large
            self._transport.end_call()
            if len(parts) > 1:  # all of it is there
                for inbox in stream.inboxes.values():
                    inbox.settle()
            if message.result is not None:
                output = concatenated([leaves for leaves, _ in outputs]), outputs[0][1]
        else:
            self._transport.end_call()
            for inbox in stream.inboxes.values():
                inbox.settle(leave=1)
            if message.ahead:  # nothing was done here that anybody would want to know of
                return None
        facts = {
            "stream": str(message.stream),
            "call": message.index,
            "rank": self._share.rank,
            "segment": self._share.segment,
            "synchronous": message.synchronous and not message.ahead,
            "why": message.why,
            "ahead": message.ahead,
            "bytes_sent": self._transport.bytes_sent - sent,
            "not_finite": tuple(not_finite),
        }
        self._log.append(_Logged(facts, start, self._watch.mark(), self._waits, blocks, stream.inboxes))
        return output

    def note_drift(self) -> None:
        """How much the values of the last call differ from those before; apart from it, since nobody waits for that."""
        if not self._log or self._log[-1].noted is not None:
            return
        last = self._log[-1]
        found = {name: norms for name, inbox in last.inboxes.items() if (norms := inbox.norms())}
        if found:
            last.norms = torch.stack([norm for norms in found.values() for norm in norms]).to("cpu", non_blocking=True)
            last.counts = {name: len(norms) for name, norms in found.items()}
        last.noted = self._watch.mark()

    def records(self, wait: bool = False) -> Iterator[CallRecord]:
        """Telemetry of calls that the device has finished, each call once; with ``wait`` of all calls."""
        seconds, between = self._watch.seconds, self._watch.between
        while self._log and (wait or self._watch.reached(self._log[0].noted)):
            call = self._log.popleft()
            seconds(call.noted)
            spans = tuple((seconds(a), seconds(b)) for a, b in call.waits)
            waited = sum(b - a for a, b in spans)
            begin, finish = seconds(call.start), seconds(call.end)
            times = {"start": begin, "end": finish, "compute": finish - begin - waited, "wait": waited, "waits": spans}
            took = {name: between(*marks) for name, marks in call.blocks.items()}
            norms = iter(() if call.norms is None else call.norms.tolist())
            drifts = {name: drift(list(islice(norms, count))) for name, count in call.counts.items()}
            yield CallRecord(**call.facts, **times, drift=drifts, blocks=took)

    def _expect(self, stream: _Stream, message: CallMessage, items: Sequence[int]) -> list[_Part]:
        """Have the inboxes expect the values of this call; the parts that are to be computed."""
        batch, whole = sum(items), len(items) == 1
        parts = [
            _Part(stream, message, stream.layouts if whole else _part_of(stream.layouts, count, batch), {}) for count in items
        ]
        coming: dict[str, list[Arrival]] = {}
        for part in parts:  # on each link in the order in which they are sent
            for name, sender in self._share.sources.items():
                if sender < len(message.targets):
                    arrival = self._arrival(sender, name, part)
                    if not whole:
                        arrival = part.values[name] = cache(arrival)
                    coming.setdefault(name, []).append(arrival)
        for name, arrivals in coming.items():
            arrival = arrivals[0] if whole else partial(_all_of, arrivals)
            changes = _changes(message) and name in self._carriers
            stream.inboxes[name].expect(message.targets[self._share.sources[name]], arrival, changes)
        return parts

    def _arrival(self, sender: int, name: str, part: _Part) -> Arrival:
        coming, decoders = [], []
        for number, meta in enumerate(part.layouts[name][0]):
            layout, decode = part.stream.decoders[name, number].expect(meta, part.message.compression)
            coming.append(self._transport.receive(self._share.first + sender, layout))
            decoders.append(decode)

        def wait() -> tuple[torch.Tensor, ...]:
            start = self._watch.mark()
            values = [value.wait() for value in coming]
            self._waits.append((start, self._watch.mark()))
            return tuple(decode(value) for decode, value in zip(decoders, values, strict=True))

        return wait

    def _fetch(self, name: str) -> Any:
        now = self._now
        metas, structure = now.layouts[name]
        inbox = now.stream.inboxes.get(name)
        if inbox is None:  # no block of this rank reads it: only its shape matters
            return unflatten([self.placeholder(meta) for meta in metas], structure)
        if name in now.values:
            return unflatten([leaf.clone() for leaf in now.values[name]()], structure)
        leaves = inbox.current() if now.message.synchronous else inbox.stale(now.message.reads)
        if inbox.change:
            shift(leaves[self._carriers[name]], self._states, 1)
        return unflatten(leaves, structure)

    def placeholder(self, meta: TensorMeta) -> torch.Tensor:
        """A tensor of this layout whose values do not matter."""
        # one per layout, not per block: at high resolutions they would add up to more than the segment needs
        if meta not in self._placeholders:
            self._placeholders[meta] = torch.zeros(meta.shape, dtype=meta.dtype, device=self._device)
        return self._placeholders[meta]

    def _begun(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first block of a transformer takes its hidden states."""
        if _changes(self._now.message):
            self._states = sample_of(args, kwargs, self._share.hidden.argument).clone()  # a block may add to them in place

    def _produced(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        now, leaves = self._now, flatten(output)[0]
        if _changes(now.message) and name in self._carriers:
            index = self._carriers[name]
            leaves = [*leaves[:index], leaves[index].clone(), *leaves[index + 1 :]]
            shift(leaves[index], self._states, -1)
        for number, (leaf, meta) in enumerate(zip(leaves, now.layouts[name][0], strict=True)):
            if tuple(leaf.shape) != meta.shape or leaf.dtype != meta.dtype:
                raise RuntimeError(
                    f"block {name} returned {leaf.dtype} {tuple(leaf.shape)}, but the trace says {meta.dtype} {meta.shape}"
                )
            value, layout = now.stream.encoders[name, number](leaf, meta, now.message.compression)
            for receiver in self._share.sinks[name]:
                self._transport.send(self._share.first + receiver, value, layout)


def _changes(message: CallMessage) -> bool:
    """Whether changes of hidden states cross in a call: others are to be exact."""
    return message.ahead or not message.synchronous


def _part_of(layouts: dict[str, Layout], items: int, batch: int) -> dict[str, Layout]:
    """Those for ``items`` of the ``batch`` items."""
    return {name: (tuple(meta.part(items, batch) for meta in metas), structure) for name, (metas, structure) in layouts.items()}


def _all_of(arrivals: Sequence[Arrival]) -> tuple[torch.Tensor, ...]:
    """The value whose parts these wait for."""
    return tuple(concatenated([arrival() for arrival in arrivals]))
