"""What the parent tells the ranks of one stream: one message per rank and computing call, with what changed in its inputs."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from asyncdiff_nodes.engine.bands import Bands
from asyncdiff_nodes.engine.errors import InputChangedError
from asyncdiff_nodes.engine.inputs import Inputs, Packed, SentParameters, difference, only
from asyncdiff_nodes.engine.messages import CallMessage, Opening
from asyncdiff_nodes.engine.planning.graph import BlockGraph
from asyncdiff_nodes.engine.planning.placement import Placement
from asyncdiff_nodes.engine.planning.schedule import Call, Kind
from asyncdiff_nodes.engine.tensors import copied, dense_on_cpu
from asyncdiff_nodes.engine.trees import flatten

from .course import Course
from .run import Run


class Stream:
    """The parent's view of one stream in one run, from its first call on.

    Args:
        key: its name.
        inputs: of the first call.
        sample: position and keyword of the sample in the model's forward.
        graph: traced with these inputs.
        parameters: what each rank of the branch has of earlier runs.
        parts: micro-batches of a synchronous call.
        bands: how its calls are computed in bands, if they are.

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
        parameters: Sequence[SentParameters],
        parts: int = 1,
        bands: Bands | None = None,
    ) -> None:
        self.graph, self.bands = graph, bands
        self._key, self._run, self._parameters, self._parts = key, run, parameters, parts
        self._signature, self._integers = inputs.signature, inputs.integers
        self._samples = inputs.samples(sample)
        self._reads = [inputs.positions(block.reads) for block in graph.blocks]
        self._hidden = inputs.positions(graph.hidden.reads) if graph.hidden else frozenset()
        self._needs = self._needed(placement)
        self._sent: list[Any] | None = None  # the leaves that the ranks have
        self._course = Course(key, run, inputs)

    def next(self, inputs: Inputs) -> Call:
        """Say which call comes now, with these inputs.

        Raises:
            InputChangedError, ScheduleError: see their messages.
        """
        if inputs.signature != self._signature:
            raise InputChangedError(
                f"the inputs of stream {self._key!r} changed within a run ({difference(self._signature, inputs.signature)}): "
                "keep shapes and dtypes, use another stream, or call begin() for a new run"
            )
        if self.bands is not None and inputs.integers != self._integers:
            raise InputChangedError(
                f"integers among the inputs of stream {self._key!r} changed within a run: its bands are those of "
                f"{list(self._integers)}, not of {list(inputs.integers)}. Use another stream, or call begin() for a new run"
            )
        return self._course.next(inputs, [inputs.leaves[position] for position in self._samples])

    def messages(self, call: Call, inputs: Inputs, ranks: int) -> Iterator[tuple[int, CallMessage, list[torch.Tensor]]]:
        """Yield what to send for ``call``, in order: rank of the branch, message, tensors; each rank several times or never."""
        for job in self._course.jobs(call):
            packed, tensors, known = inputs.pack(self._sent, always=(*self._samples, *inputs.echoes))
            opening = self._opening(inputs) if self._sent is None else None
            # whose result is waited for comes first: what the others get ahead with is still to be reckoned
            order = range(ranks) if job.kind is Kind.SYNCHRONOUS else reversed(range(ranks))
            for rank in order:
                yield rank, *self._message(rank, job, inputs, packed, tensors, opening)
            self._sent = known
        self._course.made(call, inputs)

    def move(self, placement: Placement) -> None:
        """Note that blocks are elsewhere from now on: the ranks have neither inputs nor values of this stream any more."""
        self._needs = self._needed(placement)
        self._sent = None
        self._course.move()

    def _needed(self, placement: Placement) -> tuple[frozenset[int], ...]:
        """Find for each segment the positions of the leaves that its ranks read."""
        owned = map(placement.owned, range(self._run.plan.segments))
        hidden = self._hidden if placement.hidden else frozenset()
        return tuple(hidden.union(*(self._reads[i] for i in blocks)) for blocks in owned)

    def _opening(self, inputs: Inputs) -> Opening:
        layouts = tuple((block.outputs, block.structure) for block in self.graph.blocks)
        return Opening(inputs.structure, inputs.positional, layouts, self.bands)

    def _message(
        self,
        rank: int,
        call: Call,
        inputs: Inputs,
        packed: list[Packed],
        tensors: list[torch.Tensor],
        opening: Opening | None,
    ) -> tuple[CallMessage, list[torch.Tensor]]:
        plan, course = self._run.plan, self._course
        banded = self.bands is not None and course.banded(call)
        computes = banded or call.works(rank, plan.segments)
        needed = frozenset().union(*self._needs) if banded else self._needs[min(rank, plan.segments - 1)]
        target = call.targets[rank] if computes else call.index
        expected = course.expected_samples(call, target) if needed.intersection(self._samples) else ()
        if expected:
            tensors = list(tensors)
            for position, sample in zip(self._samples, expected, strict=True):
                tensors[packed[position][1]] = dense_on_cpu(sample)
        timestep = course.timestep(call, call.timestep_indices[rank] if computes else call.index, inputs)
        if inputs.echoes:
            tensors = list(tensors)
            for position in inputs.echoes:
                tensors[packed[position][1]] = timestep
        leaves, sent = only(packed, tensors, needed, self._parameters[rank])
        parts = self._parts if call.kind is Kind.SYNCHRONOUS and not banded else 1
        times, structure = flatten(timestep)
        places = itertools.count(len(sent))
        sent += [copied(leaf) for leaf in times if isinstance(leaf, torch.Tensor)]
        message = CallMessage(
            run=self._run.number,
            stream=self._key,
            index=call.index,
            synchronous=call.kind in (Kind.SYNCHRONOUS, Kind.AHEAD),
            why=course.why(call),
            computes=computes,
            ahead=call.kind is Kind.AHEAD,
            banded=banded,
            parts=parts,
            compression="none" if call.kind is Kind.SYNCHRONOUS else plan.compression,
            timed=parts == 1 and not banded and course.timed(call),
            checked=self._run.checked,
            targets=call.targets,
            reads=call.reads[rank] if computes else None,
            leaves=tuple(leaves),
            timestep=[("tensor", next(places)) if isinstance(leaf, torch.Tensor) else ("value", leaf) for leaf in times],
            timestep_structure=structure,
            opening=opening,
            result=dict(call.results).get(rank),
        )
        return message, sent
