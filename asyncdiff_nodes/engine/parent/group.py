"""The worker group: a model split over processes, called like the model itself."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine.batch import concatenated
from asyncdiff_nodes.engine.devices import resolve_devices
from asyncdiff_nodes.engine.errors import DeviceError, PlanError, UnsupportedModelError
from asyncdiff_nodes.engine.inputs import Inputs, SentParameters, on_cpu
from asyncdiff_nodes.engine.planning.family import Family
from asyncdiff_nodes.engine.planning.graph import BlockGraph
from asyncdiff_nodes.engine.planning.lookahead import NoiseLevels
from asyncdiff_nodes.engine.planning.placement import Placement, place
from asyncdiff_nodes.engine.planning.plan import Plan
from asyncdiff_nodes.engine.planning.schedule import Kind
from asyncdiff_nodes.engine.rank import numerics
from asyncdiff_nodes.engine.rank.boot import Boot
from asyncdiff_nodes.engine.telemetry import CallRecord, RunStats
from asyncdiff_nodes.engine.tensors import tensors_of
from asyncdiff_nodes.engine.trees import unflatten
from asyncdiff_nodes.extensions import cluster_of

from .local_ranks import LocalRanks
from .pickled import pickled
from .placed_model import PlacedModel, Weights
from .rank_options import RankOptions
from .rank_set import Message, RankSet
from .rank_shares import shares_of
from .run import Run
from .stream import Stream
from .traced_model import TracedModel
from .worker_processes import IdleWorkers


@dataclass(frozen=True)
class _ToPlace:
    """What is kept until the blocks are placed; see :class:`WorkerGroup`."""

    weights: Weights
    estimate: Callable[[BlockGraph], tuple[Sequence[float], Sequence[float], float] | None] | None
    room: Sequence[float] | None
    on_placed: Callable[[Placement], None] | None
    options: RankOptions


class WorkerGroup:
    """``module`` split over worker processes as ``plan`` says; call it with the arguments of ``module.forward``.

    Args:
        module: the model, in evaluation mode, on any device. It is not changed, and its weights may be freed once blocks are
            placed. If ``weights`` are given, only its structure counts, and it may be on the meta device.
        plan: how to split; ``Plan()`` is two segments at automatic cuts.
        devices: one device string per rank, ``plan.world_size`` of them, one branch after the other; a device may be named
            repeatedly. Those of a Ray cluster are named as in :mod:`asyncdiff_nodes.cluster`.
        family: how to split this kind of model; if ``None``, that of its class, or what is found out by :func:`.discover`.
        example_inputs: ``(args, kwargs)`` of a typical call, for automatic cuts; the family's own if ``None``. Where there are
            none, blocks are placed at the first call, as is best for that.
        weights: name and value of every parameter and buffer, in place of the module's own; each is read once, when it is sent.
        estimate: called with the block graph; returns what is known for automatic cuts: ``costs`` of blocks, ``speeds`` of
            devices and the caller's ``pause``, as for :func:`~.placement.place`; or None.
        room: bytes of weights that each device can hold; see :func:`~.placement.place`.
        on_placed: called with the placement before anything is on the devices, for example to make room there.
        ranks: how the ranks are started, and waited for.
        build: makes the module on the meta device in a rank, if the module itself cannot be sent there.

    Attributes:
        plan: as given, but without bands where the model's first call cannot be computed so.
        finite: whether all results of this run so far were without NaN and infinity.

    Raises:
        PlanError, DeviceError, UnsupportedModelError: see their messages.
        WorkerError, DeadlineError: the group did not start.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan | None = None,
        devices: Sequence[str | torch.device] = ("cpu", "cpu"),
        *,
        family: Family | None = None,
        example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
        weights: Weights | None = None,
        estimate: Callable[[BlockGraph], tuple[Sequence[float], Sequence[float], float] | None] | None = None,
        room: Sequence[float] | None = None,
        on_placed: Callable[[Placement], None] | None = None,
        ranks: RankOptions | None = None,
        build: Callable[[], nn.Module] | None = None,
    ) -> None:
        plan, options = plan or Plan(), ranks or RankOptions()
        self.devices = resolve_devices(devices)
        if len(self.devices) != plan.world_size:
            raise DeviceError(
                f"{len(self.devices)} devices for segments={plan.segments}, stride={plan.stride}, branches={plan.branches}"
                + (
                    f", bands={plan.bands}: name branches * bands"
                    if plan.bands > 1
                    else ": name branches * (segments + stride - 1)"
                )
                + f" = {plan.world_size} devices"
            )
        if weights is None:
            weights = tensors_of(module)
            if empty := next((name for name, tensor in tensors_of(module) if tensor.is_meta), None):
                raise UnsupportedModelError(f"weight {empty} is on the meta device: load the model before splitting it")
        self.plan = plan
        self._traced = TracedModel(module, family)
        self._pickled = pickled(self._traced.skeleton, build)
        self._run = Run(0, plan)
        self._parameters = [SentParameters() for _ in range(plan.world_size)]
        # all by branch and stream
        self._streams: dict[tuple[int, Hashable], Stream] = {}
        self._last: dict[tuple[int, Hashable], Any] = {}  # the last result
        self._results: dict[tuple[int, Hashable, int], tuple[list[torch.Tensor], Any, bool]] = {}
        self.finite = True
        self._records: deque[CallRecord] = deque(maxlen=20_000)
        self._on_record: Callable[[CallRecord], None] | None = None
        self._call_timeout = options.call_timeout
        self._model: PlacedModel | None = None

        self._ranks = _start(self.devices, options)  # they import for seconds, during what follows
        self._finalizer = weakref.finalize(self, self._ranks.close)
        self._to_place: _ToPlace | None = _ToPlace(weights, estimate, room, on_placed, options)
        example_inputs = example_inputs or self._traced.example()
        if example_inputs is not None:
            self.place(*example_inputs)

    # -- use ---------------------------------------------------------------------------------------------------------

    def begin(
        self,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        plan: Plan | None = None,
        on_record: Callable[[CallRecord], None] | None = None,
        levels: NoiseLevels | None = None,
    ) -> None:
        """Start a new denoising run: every stream starts over with its warm-up.

        Args:
            timesteps: [T], the timestep of every call of a stream, in order. Needed for stride > 1, and to work ahead
                (``forecast=1``): a call that does not follow it is then refused. A stream may begin at any of them.
            plan: the plan of this run, if not the group's. Warm-up, cool-down, time shift and micro-batches may differ, and the
                stride may be smaller (the ranks that it does not need then only listen), and so may the forecast; synchronous
                calls of segments may do without bands. Blocks stay where they are.
            on_record: called with each rank's record of each call of this run, in the thread of the caller, while it waits.
            levels: noise of every call, by which expected inputs are exacter than by the number of the call.

        Raises:
            PlanError: the plan needs other ranks than the group has.
            ScheduleError: no timesteps, or levels of another number of calls.
        """
        self._run = Run.begun(self._run.number + 1, self.plan, plan or self.plan, timesteps, levels)
        self._on_record = on_record
        self._start_run()

    def place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Place the blocks as for a call with these arguments, and start the ranks; nothing if that is done.

        Raises:
            PlanError, UnsupportedModelError: see their messages.
            WorkerError, DeadlineError: the group did not start.
        """
        if self._to_place is None:
            return
        how, self._to_place = self._to_place, None
        try:
            graph, self.plan = self._traced.first(args, kwargs, self.plan)
            costs, speeds, pause = (how.estimate and how.estimate(graph)) or (None, None, 0.0)
            placement = place(graph, self.plan, speeds, costs, pause, how.room)
            if how.on_placed is not None:
                how.on_placed(placement)
            names = [name for name, _ in tensors_of(self._traced.skeleton)]
            self._model = PlacedModel(self._ranks, placement, names, self._accept)
            deadline = time.monotonic() + how.options.start_timeout
            self._model.boot(self._boots(how.options, deadline), how.weights, self._greeting(), deadline)
        except BaseException:
            self._ranks.close(grace=0)  # ranks that are still importing would not hear a polite word
            raise

    @property
    def family(self) -> Family:
        """How the model is split. Raises PlanError before that is found out, at the first call or by :meth:`place`."""
        return self._traced.family

    @property
    def bandless(self) -> str:
        """Why calls are not computed in bands, though the plan said so; empty where they are."""
        return self._traced.bandless

    @property
    def _placed(self) -> PlacedModel:
        """The model in the ranks. Raises PlanError before it is placed."""
        if self._model is None:
            raise PlanError("blocks are placed at the first call, or by place(): this group has had neither")
        return self._model

    def _start_run(self) -> None:
        self._streams.clear()
        for parameters in self._parameters:
            parameters.reset()
        self._last.clear()
        self._results.clear()
        self._records.clear()
        self.finite = True
        if self._model is not None:
            self._model.send_all(self._greeting(), self._deadline())

    def _greeting(self) -> tuple[Any, ...]:
        """Say what a rank is told when a run begins."""
        return "reset", self._run.number, numerics.snapshot()

    def _deadline(self) -> float:
        """Say until when what is asked for now must be answered, on the monotonic clock."""
        return time.monotonic() + self._call_timeout

    def __call__(self, *args: Any, stream: Hashable = None, **kwargs: Any) -> Any:
        """Compute one call of the model, routed.

        Args:
            stream: which conditioning batch this is; each stream has its own caches and call count. Everything else is passed
                to ``module.forward``; parameters among that are taken to be constant, so that each is sent once to the ranks that
                look at it. With several branches the batch is divided among them; what cannot be divided is the
                first one's.

        Returns:
            What the model's forward returns, tensors on the device of the first tensor argument.

        Raises:
            ScheduleError, InputChangedError, WorkerError, DeadlineError: see their messages.
            GroupClosedError, WeightsUnloadedError: the group cannot be used, or not before :meth:`reload`.
            UnsupportedModelError: within ``torch.autocast``, or a forward that cannot be traced with these arguments.
        """
        self.place(args, kwargs)
        self._placed.check_loaded()
        parts = [Inputs.take(*part, self.family.timestep) for part in self.family.parts(args, kwargs, self.plan.branches)]
        device = parts[0].device
        if torch.is_autocast_enabled(device.type):
            raise UnsupportedModelError("torch.autocast does not reach the ranks: convert the model to another dtype instead")
        parts = on_cpu(parts)
        streams = [self._stream(branch, stream, inputs) for branch, inputs in enumerate(parts)]
        calls = [state.next(inputs) for state, inputs in zip(streams, parts, strict=True)]
        deadline = self._deadline()
        for branch, (state, call, inputs) in enumerate(zip(streams, calls, parts, strict=True)):
            first = branch * self.plan.branch_size
            messages = state.messages(call, inputs, self.plan.branch_size)
            self._placed.send(((first + rank, ("call", message), tensors) for rank, message, tensors in messages), deadline)
        for branch, call in enumerate(calls):
            if call.kind is not Kind.REPEATED:
                self._last[branch, stream] = self._result((branch, stream, call.index), deadline)
        results = [self._last[branch, stream] for branch in range(len(parts))]
        self.finite = self.finite and all(finite for _, _, finite in results)
        again = self._run.plan.stride > 1  # it may be, and a caller may change it in place
        leaves = [leaf.to(device, copy=again) for leaf in concatenated([leaves for leaves, _, _ in results])]
        return unflatten(leaves, results[0][1])

    def tidy(self) -> None:
        """End the run: the ranks keep nothing of it, and give back what memory of their devices they do not need.

        What is called before the next :meth:`begin` starts over with a warm-up.
        """
        self._streams.clear()
        self._last.clear()
        self._results.clear()
        self._placed.send_all(("tidy",), self._deadline())

    def forget(self, stream: Hashable) -> None:
        """Free what is kept of a stream that will not be called again in this run."""
        for branch in range(self.plan.branches):
            self._streams.pop((branch, stream), None)
            self._last.pop((branch, stream), None)
        self._results = {key: result for key, result in self._results.items() if key[1] != stream}
        self._placed.send_all(("forget", stream), self._deadline())

    def origin_of_nan(self, *args: Any, **kwargs: Any) -> str | None:
        """Find the first block that makes NaN or infinity of finite input, where this call is synchronous; None if none does.

        It is a run of its own: :meth:`begin` starts the next.
        """
        self._run = Run(self._run.number + 1, replace(self.plan, warmup=1, stride=1, forecast=0, cooldown=0), checked=True)
        self._on_record = None  # of no interest to whoever follows the run
        self._start_run()
        self(*args, **kwargs)
        origins = {name for rank in self.stats().ranks for record in rank.records for name in record.not_finite}
        return next((name for name in self.placement.graph.names if name in origins), None)

    def load_weights(self, weights: Weights) -> None:
        """Replace weights in the ranks; later calls use the new ones. If this fails half-way, the group is closed.

        Args:
            weights: names and values; each is read once, when it is sent.
        """
        self._placed.update(weights, self._deadline())

    def unload(self, ranks: Collection[int], timeout: float, least: int | None = None) -> None:
        """Have some ranks free their weights. The run is over, and :meth:`reload` must come before the next call.

        Everything else stays as it is: processes, links, and the weights of the other ranks. If this fails, the group is closed.

        Args:
            timeout: seconds that the ranks have for it.
            least: bytes, of which each frees no more than it must to reach them; all that it has if None.

        Raises:
            WorkerError, DeadlineError, GroupClosedError: as for a call.
        """
        self.tidy()  # all ranks: what is on its way to the others is received
        self._placed.unload(ranks, least, time.monotonic() + timeout)

    def reload(self, weights: Callable[[frozenset[str]], Weights]) -> None:
        """Send the ranks the weights that they were told to unload. If this fails half-way, the group is closed.

        Args:
            weights: called with the names of those weights; yields their names and values.
        """
        self._placed.reload(weights, self._deadline())

    def move(self, placement: Placement, weights: Callable[[frozenset[str]], Weights]) -> None:
        """Place the blocks anew in the running ranks, between runs or in mid-run. If this fails half-way, the group is closed.

        The next call of each stream is synchronous, with stride > 1 up to the end of its batch: caches start over.

        Args:
            placement: for this group's plan; see :func:`~.balance.better`.
            weights: called with the names of those that a rank lacks from now on; yields their names and values.

        Raises:
            PlanError: the placement is one of another model or plan.
        """
        self._placed.move(placement, weights, self._deadline())
        self._results.clear()
        for stream in self._streams.values():
            stream.move(placement)

    def stats(self, timeout: float | None = None) -> RunStats:
        """Ask all ranks for the telemetry of the last run, once they are done with it.

        Args:
            timeout: seconds; by default those of a call.

        Raises:
            WorkerError, DeadlineError: as for a call.
        """
        deadline = time.monotonic() + (self._call_timeout if timeout is None else timeout)
        token = object.__hash__(object())
        for rank in range(self.plan.world_size):
            self._ranks.send(rank, ("report", token), deadline=deadline)
        reports: dict[int, Any] = {}
        while len(reports) < self.plan.world_size:
            message = self._ranks.next_message(deadline, "the telemetry of the ranks")
            rank, header, _ = message
            if header[0] == "report":
                if header[1] == token:
                    reports[rank] = header[2]
            else:
                self._accept(message)
        # of the branches that the first stream was divided among
        first = next((stream for _, stream in self._streams), None)
        states = [state for (_, stream), state in self._streams.items() if stream == first]
        graphs = [state.graph for state in states] or [self.placement.graph]
        plan = replace(self.plan, compression=self._run.plan.compression)
        planned = sum(Placement(graph, plan, self.placement.starts).bytes_per_call for graph in graphs)
        bands = sum(state.bands.bytes_per_call for state in states if state.bands is not None)
        return RunStats(planned, bands, tuple(reports[rank].having(self._records) for rank in sorted(reports)))

    def close(self) -> None:
        """End all ranks. Safe to call again."""
        self._finalizer()

    def release(self) -> IdleWorkers:
        """Close the group, but let its ranks' processes live on without the model, for groups to come: these start sooner."""
        return self._ranks.release()

    @property
    def placement(self) -> Placement:
        """Where the blocks are."""
        return self._placed.placement

    @property
    def unloaded(self) -> dict[int, int]:
        """Bytes of the weights that ranks were told to free, and lack now, by rank."""
        return {rank: sum(names.values()) for rank, names in self._placed.unloaded.items()}

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the slowest link between two machines, for :func:`~.balance.better`; infinite on one machine."""
        return self._placed.bandwidth

    @property
    def refusals(self) -> dict[frozenset[str], str]:
        """Why devices exchange values through the host's memory that could have done so directly, by the names of the two.

        They were tried when the group started or moved. Those of ``RankOptions.staged`` were not.
        """
        return {frozenset((self.devices[a], self.devices[b])): why for (a, b), why in self._placed.refusals.items()}

    @property
    def closed(self) -> bool:
        """Whether the group was closed or has failed."""
        return self._ranks.closed

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return self._ranks.pids

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- start -------------------------------------------------------------------------------------------------------

    def _boots(self, options: RankOptions, deadline: float) -> Iterator[Boot]:
        """Yield what each rank begins with."""
        locations, rendezvous = self._ranks.meet(deadline)
        threads = options.threads_per_rank or max(1, torch.get_num_threads() // self.plan.world_size)
        for share in shares_of(self.placement):
            yield Boot(
                share=share,
                locations=locations,
                rendezvous=rendezvous,
                skeleton=self._pickled,
                compile=options.compile,
                prepare=options.prepare,
                threads=threads,
                timestep=self.family.timestep,
                sample=self.family.sample,
                entry=self.family.entry,
                divide=self.family.divide,
                banded=self.family.banded,
                timeout=self._call_timeout,
                staged=options.staged,
                replicated_bytes=self.placement.graph.glue_bytes,
            )

    # -- one call ----------------------------------------------------------------------------------------------------

    def _stream(self, branch: int, key: Hashable, inputs: Inputs) -> Stream:
        """Return this run's stream of this name; a new one if it was not called before."""
        if (branch, key) not in self._streams:
            graph = self._traced.graph(inputs, self.placement.graph)
            bands = self._traced.bands(inputs, self.plan)
            parts = self._run.plan.microbatches if self.placement.pipelines else 1
            parts = self._traced.microbatches(inputs, graph, parts)
            first = branch * self.plan.branch_size
            sent = self._parameters[first : first + self.plan.branch_size]
            self._streams[branch, key] = Stream(
                key, self._run, inputs, self.family.sample, graph, self.placement, sent, parts, bands
            )
        return self._streams[branch, key]

    def _result(self, key: tuple[int, Hashable, int], deadline: float) -> tuple[list[torch.Tensor], Any, bool]:
        while key not in self._results:
            self._accept(self._ranks.next_message(deadline, f"the result of call {key[2] + 1}"))
        return self._results.pop(key)

    def _accept(self, message: Message) -> None:
        """Keep a result or a record of this run; what an interrupted run left behind is dropped."""
        rank, (verb, *rest), tensors = message
        if verb == "result" and rest[0] == self._run.number:
            _, stream, index, structure, finite = rest
            branch = rank // self.plan.branch_size
            if (branch, stream) in self._streams:  # not forgotten
                self._results[branch, stream, index] = tensors, structure, finite
        elif verb == "record" and rest[0] == self._run.number:
            self._records.append(rest[1])
            if self._on_record is not None:
                self._on_record(rest[1])


def _start(devices: Sequence[str], options: RankOptions) -> RankSet:
    """Start one rank for each of ``devices``."""
    cluster = cluster_of(devices[0])
    return LocalRanks(devices, options.poll, options.idle) if cluster is None else cluster.start(devices, options.poll)
