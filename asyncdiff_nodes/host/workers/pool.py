"""The live worker groups, kept between prompts and reused with no more work than a correct result needs."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context
from torch import nn

from asyncdiff_nodes.engine import AsyncDiffError, IdleWorkers, Placement, Plan, RankOptions, WorkerGroup
from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.devices import on_cluster
from asyncdiff_nodes.engine.planning.plan import PER_RUN
from asyncdiff_nodes.host.page.settings import setting
from asyncdiff_nodes.host.patches.compiled import compile_arguments
from asyncdiff_nodes.host.patches.registry import models_of

from . import limits, links, repeated
from .block_times import Balance
from .found import family_of
from .host_settings import HostSettings
from .limits import Limits
from .memory import RankMemory, kept_from_host
from .quantised import changed_by_patches
from .sent_weights import Sent, Sources
from .skeleton import Recipe, check, description_of, fingerprint_of, outline_of, skeleton_of
from .weights import weights_of

log = logging.getLogger(__name__)

MAX_GROUPS = 2  # a base model and its refiner
# seconds
_START_TIMEOUT = 900.0  # a large checkpoint on a slow disk
_CALL_TIMEOUT = 300.0
_UNLOAD_TIMEOUT = 20.0  # the host waits for the memory


Load = Callable[[list[Any], int], None]
Places = tuple[tuple[int, str], tuple[int, str]]  # position and keyword of latent and timestep


class BusyError(AsyncDiffError, RuntimeError):
    """A sampling inside other samplings needs ranks that these use."""


@dataclass(frozen=True)
class GroupRequest:
    """A sampling's request for a group.

    Attributes:
        patcher: the model that it samples.
        nets: networks of the ControlNets that the group computes too.
        plan, devices: the plan and the devices of its ranks.
        shape: the shape of the latent in each call, [B, C, h, w] or [B, C, F, h, w].
        load: has the host load models (here: the ranks) and make room for them, and for so many bytes beside each.
        poll: see :class:`~asyncdiff_nodes.engine.WorkerGroup`.
        balance: decides where the blocks should be.
        limits: of weights beside these calls.
        entry, places, arguments: of the first call of the network: its method, position and keyword of latent and timestep, and
            all arguments by name.
    """

    patcher: ModelPatcher
    nets: Sequence[nn.Module]
    plan: Plan
    devices: Sequence[str]
    shape: Sequence[int]
    load: Load
    poll: Callable[[], None]
    balance: Balance
    limits: Limits
    entry: str = "forward"
    places: Places | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def expected_bytes(self) -> float:
        """Bytes of the weights that each rank will have at most, if segments are equal."""
        models = (each.model for each in (self.patcher, *models_of(self.patcher).values()))
        return sum(map(comfy.model_management.module_size, (*models, *self.nets))) / self.plan.weight_parts

    def with_fewer_weights(self, rank: int, placement: Placement) -> GroupRequest:
        """The request for other ranks after ``rank`` ran out of memory: fewer weights are on its device, and none for bands.

        Args:
            placement: of the ranks that failed.
        """
        self.limits.lower(self.devices[rank], placement.weight_bytes(self.plan.segment_of_rank(rank)))
        self.balance.room = self.limits.of(self.devices, self.balance.room)
        return replace(self, plan=replace(self.plan, bands=1)) if self.plan.segments > 1 else self


@dataclass(eq=False)
class PooledGroup:
    """A group and its contents.

    Attributes:
        model: the host's model whose weights the ranks have.
        sent: a note of these weights as they were sent.
        description: a description of the model's network when it was compared with the skeleton.
        fingerprint: a fingerprint of the network without its weights.
        skeleton: the ranks' network, on the meta device.
        nets: the networks of the ControlNets whose weights they have.
        memory: one per rank, without ranks on a cluster.
        asked: the plan that it was started with; its own may be without the bands.
        busy: a sampling uses it now; another sampling inside that one can neither have nor end it.
    """

    group: WorkerGroup
    model: weakref.ref
    sent: Sent
    description: tuple[Any, ...]
    fingerprint: str
    skeleton: nn.Module
    nets: list[weakref.ref[nn.Module]]
    memory: list[RankMemory]
    asked: Plan
    busy: bool = False

    def fits(self, request: GroupRequest) -> bool:
        """Whether this group can serve the request once it has the right weights.

        It may have more ControlNets than needed for the model that it was started for, since some workflows sample that twice.
        For another model the cuts would be those of a heavier network.
        """
        own = self.asked
        return (
            replace(own, **{name: getattr(request.plan, name) for name in PER_RUN}) == request.plan
            and self.group.devices == tuple(request.devices)
            and self.fingerprint == fingerprint_of(request.patcher)
            and (len(request.nets) == len(self.nets) or self.model() is request.patcher.model)
            and self.slots(request.nets) is not None
        )

    def slots(self, nets: Sequence[nn.Module]) -> list[int] | None:
        """The place of each of ``nets``, or a free one that suits it; None where there are too few."""
        free = list(range(len(self.nets)))
        chosen: dict[int, int] = {}  # index -> slot
        for suits in (self._has, self._could_have):
            for index, net in enumerate(nets):
                if index not in chosen and (slot := next((slot for slot in free if suits(slot, net)), None)) is not None:
                    chosen[index] = slot
                    free.remove(slot)
        return [chosen[index] for index in range(len(nets))] if len(chosen) == len(nets) else None

    def _has(self, slot: int, net: nn.Module) -> bool:
        return self.nets[slot]() is net

    def _could_have(self, slot: int, net: nn.Module) -> bool:
        """Whether ``net`` differs from the ControlNet in this slot in its weights only."""
        return outline_of(self.skeleton.control_nets[slot]) == outline_of(net)

    def weight_bytes(self) -> int:
        """Bytes of the weights that all ranks hold now."""
        plan, placement = self.group.plan, self.group.placement
        sent = sum(placement.weight_bytes(plan.segment_of_rank(rank)) for rank in range(plan.world_size))
        return sent - sum(self.group.unloaded.values())

    def weights(self, patcher: ModelPatcher, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of the weights in ``names``, as ``patcher`` and the ControlNets have them."""
        return weights_of(patcher, self.skeleton, names, [ref() for ref in self.nets])

    def sources(self, patcher: ModelPatcher) -> Sources:
        """What the weights of ``patcher`` and the ControlNets are made of now."""
        return Sources.of(patcher, [ref() for ref in self.nets])


class Pool:
    """The groups of this process, the most recently used last."""

    def __init__(self) -> None:
        self._held: list[PooledGroup] = []
        # The host reads the entries of ended groups until it is done with its own lists, so they must not vanish before.
        self._retired: list[RankMemory] = []
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let nobody else end a group during a sampling. Afterwards groups are kept for as long as the settings say."""
        with self._lock:
            minutes = setting("KeepMinutes")
            if self._timer is not None:
                self._timer.cancel()
            try:
                yield
            finally:
                if minutes:
                    self._timer = threading.Timer(60 * minutes, self.release_idle)
                    self._timer.daemon = True
                    self._timer.start()

    def prepare(self, request: GroupRequest) -> WorkerGroup | None:
        """Get a group as :meth:`acquire` does, if there is one; else make room for the ranks of one. Raises as that."""
        held, load = self._look(request)
        if held is not None:
            held.busy = True
            return held.group
        skeleton_of(request.patcher, request.nets)  # raises where ranks cannot have this network
        size = int(request.expected_bytes)
        expected = [RankMemory(torch.device(name), size, lambda _: 0) for name in request.devices if not on_cluster(name)]
        load(expected, 0)
        for rank in expected:
            rank.forget()
        self._retired.extend(expected)
        return None

    def acquire(self, request: GroupRequest) -> WorkerGroup:
        """Get a group that computes the diffusion model as ``request`` says; the caller owns it until :meth:`give_back`.

        Raises:
            UnsupportedModelError: the model cannot be split.
            BusyError: other samplings use all groups that there can be.
            AsyncDiffError: see :class:`~asyncdiff_nodes.engine.WorkerGroup`.
        """
        held, load = self._look(request)
        if held is None:
            skeleton = skeleton_of(request.patcher, request.nets)
            with contextlib.closing(self._make_way(request.patcher)) as idle:
                held = self._start(request, skeleton, load, idle)
        held.busy = True
        return held.group

    def _look(self, request: GroupRequest) -> tuple[PooledGroup | None, Load]:
        """Find a group for the request, with the right weights; and how the host loads ranks beside those in use."""
        self._retired.clear()
        self.bury()
        check(request.patcher)
        busy = [held for held in self._held if held.busy]
        if len(busy) >= MAX_GROUPS:
            raise BusyError(f"all {len(busy)} groups of worker processes are in use by the samplings that contain this one")

        def load_beside(ranks: list[Any], kept: int) -> None:
            with kept_from_host([memory for held in busy for memory in held.memory]):
                request.load(ranks, kept)

        if held := self._find(request):
            now = description_of(request.patcher)
            if now != held.description or models_of(request.patcher):  # the description lacks further models
                skeleton_of(request.patcher, request.nets)  # raises where ranks cannot have this network any more
                held.description = now
            load_beside(held.memory, _kept(held.group.placement))
        if held is None or held.group.closed:  # closed: the host needed its memory for what it loaded
            return None, load_beside
        self._held.remove(held)
        self._held.append(held)
        self._update(held, request.patcher, request.nets)
        return held, load_beside

    def give_back(self, group: WorkerGroup) -> None:
        """Give ``group`` back: the sampling that acquired it is over."""
        for held in self._held:
            held.busy = held.busy and held.group is not group

    @contextlib.contextmanager
    def kept(self, group: WorkerGroup) -> Iterator[None]:
        """Let the host take no memory from ``group`` for a while."""
        with kept_from_host(self._holder(group).memory):
            yield

    def discard(self, group: WorkerGroup) -> None:
        """End ``group``, which the caller owns: its blocks are not those that are needed."""
        self._end(self._holder(group))

    def slots(self, group: WorkerGroup, nets: Sequence[nn.Module]) -> list[int]:
        """The places of these ControlNets in ``group``, which was acquired for them."""
        return self._holder(group).slots(nets)

    def move(self, group: WorkerGroup, placement: Placement, patcher: ModelPatcher) -> None:
        """Move the blocks of ``group``, which computes ``patcher``'s diffusion model. Raises as ``WorkerGroup.move``."""
        held = self._holder(group)
        group.move(placement, lambda names: held.weights(patcher, names))
        links.remember(group.refusals)
        comfy.model_management.soft_empty_cache()  # as when they were sent first
        for rank, memory in enumerate(held.memory):
            memory.resize(placement.weight_bytes(placement.plan.segment_of_rank(rank)))

    def bury(self) -> None:
        """Drop the groups that have failed, so that the host knows that their memory is free."""
        for held in [held for held in self._held if held.group.closed]:
            self._end(held)

    def release(self) -> None:
        """End all groups."""
        while self._held:
            self._end(self._held[0])

    def release_idle(self) -> int | None:
        """End all groups, from any thread, and forget failures; returns the number of ranks, or None in a sampling."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            ranks = sum(held.group.plan.world_size for held in self._held if not held.group.closed)
            self.release()
            links.forget()
            limits.forget()
            repeated.forget()
            return ranks
        finally:
            self._lock.release()

    def summary(self) -> list[dict[str, Any]]:
        """Devices and bytes of weights of each live group."""
        alive = [held for held in self._held if not held.group.closed]
        return [{"devices": held.group.devices, "weights": held.weight_bytes()} for held in alive]

    def _holder(self, group: WorkerGroup) -> PooledGroup:
        return next(held for held in self._held if held.group is group)

    def _find(self, request: GroupRequest) -> PooledGroup | None:
        """The group that needs the least work: same model, else its model is gone, else the oldest if there is no room."""
        fitting = [held for held in self._held if not held.busy and held.fits(request)]
        same = [held for held in fitting if held.model() is request.patcher.model]
        gone = [held for held in fitting if held.model() is None]
        oldest = fitting if len(self._held) >= MAX_GROUPS else []
        return next(iter([*same, *gone, *oldest]), None)

    def _make_way(self, patcher: ModelPatcher) -> IdleWorkers:
        """End the groups that a new one for ``patcher`` replaces; returns their processes."""
        idle = IdleWorkers()
        free = [held for held in self._held if not held.busy]
        for held in [held for held in free if held.model() is patcher.model]:
            self._end(held, idle)  # the same weights under another plan
            free.remove(held)
        while len(self._held) >= MAX_GROUPS:
            self._end(free.pop(0), idle)
        return idle

    def _start(self, request: GroupRequest, skeleton: nn.Module, load: Load, idle: IdleWorkers) -> PooledGroup:
        patcher, nets, plan, devices = request.patcher, request.nets, request.plan, request.devices
        inputs: Arguments = (), request.arguments
        family = family_of(skeleton, patcher, fingerprint_of(patcher), request.entry, request.places, inputs)
        memory: list[RankMemory] = []
        started: list[weakref.ref[PooledGroup]] = []  # weak, so that a group that has ended is gone at once

        def free(rank: int, least: int | None) -> int:
            held = started[0]() if started else None
            return 0 if held is None else self._free(held, rank, least)

        def make_room(placement: Placement) -> None:
            request.limits.tried = placement
            for rank, device in enumerate(devices):
                if on_cluster(device):  # the host does not manage its memory
                    continue
                size = placement.weight_bytes(plan.segment_of_rank(rank))
                memory.append(RankMemory(torch.device(device), size, functools.partial(free, rank)))
            self._retired.extend(memory)  # in case the start fails
            load(memory, _kept(placement))
            log.info("AsyncDiff: starting %d ranks on %s", plan.world_size, ", ".join(devices))

        sources = Sources.of(patcher, nets)
        sent = Sent(sources)
        compiled = compile_arguments(patcher)
        try:
            group = WorkerGroup(
                skeleton,
                plan,
                devices,
                family=family,
                example_inputs=inputs,
                weights=sent.noting(weights_of(patcher, skeleton, nets=nets), sources.patches),
                estimate=request.balance.estimate,
                room=request.balance.room,
                on_placed=make_room,
                ranks=RankOptions(
                    prepare=HostSettings.current(),
                    compile=compiled,
                    start_timeout=_START_TIMEOUT,
                    call_timeout=_START_TIMEOUT if compiled else _CALL_TIMEOUT,  # the first calls compile
                    staged=links.staged(devices),
                    idle=idle,
                    poll=request.poll,
                ),
                build=Recipe.of(skeleton, patcher),
            )
        except BaseException:
            for rank in memory:
                rank.forget()
            raise
        comfy.model_management.soft_empty_cache()  # patches were computed on the host's device, which may be a rank's
        links.remember(group.refusals)
        sent.take(sources)
        refs = list(map(weakref.ref, nets))
        model, network = weakref.ref(patcher.model), (description_of(patcher), fingerprint_of(patcher), skeleton)
        held = PooledGroup(group, model, sent, *network, refs, memory, plan)
        started.append(weakref.ref(held))
        self._held.append(held)
        return held

    def _update(self, held: PooledGroup, patcher: ModelPatcher, nets: Sequence[nn.Module]) -> None:
        """Send the weights of model and ControlNets that differ from what the ranks have."""
        for slot, net in zip(held.slots(nets), nets, strict=True):
            held.nets[slot] = weakref.ref(net)
        held.model, sources = weakref.ref(patcher.model), held.sources(patcher)
        changed, patches = held.sent.changed(sources)
        names = changed | changed_by_patches(held.skeleton, patches)

        def weights(names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
            log.info("AsyncDiff: sending %d weights to the running ranks", len(names))
            return held.sent.noting(held.weights(patcher, names), sources.patches)

        if not (names or held.group.unloaded):
            return
        if names:
            held.group.load_weights(weights(names))
            held.sent.take(sources, changed | patches)
        if held.group.unloaded:
            held.group.reload(lambda lacking: weights(lacking - names))
        comfy.model_management.soft_empty_cache()  # patches were computed on the host's device, which may be a rank's

    def _free(self, held: PooledGroup, rank: int, least: int | None) -> int:
        """Free a rank's weights, for the host that needs the memory or wants it back. Raises nothing but an interrupt.

        While a prompt is executed the host needs the memory for something else: the next sampling sends the weights again.
        Otherwise it was told to unload its models, which is to free all that there is on the devices: the group ends.

        Args:
            least: bytes that the host needs; None if it needs all.

        Returns:
            The bytes that were freed.
        """
        if held.group.closed or held not in self._held:
            return 0
        before = held.weight_bytes()
        if get_executing_context() is None:
            self._end(held)
            return before
        try:
            held.group.unload([rank], _UNLOAD_TIMEOUT, least)
            return before - held.weight_bytes()
        except AsyncDiffError as error:
            log.warning("AsyncDiff: a rank could not free its weights; all of them were ended", exc_info=error)
            self._end(held)
            return before
        except BaseException:  # cancelled in between
            self._end(held)
            raise

    def _end(self, held: PooledGroup, idle: IdleWorkers | None = None) -> None:
        """End a group. Its processes end too, unless ``idle`` collects them."""
        try:
            if idle is None:
                held.group.close()
            else:
                idle.absorb(held.group.release())
        finally:
            for rank in held.memory:
                rank.forget()
            self._retired.extend(held.memory)
            if held in self._held:
                self._held.remove(held)


def _kept(placement: Placement) -> int:
    """Bytes that values of other ranks take on a device at most."""
    return max(map(placement.kept_bytes, range(placement.plan.segments)))


POOL = Pool()
