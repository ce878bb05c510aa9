"""AsyncDiff in a single process: the same numbers as a worker group, without processes.

It shares the schedule and the placement with the engine, but none of its machinery: blocks run in place, and stale values
come from dictionaries. Tests use it as their oracle; quality measurements use it where speed does not matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from asyncdiff_nodes.engine.planning.family import Family, find_family
from asyncdiff_nodes.engine.planning.graph import TensorMeta, meta_copy, trace
from asyncdiff_nodes.engine.planning.lookahead import NoiseLevels, Outlook
from asyncdiff_nodes.engine.planning.plan import Placement, Plan, place
from asyncdiff_nodes.engine.planning.schedule import Kind, call_at, calls_ahead
from asyncdiff_nodes.engine.rank.stub import shift, value_for

from .batch import concatenated, sample_of
from .compression import Decoder, Encoder
from .inputs import Inputs, join
from .trees import flatten, unflatten


class Simulator:
    """Called like ``module.forward``; computes what a group of ``plan.world_size`` ranks would return.

    Args:
        module, plan, family, example_inputs: as for :class:`~asyncdiff_nodes.engine.WorkerGroup`. The module's blocks are
            wrapped until :meth:`close`.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        *,
        family: Family | None = None,
        example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> None:
        self._module, self.plan = module, plan
        self.family = family or find_family(module)
        skeleton = meta_copy(module)
        args, kwargs = example_inputs or self.family.example_inputs(skeleton, None, 2)
        args, kwargs = self.family.parts(args, kwargs, plan.branches)[0]
        self.placement: Placement = place(trace(skeleton, self.family, args, kwargs), plan)
        self._run_plan = plan
        self._timesteps: list[float] | None = None
        self._levels: NoiseLevels | None = None
        self._streams: dict[Hashable, dict[str, Any]] = {}
        self._segment: int | None = None  # the one that runs; None runs all
        self._reads: int | None = None  # the call whose values it wants
        # (targets of the ranks, values of their blocks, whether these are changes) of earlier calls, oldest first
        self._stale: list[tuple[tuple[int, ...], dict[str, Any], bool]] = []
        self._fresh: dict[str, Any] = {}
        self._hidden = self.placement.hidden
        self._carriers = self._hidden.carriers if self._hidden else {}
        self._states = torch.empty(0)  # hidden ones, of what is running
        for name in self.placement:
            block = module.get_submodule(name)
            block.forward = self._wrapped(name, block.forward)

    def close(self) -> None:
        """Restore the module."""
        for name in self.placement:
            self._module.get_submodule(name).__dict__.pop("forward", None)

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, timesteps: Sequence[float] | torch.Tensor | None = None, levels: NoiseLevels | None = None) -> None:
        """Start a new run, all of whose streams begin with its first call; see ``WorkerGroup.begin``."""
        self._timesteps = None if timesteps is None else [float(t) for t in timesteps]
        self._run_plan = self.plan.at(levels)
        self._levels = levels or (NoiseLevels.unknown(len(self._timesteps)) if self._timesteps else None)
        self._streams.clear()

    @torch.no_grad()
    def __call__(self, *args: Any, stream: Hashable = None, **kwargs: Any) -> Any:
        """One call; see ``WorkerGroup.__call__``."""
        parts = self.family.parts(args, kwargs, self.plan.branches)
        results = [self._branch((branch, stream), *part) for branch, part in enumerate(parts)]
        leaves, (structure, *_) = zip(*map(flatten, results), strict=True)
        return unflatten(concatenated(leaves), structure)

    def _branch(self, key: tuple[int, Hashable], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan, codecs = self._run_plan, defaultdict(lambda: (Encoder(), Decoder()))
        state = self._streams.setdefault(key, {"k": 0, "history": [], "results": {}, "codecs": codecs})
        inputs = Inputs.take(args, kwargs, self.family.timestep)
        ahead = bool(plan.forecast and self._levels is not None and plan.segments > 1)
        if ahead:
            at = inputs.position(self.family.sample)
            outlook = state.setdefault("outlook", Outlook(self._levels))
            outlook.see(state["k"], inputs.leaves[at])
        now = replace(plan, forecast=0) if ahead and not outlook.steady else plan
        total = None if self._timesteps is None else len(self._timesteps)
        call = call_at(now, state["k"], total)

        def whole() -> tuple[Any, dict[str, Any]]:
            """Of this call, in micro-batches."""
            self._segment, found = None, []
            for args, kwargs in self.family.parts(*inputs.arguments(), plan.microbatches if self.placement.pipelines else 1):
                self._fresh = {}
                found.append((self._module(*args, **kwargs), self._fresh))
            leaves, (structure, *_) = zip(*map(flatten, found), strict=True)
            return unflatten(concatenated(leaves), structure)

        def run(segment: int, target: int, index: int) -> tuple[Any, dict[str, Any]]:
            leaves, t = list(inputs.leaves), inputs.timestep
            if ahead and target != call.index:
                leaves[at] = outlook.of(target)
            if index != call.index:  # unscheduled, this is a time shift
                t = state["last_t"] if self._timesteps is None else inputs.timestep_like(self._timesteps[index])
            self._segment, self._fresh = segment, {}
            args, kwargs = join(leaves, inputs.structure, t, inputs.place, inputs.positional)
            return self._module(*args, **kwargs), self._fresh

        self._stale = state["history"]
        kept: dict[str, Any] = {}
        if call.kind is Kind.SYNCHRONOUS:
            state["results"][call.index], kept = whole()
        elif call.kind is Kind.ASYNCHRONOUS:
            results = dict(call.results)
            for rank, (target, index) in enumerate(zip(call.targets, call.timestep_indices, strict=True)):
                segment, self._reads = plan.segment_of_rank(rank), call.reads[rank]
                output, fresh = run(segment, target, index)
                if rank in results:
                    state["results"][results[rank]] = output
                if rank < plan.segments:
                    kept |= self._crossed(state, self._own(segment, fresh))
        if call.computes:
            state["history"] = self._stale = [*self._stale, (call.targets, kept, call.kind is not Kind.SYNCHRONOUS)]
        for part in calls_ahead(now, call.index, total):
            kept = {}
            self._stale.append((part.targets, kept, True))
            for segment, (target, index) in enumerate(zip(part.targets, part.timestep_indices, strict=True)):
                self._reads = target
                kept |= self._crossed(state, self._own(segment, run(segment, target, index)[1]))
        del state["history"][: -2 * plan.segments]
        source = plan.warmup - 1 if call.kind is Kind.REPEATED else call.index
        state["k"], state["last_t"] = state["k"] + 1, inputs.timestep
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state["results"][source])

    def _own(self, segment: int, values: dict[str, Any]) -> dict[str, Any]:
        """Those that others read of this segment, which just ran; of hidden states that every segment makes, how they changed."""
        own = {name: value for name, value in values.items() if self.placement[name] == segment}
        for name in own.keys() & self._carriers.keys():
            own[name] = _made_of(torch.clone, own[name])  # its output may be read as well
            shift(flatten(own[name])[0][self._carriers[name]], self._states, -1)
        return own

    def _crossed(self, state: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """What others get of these values of an asynchronous call."""

        def decoded(name: str, number: int, leaf: torch.Tensor) -> torch.Tensor:
            encode, decoder = state["codecs"][name, number]
            meta, how = TensorMeta.of(leaf), self._run_plan.compression
            _, decode = decoder.expect(meta, how)
            return decode(encode(leaf, meta, how)[0])

        crossed = {}
        for name, value in values.items():
            leaves, structure = flatten(value)
            crossed[name] = unflatten([decoded(name, number, leaf) for number, leaf in enumerate(leaves)], structure)
        return crossed

    def _wrapped(self, name: str, forward: Any) -> Any:
        index, placement = self.placement.graph.names.index(name), self.placement
        owners, readers = (
            [d for d in range(self.plan.segments) if index in blocks(d)] for blocks in (placement.owned, placement.incoming)
        )

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._hidden and name == self._hidden.block:
                self._states = sample_of(args, kwargs, self._hidden.argument).clone()
            if self._segment is None or self._segment in owners:
                output = forward(*args, **kwargs)
                self._fresh[name] = _made_of(torch.clone, output)
                return output
            sender = self.placement[name]
            carries = name in self._carriers
            sent = [(carries and change, at[sender], values[name]) for at, values, change in self._stale if name in values]
            change, _, latest = sent[-1]
            if self._segment not in readers:  # only its shape matters; no view of a kept value, which glue might change
                return _made_of(torch.empty_like, latest)
            if self._reads is None:
                value = _made_of(torch.clone, latest)
            else:
                known = {at: value for kind, at, value in sent[-max(2, self._segment - sender) :] if kind == change}
                value = _made_of(lambda *leaves: value_for(self._reads, dict(zip(known, leaves, strict=True))), *known.values())
            if change:
                shift(flatten(value)[0][self._carriers[name]], self._states, 1)
            return value

        return run


def _made_of(function: Callable[..., torch.Tensor], *trees: Any) -> Any:
    """A tree like these, of what ``function`` makes of their tensors."""
    leaves, structures = zip(*map(flatten, trees), strict=True)
    return unflatten([function(*each) for each in zip(*leaves, strict=True)], structures[0])
