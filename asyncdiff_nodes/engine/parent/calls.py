"""What the parent tells the ranks: one message per rank and computing call, composed from the stream's inputs so far."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from asyncdiff_nodes.engine import wire
from asyncdiff_nodes.engine.errors import InputChangedError, ScheduleError
from asyncdiff_nodes.engine.inputs import Held, Inputs, Packed, difference, only
from asyncdiff_nodes.engine.planning.graph import BlockGraph
from asyncdiff_nodes.engine.planning.lookahead import NoiseLevels, Outlook
from asyncdiff_nodes.engine.planning.plan import Placement, Plan
from asyncdiff_nodes.engine.planning.schedule import Call, Kind, call_at, calls_ahead

TIMED = 3  # how many calls are to say how long each block took, of either kind


@dataclass(frozen=True)
class Run:
    """One denoising run.

    Attributes:
        number: of the run, so that what an older one left behind is not mistaken for its own.
        timesteps: of every call of a stream; None if not known.
        levels: of the same calls.
        checked: ranks look in every call for the blocks that NaN or infinity come from.
    """

    number: int
    plan: Plan
    timesteps: tuple[float, ...] | None = None
    levels: NoiseLevels | None = None
    checked: bool = False


class Opening(NamedTuple):
    """What stays as it is in all calls of a stream.

    Attributes:
        structure, positional: as in :class:`~.inputs.Inputs`.
        layouts: output layouts of all blocks.
    """

    structure: Any
    positional: bool
    layouts: tuple[Any, ...]


class CallMessage(NamedTuple):  # which pickles without the names
    """One computing call, for one rank.

    Attributes:
        run, stream, index: which call of which stream.
        targets, reads: as in :class:`~.schedule.Call`; ``reads`` is this rank's.
        why: it is synchronous: "warm-up", "move", "cool-down", or "" where it is not.
        ahead: the call is no call of the caller's; see :func:`~.schedule.calls_ahead`.
        parts: of its batch, that the rank is to compute one after the other.
        compression: of the values that cross in it.
        timed: its record is to say how long each block took.
        checked: its record is to say which blocks NaN or infinity come from.
        leaves: as in :class:`~.inputs.Inputs`.
        timestep: this rank's.
        opening: on a stream's first call only, and on the first one after a move.
        result: index of the call whose result this rank returns, or None.
    """

    run: int
    stream: Hashable
    index: int
    synchronous: bool
    why: str
    computes: bool
    ahead: bool
    parts: int
    compression: str
    timed: bool
    checked: bool
    targets: tuple[int, ...]
    reads: int | None
    leaves: tuple[Packed, ...]
    timestep: Packed
    opening: Opening | None
    result: int | None


class Stream:
    """The parent's view of one stream in one run, from its first call on.

    Args:
        inputs: of the first call.
        sample: position and keyword of the sample in the model's forward.
        graph: traced with these inputs.
        held: what each rank of the branch has of earlier runs.
        parts: micro-batches of a synchronous call.

    Raises:
        ScheduleError: the first call's timestep is none of the run's.
    """

    def __init__(
        self,
        key: Hashable,
        run: Run,
        inputs: Inputs,
        sample: tuple[int, str],
        graph: BlockGraph,
        placement: Placement,
        held: Sequence[Held],
        parts: int = 1,
    ) -> None:
        self.graph = graph
        self._key, self._run, self._held, self._parts = key, run, held, parts
        self._base = run.plan  # with another warm-up after a move
        self._signature = inputs.signature
        self._sample = inputs.position(sample)
        self._reads = [inputs.positions(block.reads) for block in graph.blocks]
        self._hidden = inputs.positions(graph.hidden.reads) if graph.hidden else frozenset()
        self._needs = self._needed(placement)
        self._cold = 0  # the first call on these ranks
        self._moved = False
        self._next = 0  # the call that is expected
        self._sent: list[Any] | None = None  # the leaves that the ranks have
        self._last_timestep: Any = None
        self._timesteps, self._outlook = None, None
        if run.timesteps is not None:
            first = _find(inputs, run.timesteps)
            if first is None:
                raise ScheduleError(
                    f"stream {key!r} begins at timestep {inputs.timestep_number():g}, which is none of those that begin() "
                    "announced (stride=1 also runs without: call begin())"
                )
            self._timesteps = run.timesteps[first:]
            if run.plan.forecast:
                levels = run.levels or NoiseLevels.unknown(len(run.timesteps))
                self._outlook = Outlook(NoiseLevels(levels.sigmas[first:], levels.scales[first:]))

    def next(self, inputs: Inputs) -> Call:
        """The call that comes now, with these inputs.

        Raises:
            InputChangedError, ScheduleError: see their messages.
        """
        if inputs.signature != self._signature:
            raise InputChangedError(
                f"the inputs of stream {self._key!r} changed within a run ({difference(self._signature, inputs.signature)}): "
                "keep shapes and dtypes, use another stream, or call begin() for a new run"
            )
        index = self._position(inputs)
        if self._moved:
            self._begin_again(index)
        call = call_at(self._base, index, self._total)
        if self._outlook is not None:
            self._outlook.see(call.index, inputs.leaves[self._sample])
            call = call_at(self._plan, call.index, self._total)
        return call

    def messages(self, call: Call, inputs: Inputs, ranks: int) -> Iterator[tuple[int, CallMessage, list[torch.Tensor]]]:
        """What to send for ``call``, in this order: rank of the branch, message and tensors; each rank several times or never."""
        for part in (call, *calls_ahead(self._plan, call.index, self._total)):
            if part.computes:
                packed, tensors, known = inputs.pack(self._sent, always=self._sample)
                opening = self._opening(inputs) if self._sent is None else None
                # whose result is waited for comes first: what the others get ahead with is still to be reckoned
                order = range(ranks) if part.kind is Kind.SYNCHRONOUS else reversed(range(ranks))
                for rank in order:
                    yield rank, *self._message(rank, part, inputs, packed, tensors, opening)
                self._sent = known
        self._next = call.index + 1
        self._last_timestep = inputs.timestep

    def move(self, placement: Placement) -> None:
        """The blocks are elsewhere from now on: the ranks have neither inputs nor values of this stream any more."""
        self._needs = self._needed(placement)
        self._sent, self._moved = None, True

    def _begin_again(self, index: int) -> None:
        """Call ``index`` is the first after a move: the warm-up ends with it, or with its batch, if it was over."""
        self._cold, self._moved = index, False
        if index >= self._base.warmup:
            self._base = replace(self._base, warmup=index + 1 + -index % self._base.stride)

    def _needed(self, placement: Placement) -> tuple[frozenset[int], ...]:
        """Per segment, positions of the leaves that its ranks read."""
        owned = map(placement.owned, range(self._run.plan.segments))
        hidden = self._hidden if placement.hidden else frozenset()
        return tuple(hidden.union(*(self._reads[i] for i in blocks)) for blocks in owned)

    def _position(self, inputs: Inputs) -> int:
        """The index of the call with these inputs. At stride 1 some may have been left out, as nodes that cache do."""
        if self._timesteps is None or self._next >= len(self._timesteps):
            return self._next
        expected = self._timesteps[self._next :]
        found = _find(inputs, expected if self._run.plan.stride == 1 else expected[:1])
        if found is None:
            raise ScheduleError(
                f"call {self._next + 1} has timestep {inputs.timestep_number():g}, but begin() announced {expected[0]:g}: the "
                "calls of a run must follow the timesteps that it was begun with (stride=1 also runs without: call begin())"
            )
        return self._next + found

    @property
    def _plan(self) -> Plan:
        """Nobody works ahead on inputs that cannot be foreseen: then the latest values are the best."""
        plan = self._base
        return plan if self._outlook is None or self._outlook.steady else replace(plan, forecast=0)

    @property
    def _total(self) -> int | None:
        return None if self._timesteps is None else len(self._timesteps)

    def _opening(self, inputs: Inputs) -> Opening:
        return Opening(inputs.structure, inputs.positional, tuple((b.outputs, b.structure) for b in self.graph.blocks))

    def _message(
        self,
        rank: int,
        call: Call,
        inputs: Inputs,
        packed: list[Packed],
        tensors: list[torch.Tensor],
        opening: Opening | None,
    ) -> tuple[CallMessage, list[torch.Tensor]]:
        plan, synchronous = self._run.plan, call.kind in (Kind.SYNCHRONOUS, Kind.AHEAD)
        computes = call.works(rank, plan.segments)
        needed = self._needs[min(rank, plan.segments - 1)]
        target = call.targets[rank] if computes else call.index
        if self._outlook is not None and target != call.index and self._sample in needed:
            tensors = list(tensors)
            tensors[packed[self._sample][1]] = wire.dense_on_cpu(self._outlook.of(target))
        leaves, sent = only(packed, tensors, needed, self._held[rank])
        timestep = self._timestep(call, call.timestep_indices[rank] if computes else call.index, inputs)
        parts = self._parts if call.kind is Kind.SYNCHRONOUS else 1
        is_tensor = isinstance(timestep, torch.Tensor)
        message = CallMessage(
            run=self._run.number,
            stream=self._key,
            index=call.index,
            synchronous=synchronous,
            why=self._why(call),
            computes=computes,
            ahead=call.kind is Kind.AHEAD,
            parts=parts,
            compression="none" if call.kind is Kind.SYNCHRONOUS else self._run.plan.compression,
            timed=parts == 1 and self._timed(call),
            checked=self._run.checked,
            targets=call.targets,
            reads=call.reads[rank] if computes else None,
            leaves=tuple(leaves),
            timestep=("tensor", len(sent)) if is_tensor else ("value", timestep),
            opening=opening,
            result=dict(call.results).get(rank),
        )
        return message, [*sent, wire.copied(timestep)] if is_tensor else sent

    def _timed(self, call: Call) -> bool:
        """The first few calls of either kind, but for the very first one, in which kernels are loaded and caches are cold."""
        if call.kind is Kind.AHEAD or call.index == self._cold:
            return False
        return call.index - self._cold <= TIMED or 0 <= call.index - self._base.warmup <= TIMED * self._base.stride

    def _why(self, call: Call) -> str:
        if call.kind is not Kind.SYNCHRONOUS:
            return ""
        if call.index < self._run.plan.warmup:
            return "warm-up"
        return "move" if call.index < self._base.warmup else "cool-down"

    def _timestep(self, call: Call, index: int, inputs: Inputs) -> Any:
        if index == call.index:
            return inputs.timestep
        if self._timesteps is None:
            return self._last_timestep  # time_shift
        return inputs.timestep_like(self._timesteps[index])


def _find(inputs: Inputs, timesteps: Sequence[float]) -> int | None:
    """Position of the first of ``timesteps`` that is that of these inputs."""
    given, timestep = inputs.timestep_number(), inputs.timestep  # once: it may be on a GPU
    rounded = isinstance(timestep, torch.Tensor) and timestep.is_floating_point()  # as bfloat16, to three digits
    exact = max(1e-3, torch.finfo(timestep.dtype).eps if rounded else 0.0)
    near = (index for index, expected in enumerate(timesteps) if abs(given - expected) <= exact * max(1.0, abs(expected)))
    return next(near, None)
