"""The worker groups that are alive, kept between prompts and reused with as little work as is correct."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from asyncdiff_nodes.engine import AsyncDiffError, IdleWorkers, Placement, Plan, UnsupportedModelError, WorkerGroup
from asyncdiff_nodes.engine.devices import on_cluster
from asyncdiff_nodes.engine.planning.plan import PER_RUN
from asyncdiff_nodes.host.page.settings import setting
from asyncdiff_nodes.host.patches.animatediff.calls import motion_models
from asyncdiff_nodes.host.patches.compiled import compile_arguments

from .block_times import Balance
from .host_settings import HostSettings
from .memory import RankMemory, kept_from_host
from .quantised import changed_by_patches
from .sent_weights import Sent, Sources
from .skeleton import check, description_of, family_of, fingerprint_of, outline_of, skeleton_of
from .weights import weights_of

log = logging.getLogger(__name__)

MAX_GROUPS = 2  # a base model and its refiner
# seconds
_START_TIMEOUT = 900.0  # a large checkpoint on a slow disk
_CALL_TIMEOUT = 300.0


class BusyError(AsyncDiffError, RuntimeError):
    """A sampling within others would need ranks that these use."""


@dataclass(eq=False)
class Held:
    """A group and what is in it.

    Attributes:
        model: the host's model whose weights the ranks have.
        sent: what these weights were.
        description: of the model's network, as it was compared with the skeleton.
        fingerprint: of the network without its weights.
        skeleton: what the ranks have, on the meta device.
        nets: the networks of the ControlNets whose weights they have.
        memory: one per rank, but for those on a cluster.
        busy: a sampling that goes on uses it: another one within that can neither have nor end it.
    """

    group: WorkerGroup
    model: weakref.ref
    sent: Sent
    description: tuple[Any, ...]
    fingerprint: str
    skeleton: nn.Module
    nets: list[weakref.ref[nn.Module]]
    memory: list[RankMemory]
    busy: bool = False

    def fits(self, plan: Plan, devices: Sequence[str], patcher: ModelPatcher, nets: Sequence[nn.Module]) -> bool:
        """Whether ``plan`` can run in this group once it has the right weights.

        For the model that it was started for, it may have more ControlNets than are needed: such a workflow samples it twice. For
        others the cuts would be those of a heavier network.
        """
        own = self.group.plan
        return (
            replace(own, **{name: getattr(plan, name) for name in PER_RUN}) == plan
            and self.group.devices == tuple(devices)
            and self.fingerprint == fingerprint_of(patcher)
            and (len(nets) == len(self.nets) or self.model() is patcher.model)
            and self.slots(nets) is not None
        )

    def slots(self, nets: Sequence[nn.Module]) -> list[int] | None:
        """For each of ``nets`` its place, or one that can be its own; None where there are too few."""
        free = list(range(len(self.nets)))
        found: dict[int, int] = {}  # index -> slot
        for suits in (self._has, self._could_have):
            for index, net in enumerate(nets):
                if index not in found and (slot := next((slot for slot in free if suits(slot, net)), None)) is not None:
                    found[index] = slot
                    free.remove(slot)
        return [found[index] for index in range(len(nets))] if len(found) == len(nets) else None

    def _has(self, slot: int, net: nn.Module) -> bool:
        return self.nets[slot]() is net

    def _could_have(self, slot: int, net: nn.Module) -> bool:
        """Whether ``net`` differs from the ControlNet in this slot in its weights only."""
        return outline_of(self.skeleton.control_nets[slot]) == outline_of(net)

    def weight_bytes(self) -> int:
        """Of all ranks."""
        plan, placement = self.group.plan, self.group.placement
        return sum(placement.weight_bytes(plan.segment_of_rank(rank)) for rank in range(plan.world_size))

    def weights(self, patcher: ModelPatcher, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of those in ``names``, as ``patcher`` and the ControlNets have them."""
        return weights_of(patcher, self.skeleton, names, [ref() for ref in self.nets])

    def sources(self, patcher: ModelPatcher) -> Sources:
        """What the weights of ``patcher`` and the ControlNets are made of now."""
        return Sources.of(patcher, [ref() for ref in self.nets])


class Pool:
    """The groups of this process, the latest used last."""

    def __init__(self) -> None:
        self._held: list[Held] = []
        # The host looks at the entries of ended groups until it is done with its own lists: they must not vanish before.
        self._retired: list[RankMemory] = []
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While a sampling goes on: nobody else ends a group. Afterwards they are kept for as long as the settings say."""
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

    def acquire(
        self,
        patcher: ModelPatcher,
        nets: Sequence[nn.Module],
        plan: Plan,
        devices: Sequence[str],
        shape: Sequence[int],
        load: Callable[[list[Any]], None],
        poll: Callable[[], None],
        balance: Balance,
    ) -> WorkerGroup:
        """A group that computes ``patcher``'s diffusion model as ``plan`` says; it is the caller's until :meth:`give_back`.

        Args:
            nets: networks of the ControlNets that it computes as well.
            shape: [B, C, h, w] of the latent, or [B, C, F, h, w].
            load: has the host load models (here: the ranks) and make room for them.
            poll: see :class:`~asyncdiff_nodes.engine.WorkerGroup`.
            balance: where the blocks should be.

        Raises:
            UnsupportedModelError: the model cannot be split.
            BusyError: others use all groups that there can be.
            AsyncDiffError: see :class:`~asyncdiff_nodes.engine.WorkerGroup`.
        """
        self._retired.clear()
        self.bury()
        check(patcher)
        busy = [held for held in self._held if held.busy]
        if len(busy) >= MAX_GROUPS:
            raise BusyError(f"all {len(busy)} groups of ranks are in use by the samplings that this one is a part of")

        def load_beside(ranks: list[Any]) -> None:
            with kept_from_host([memory for held in busy for memory in held.memory]):
                load(ranks)

        if held := self._find(patcher, nets, plan, devices):
            if (now := description_of(patcher)) != held.description or motion_models(patcher):
                skeleton_of(patcher, nets)  # raises where the ranks' is none of this network any more
                held.description = now
            load_beside(held.memory)
        if held is None or held.group.closed:  # closed: the host needed its memory for what it loaded
            skeleton = skeleton_of(patcher, nets)
            with contextlib.closing(self._make_way(patcher)) as idle:
                held = self._start(patcher, nets, plan, devices, shape, skeleton, load_beside, poll, balance, idle)
        else:
            self._held.remove(held)
            self._held.append(held)
            self._update(held, patcher, nets)
        held.busy = True
        return held.group

    def give_back(self, group: WorkerGroup) -> None:
        """The sampling that acquired ``group`` is over."""
        for held in self._held:
            held.busy = held.busy and held.group is not group

    def slots(self, group: WorkerGroup, nets: Sequence[nn.Module]) -> list[int]:
        """Where ``group``, which was acquired for them, has these ControlNets."""
        return self._holder(group).slots(nets)

    def move(self, group: WorkerGroup, placement: Placement, patcher: ModelPatcher) -> None:
        """Place the blocks of ``group``, which computes ``patcher``'s diffusion model, anew. Raises as ``WorkerGroup.move``."""
        held = self._holder(group)
        group.move(placement, lambda names: held.weights(patcher, names))
        for rank, memory in enumerate(held.memory):
            memory.resize(placement.weight_bytes(placement.plan.segment_of_rank(rank)))

    def bury(self) -> None:
        """Let go of the groups that have failed, so that the host knows that their memory is free."""
        for held in [held for held in self._held if held.group.closed]:
            self._end(held)

    def release(self) -> None:
        """End all groups."""
        while self._held:
            self._end(self._held[0])

    def release_idle(self) -> int | None:
        """End all groups, from any thread; returns the number of ranks, or None while a sampling goes on."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            ranks = sum(held.group.plan.world_size for held in self._held if not held.group.closed)
            self.release()
            return ranks
        finally:
            self._lock.release()

    def summary(self) -> list[dict[str, Any]]:
        """Devices, and bytes of the weights, of each group that is alive."""
        alive = [held for held in self._held if not held.group.closed]
        return [{"devices": held.group.devices, "weights": held.weight_bytes()} for held in alive]

    def _holder(self, group: WorkerGroup) -> Held:
        return next(held for held in self._held if held.group is group)

    def _find(self, patcher: ModelPatcher, nets: Sequence[nn.Module], plan: Plan, devices: Sequence[str]) -> Held | None:
        """The group that needs least work: same model, then one whose model is gone, then the oldest if there is no room."""
        fitting = [held for held in self._held if not held.busy and held.fits(plan, devices, patcher, nets)]
        same = [held for held in fitting if held.model() is patcher.model]
        gone = [held for held in fitting if held.model() is None]
        oldest = fitting if len(self._held) >= MAX_GROUPS else []
        return next(iter([*same, *gone, *oldest]), None)

    def _make_way(self, patcher: ModelPatcher) -> IdleWorkers:
        """End the groups that one for ``patcher`` takes the place of; returns their processes."""
        idle = IdleWorkers()
        free = [held for held in self._held if not held.busy]
        for held in [held for held in free if held.model() is patcher.model]:
            self._end(held, idle)  # the same weights under another plan
            free.remove(held)
        while len(self._held) >= MAX_GROUPS:
            self._end(free.pop(0), idle)
        return idle

    def _start(
        self,
        patcher: ModelPatcher,
        nets: Sequence[nn.Module],
        plan: Plan,
        devices: Sequence[str],
        shape: Sequence[int],
        skeleton: nn.Module,
        load: Callable[[list[Any]], None],
        poll: Callable[[], None],
        balance: Balance,
        idle: IdleWorkers,
    ) -> Held:
        family = family_of(skeleton, patcher)
        memory: list[RankMemory] = []
        started: list[weakref.ref[Held]] = []  # weak, so that what is ended is gone at once

        def release() -> None:
            if started and (held := started[0]()) is not None:
                self._end(held)

        def make_room(placement: Placement) -> None:
            for rank, device in enumerate(devices):
                if on_cluster(device):  # its memory is not the host's to manage
                    continue
                size = placement.weight_bytes(plan.segment_of_rank(rank))
                memory.append(RankMemory(torch.device(device), size, release))
            self._retired.extend(memory)  # in case the start fails
            load(memory)
            log.info("AsyncDiff: starting %d ranks on %s", plan.world_size, ", ".join(devices))

        sources = Sources.of(patcher, nets)
        sent = Sent(sources)
        compiled = compile_arguments(patcher)
        try:
            inputs = family.example_inputs(skeleton, tuple(shape[2:]), 2 * shape[0])
        except (AttributeError, KeyError) as error:
            raise UnsupportedModelError(f"this ComfyUI builds its {family.name} in a way that is not known ({error})") from error
        try:
            group = WorkerGroup(
                skeleton,
                plan,
                devices,
                estimate=balance.estimate,
                room=balance.room,
                family=family,
                example_inputs=inputs,
                weights=sent.noting(weights_of(patcher, skeleton, nets=nets), sources.patches),
                compile=compiled,
                prepare=HostSettings.current(),
                on_placed=make_room,
                start_timeout=_START_TIMEOUT,
                call_timeout=_START_TIMEOUT if compiled else _CALL_TIMEOUT,  # the first calls compile
                idle=idle,
                poll=poll,
            )
        except BaseException:
            for rank in memory:
                rank.forget()
            raise
        sent.take(sources)
        refs = list(map(weakref.ref, nets))
        model, network = weakref.ref(patcher.model), (description_of(patcher), fingerprint_of(patcher), skeleton)
        held = Held(group, model, sent, *network, refs, memory)
        started.append(weakref.ref(held))
        self._held.append(held)
        return held

    def _update(self, held: Held, patcher: ModelPatcher, nets: Sequence[nn.Module]) -> None:
        """Send the weights in which model and ControlNets differ from what the ranks have."""
        for slot, net in zip(held.slots(nets), nets, strict=True):
            held.nets[slot] = weakref.ref(net)
        held.model, sources = weakref.ref(patcher.model), held.sources(patcher)
        changed, patches = held.sent.changed(sources)
        names = changed | changed_by_patches(held.skeleton, patches)
        if names:
            log.info("AsyncDiff: sending %d weights to the running ranks", len(names))
            held.group.load_weights(held.sent.noting(held.weights(patcher, names), sources.patches))
            held.sent.take(sources, changed | patches)

    def _end(self, held: Held, idle: IdleWorkers | None = None) -> None:
        """End a group; its processes only if nobody collects them in ``idle``."""
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


POOL = Pool()
