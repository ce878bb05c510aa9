"""AsyncDiff in a single process: the same numbers as a worker group, without processes.

It shares the schedule and the placement with the engine, but none of its machinery: blocks run in place, and stale values
come from dictionaries. Tests use it as their oracle; quality measurements use it where speed does not matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from asyncdiff_nodes.engine.planning.discovery import discover
from asyncdiff_nodes.engine.planning.family import UNKNOWN, Family, example_of, listed_family
from asyncdiff_nodes.engine.planning.lookahead import NoiseLevels, Outlooks
from asyncdiff_nodes.engine.planning.placement import Placement, place
from asyncdiff_nodes.engine.planning.plan import Plan
from asyncdiff_nodes.engine.planning.schedule import Call, Kind, call_at, calls_ahead
from asyncdiff_nodes.engine.planning.trace import trace

from .batch import concatenated
from .compression import Decoder, Encoder
from .errors import PlanError
from .inputs import Inputs, join
from .simulated_blocks import EarlierCall, SimulatedBlocks
from .tensors import TensorMeta, meta_copy
from .trees import flatten, unflatten


class _Stream:
    """One stream of one branch, in one run.

    Attributes:
        next: index of the call that comes.
        history: earlier calls, oldest first.
        results: call -> the model's output; of calls to come, too, where they were computed together.
        outlook: where its inputs can be foreseen.
        last_timestep: of the call before.
    """

    def __init__(self, outlook: Outlooks | None) -> None:
        self.next = 0
        self.history: list[EarlierCall] = []
        self.results: dict[int, Any] = {}
        self.outlook = outlook
        self.last_timestep: Any = None
        # both ends of what crosses, by block and number of the tensor in its output
        self._codecs: defaultdict[tuple[str, int], tuple[Encoder, Decoder]] = defaultdict(lambda: (Encoder(), Decoder()))

    def crossed(self, values: dict[str, Any], compression: str) -> dict[str, Any]:
        """Return what others get of these values of blocks in an asynchronous call."""
        crossed = {}
        for name, value in values.items():
            leaves, structure = flatten(value)
            received = [self._decoded(name, number, leaf, compression) for number, leaf in enumerate(leaves)]
            crossed[name] = unflatten(received, structure)
        return crossed

    def _decoded(self, name: str, number: int, leaf: torch.Tensor, compression: str) -> torch.Tensor:
        encode, decoder = self._codecs[name, number]
        meta = TensorMeta.of(leaf)
        _, decode = decoder.expect(meta, compression)
        return decode(encode(leaf, meta, compression)[0])


class Simulator:
    """Called like ``module.forward``; computes what a group of ``plan.world_size`` ranks would return.

    Args:
        module, plan, family, example_inputs: as for :class:`~asyncdiff_nodes.engine.WorkerGroup`. The module's blocks are
            wrapped until :meth:`close`.

    Two blocks, ``a`` doubles and ``b`` makes ten times as much. The first call is synchronous; in later ones ``b`` has what ``a``
    made of the input before:

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b = (nn.Linear(1, 1, bias=False) for _ in range(2))
    ...         self.load_state_dict({"a.weight": torch.tensor([[2.0]]), "b.weight": torch.tensor([[10.0]])})
    ...     def forward(self, x, t):
    ...         return self.b(self.a(x))
    >>> family = Family("Net", lambda net: ["a", "b"], timestep=(1, "t"), example_inputs=None, sample=(0, "x"))
    >>> plan = Plan(segments=2, warmup=1, forecast=0, cuts=("a", "b"))
    >>> with Simulator(Net(), plan, family=family, example_inputs=((torch.ones(1, 1), 0), {})) as simulator:
    ...     [simulator(torch.tensor([[x]]), 0).item() for x in (1.0, 2.0, 3.0, 4.0)]
    [20.0, 20.0, 40.0, 60.0]
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        *,
        family: Family | None = None,
        example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> None:
        self.plan = plan
        self._module, self._family = module, family or listed_family(module)
        self._simulated: SimulatedBlocks | None = None
        example_inputs = example_inputs or example_of(self._family, module)
        if example_inputs is not None:
            self.place(*example_inputs)
        self._run_plan = plan
        self._timesteps: list[float] | None = None
        self._levels: NoiseLevels | None = None
        self._streams: dict[tuple[int, Hashable], _Stream] = {}

    def place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Place the blocks as for a call with these arguments; nothing if that is done. See ``WorkerGroup.place``."""
        if self._simulated is not None:
            return
        skeleton = meta_copy(self._module)
        if self._family is None:
            self._family, _ = discover(skeleton, args, kwargs)
        part = self._family.parts(args, kwargs, self.plan.branches)[0]
        self.placement: Placement = place(trace(skeleton, self._family, *part), self.plan)
        self._simulated = SimulatedBlocks(self._module, self.placement, self._family.entry)

    def close(self) -> None:
        """Restore the module."""
        if self._simulated is not None:
            self._simulated.close()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def family(self) -> Family:
        """How the module is split. Raises PlanError before that is found out in its first call."""
        if self._family is None:
            raise PlanError(UNKNOWN)
        return self._family

    @property
    def _blocks(self) -> SimulatedBlocks:
        assert self._simulated is not None, "placed by the first call"
        return self._simulated

    def begin(self, timesteps: Sequence[float] | torch.Tensor | None = None, levels: NoiseLevels | None = None) -> None:
        """Start a new run, all of whose streams begin with its first call; see ``WorkerGroup.begin``."""
        self._timesteps = None if timesteps is None else [float(t) for t in timesteps]
        self._run_plan = self.plan.at(levels)
        self._levels = levels or (NoiseLevels.unknown(len(self._timesteps)) if self._timesteps else None)
        self._streams.clear()

    @torch.no_grad()
    def __call__(self, *args: Any, stream: Hashable = None, **kwargs: Any) -> Any:
        """Compute one call; see ``WorkerGroup.__call__``."""
        self.place(args, kwargs)
        parts = self.family.parts(args, kwargs, self.plan.branches)
        results = [self._call((branch, stream), *part) for branch, part in enumerate(parts)]
        leaves, (structure, *_) = zip(*map(flatten, results), strict=True)
        return unflatten(concatenated(leaves), structure)

    @property
    def _total(self) -> int | None:
        return None if self._timesteps is None else len(self._timesteps)

    def _call(self, key: tuple[int, Hashable], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute one branch's part of a call."""
        if key not in self._streams:
            levels = self._levels if self._run_plan.forecast and self._run_plan.segments > 1 else None
            self._streams[key] = _Stream(None if levels is None else Outlooks(levels))
        stream, inputs = self._streams[key], Inputs.take(args, kwargs, self.family.timestep)
        plan = self._plan_of(stream, inputs)
        call = call_at(plan, stream.next, self._total)
        if call.kind is Kind.SYNCHRONOUS:
            stream.results[call.index], values = self._whole(inputs)
            stream.history.append(EarlierCall(call.targets, values, changes=False))
        elif call.kind is Kind.ASYNCHRONOUS:
            self._asynchronous(stream, call, inputs)
        for job in calls_ahead(plan, call.index, self._total):
            self._ahead(stream, call, job, inputs)
        del stream.history[: -2 * plan.segments]
        source = plan.warmup - 1 if call.kind is Kind.REPEATED else call.index
        stream.next, stream.last_timestep = call.index + 1, inputs.timestep
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, stream.results[source])

    def _plan_of(self, stream: _Stream, inputs: Inputs) -> Plan:
        """Return the run's plan, as far as the stream's inputs can be foreseen: nobody works ahead on others."""
        if stream.outlook is None:
            return self._run_plan
        stream.outlook.see(stream.next, [inputs.leaves[position] for position in inputs.samples(self.family.sample)])
        return self._run_plan if stream.outlook.steady else replace(self._run_plan, forecast=0)

    def _whole(self, inputs: Inputs) -> tuple[Any, dict[str, Any]]:
        """Compute the whole model, in micro-batches; returns its output, and that of each block."""
        parts = self.family.parts(*inputs.arguments(), self._run_plan.microbatches if self.placement.pipelines else 1)
        leaves, (structure, *_) = zip(*(flatten(self._blocks.run(*part)) for part in parts), strict=True)
        whole: tuple[Any, dict[str, Any]] = unflatten(concatenated(leaves), structure)
        return whole

    def _asynchronous(self, stream: _Stream, call: Call, inputs: Inputs) -> None:
        """Compute each rank's part; all of them read earlier calls only."""
        results = dict(call.results)
        crossed: dict[str, Any] = {}
        for rank in range(len(call.targets)):
            if rank >= self._run_plan.segments and rank not in results:
                continue  # it has a part of what the first rank is taken to compute as a whole
            output, own = self._segment(stream, call, call, rank, call.reads[rank], inputs)
            if rank in results:
                stream.results[results[rank]] = output
            if rank < self._run_plan.segments:  # replicas of the last segment keep nothing
                crossed |= stream.crossed(own, self._run_plan.compression)
        stream.history.append(EarlierCall(call.targets, crossed, changes=True))

    def _ahead(self, stream: _Stream, call: Call, job: Call, inputs: Inputs) -> None:
        """Compute what the first segments work ahead in a call, one after the other: each reads what those before it made."""
        crossed: dict[str, Any] = {}
        stream.history.append(EarlierCall(job.targets, crossed, changes=True))
        for rank, target in enumerate(job.targets):
            _, own = self._segment(stream, call, job, rank, target, inputs)
            crossed |= stream.crossed(own, self._run_plan.compression)

    def _segment(
        self, stream: _Stream, call: Call, job: Call, rank: int, reads: int | None, inputs: Inputs
    ) -> tuple[Any, dict[str, Any]]:
        """Compute one rank's part of a job, which is ``call`` itself, or ahead of it.

        Returns:
            The model's output, and the values of this rank's blocks.
        """
        leaves, timestep = list(inputs.leaves), inputs.timestep
        target, index = job.targets[rank], job.timestep_indices[rank]
        if stream.outlook is not None and target != call.index:
            samples = stream.outlook.expected(target)
            for position, sample in zip(inputs.samples(self.family.sample), samples, strict=True):
                leaves[position] = sample
        if index != call.index:  # unscheduled, this is a time shift
            timestep = stream.last_timestep if self._timesteps is None else inputs.timestep_like(self._timesteps[index])
        for position in inputs.echoes:
            leaves[position] = timestep
        args, kwargs = join(leaves, inputs.structure, timestep, inputs.place, inputs.positional)
        return self._blocks.run_segment(self._run_plan.segment_of_rank(rank), reads, stream.history, args, kwargs)
