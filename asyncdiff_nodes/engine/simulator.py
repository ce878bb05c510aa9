"""AsyncDiff in a single process: the same numbers as a worker group, without processes.

It shares the schedule and the placement with the engine, but none of its machinery: blocks run in place, and stale values
come from dictionaries. Tests use it as their oracle; quality measurements use it where speed does not matter.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .family import Family, find_family
from .graph import meta_copy, trace
from .plan import Placement, Plan, place
from .schedule import Kind, call_at


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
        self._family = family or find_family(module)
        skeleton = meta_copy(module)
        args, kwargs = example_inputs or self._family.example_inputs(skeleton, None, 2)
        self.placement: Placement = place(trace(skeleton, self._family, args, kwargs), plan)
        self._timesteps: list[float] | None = None
        self._streams: dict[Hashable, dict[str, Any]] = {}
        self._segment: int | None = None  # the one that runs; None runs all
        self._target = 0  # the call that it computes for
        self._stale: list[tuple[int, dict[str, Any]]] = []  # values, and the call that they were computed for
        self._fresh: dict[str, Any] = {}
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

    def begin(self, timesteps: Sequence[float] | torch.Tensor | None = None) -> None:
        """Start a new run; see ``WorkerGroup.begin``."""
        self._timesteps = None if timesteps is None else [float(t) for t in timesteps]
        self._streams.clear()

    @torch.no_grad()
    def __call__(self, *args: Any, stream: Hashable = None, **kwargs: Any) -> Any:
        """One call; see ``WorkerGroup.__call__``."""
        plan, state = self.plan, self._streams.setdefault(stream, {"k": 0, "history": [], "results": {}})
        position, keyword = self._family.timestep
        timestep = args[position] if len(args) > position else kwargs[keyword]

        def run(segment: int | None, index: int) -> tuple[Any, dict[str, Any]]:
            t = timestep
            if index != call.index and plan.stride == 1:
                t = state["last_t"]  # time_shift
            elif index != call.index:
                value = self._timesteps[index]
                t = torch.full_like(timestep, value) if isinstance(timestep, torch.Tensor) else type(timestep)(value)
            changed, extra = (args, {**kwargs, keyword: t}) if len(args) <= position else (list(args), kwargs)
            if len(args) > position:
                changed[position] = t
            self._segment, self._fresh = segment, {}
            output = self._module(*changed, **extra)
            return output, self._fresh

        call = call_at(plan, state["k"], None if self._timesteps is None else len(self._timesteps))
        self._stale = state["history"]
        kept: dict[str, Any] = {}
        if call.kind is Kind.SYNCHRONOUS:
            state["results"][call.index], kept = run(None, call.index)
        elif call.kind is Kind.ASYNCHRONOUS:
            results = dict(call.results)
            for rank, (index, self._target) in enumerate(zip(call.timestep_indices, call.targets, strict=True)):
                output, fresh = run(plan.segment_of_rank(rank), index)
                if rank in results:
                    state["results"][results[rank]] = output
                if rank < plan.segments:
                    kept.update(fresh)
        if call.computes:
            state["history"] = [*self._stale[-1:], (call.targets[0], kept)]
        source = plan.warmup - 1 if call.kind is Kind.REPEATED else call.index
        state["k"], state["last_t"] = state["k"] + 1, timestep
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state["results"][source])

    def _wrapped(self, name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._segment is None or self.placement[name] == self._segment:
                output = forward(*args, **kwargs)
                self._fresh[name] = tree_map(lambda leaf: leaf.clone(), output)
                return output
            at, last = self._stale[-1]
            if self.plan.forecast == 0 or len(self._stale) < 2:
                return tree_map(lambda leaf: leaf.clone(), last[name])
            before, older = self._stale[-2]
            ahead = (self._target - at) / (at - before)  # in units of what lies between the two
            return tree_map(lambda a, b: a + (a - b) * ahead, last[name], older[name])

        return run
