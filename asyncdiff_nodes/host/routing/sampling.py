"""One run of the host's sampler on a worker group, from the first call to whatever ends it."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import torch
from comfy.model_patcher import ModelPatcher

from asyncdiff_nodes.engine import (
    AsyncDiffError,
    CallRecord,
    DeadlineError,
    GroupClosedError,
    NoiseLevels,
    Plan,
    PlanError,
    ScheduleError,
    UnsupportedModelError,
    WorkerError,
    WorkerGroup,
)
from asyncdiff_nodes.host.controlnet.calls import ControlNets, complete, take, without_ranks
from asyncdiff_nodes.host.page.progress import Progress
from asyncdiff_nodes.host.page.report import RunRecord, publish
from asyncdiff_nodes.host.page.settings import setting
from asyncdiff_nodes.host.patches.animatediff.calls import NOT_PLAIN, Motion
from asyncdiff_nodes.host.patches.compiled import without_compiled_network
from asyncdiff_nodes.host.patches.foreign_code import Watched
from asyncdiff_nodes.host.patches.obstacles import call_obstacle, identity, obstacle, shippable, surroundings
from asyncdiff_nodes.host.patches.sag import give_back
from asyncdiff_nodes.host.patches.tome import NUMBERS, random_numbers
from asyncdiff_nodes.host.workers.block_times import Balance
from asyncdiff_nodes.host.workers.memory import room_for_weights
from asyncdiff_nodes.host.workers.pool import POOL, BusyError

from .cfg_branches import affordable, items_per_call
from .frame_windows import Windows
from .options import ALWAYS, OneDeviceError, Options
from .own_network import OwnNetwork
from .rehearsal import rehearse
from .streams import Streams, outline_of, rest_of
from .verify import Audit, distrusted, strangers

log = logging.getLogger(__name__)

_FAILURES = (WorkerError, DeadlineError)  # of the ranks
_NO_ROOM = "verify: there is no room for ComfyUI's own network beside the ranks, so nothing was compared"
_REPORT_GRACE = 5.0  # seconds


class Sampling:
    """One run of the host's sampler on a worker group.

    Args:
        guider: the host's GUIDER.
        sampler: the host's SAMPLER.
        sigmas: its schedule, [steps + 1].

    Attributes:
        group: None while, and wherever, the host computes the network itself.
    """

    def __init__(self, options: Options, guider: Any, sampler: Any, sigmas: torch.Tensor) -> None:
        self.group: WorkerGroup | None = None
        self._options = options
        self._guider, self._patcher = guider, guider.model_patcher
        self._sampler, self._sigmas = sampler, sigmas
        self._plan: Plan | None = None
        self._balance: Balance | None = None
        self._calls = 0  # of each stream, as far as is known
        self._nets: ControlNets | None = None  # that the ranks compute
        self._motion: Motion
        self._windows = Windows()
        self._streams: Streams
        self._streams_seen: set[Any] = set()
        self._watched: list[Watched]  # the network, and those of ControlNets
        self._audit: Audit
        self._slots: list[int] = []  # where they have them
        self._acquire: Callable[[], WorkerGroup]
        self._begin: Callable[[WorkerGroup], None] | None = None  # None before the run has begun
        self._restarted = False
        self._finite = True  # as far as is known
        self._left = ""  # why the host goes on without the ranks
        self._patches: dict[str, int] = {}  # those of its calls -> a number for each
        self._own: OwnNetwork
        self._sampled = False  # there was a call by ranks
        self._started = time.monotonic()
        self._changes = contextlib.ExitStack()  # of the host's objects, for this sampling
        self._progress = Progress(steps=len(sigmas) - 1)
        self._notes = self._progress.notes

    def prepare(
        self,
        patcher: ModelPatcher,
        noise_shape: Sequence[int],
        conds: dict[str, Any],
        model_options: dict[str, Any] | None = None,
        **_: Any,
    ) -> tuple[Any, Any, list[Any]] | None:
        """Get a group ready, and the host's other models. None: the host's own path, for the reason that was noted."""
        if reason := distrusted(patcher) or obstacle(patcher, model_options or {}) or without_ranks(conds):
            return self._note(reason)
        self._motion = Motion(patcher)
        steps = len(self._sigmas) - 1
        if not steps:
            return self._note("there is no step to sample")
        try:
            items = items_per_call(self._guider, conds, model_options or {}, noise_shape[0])
            plan, devices = self._options.resolve(items)
            helpers = comfy.sampler_helpers
            others, extra = helpers.get_additional_models(conds, patcher.model_dtype())
            others += helpers.get_additional_models_from_model_options(model_options)
            others += patcher.get_nested_additional_models()
            nets = ControlNets(conds if self._options.control_nets == "shared" else {}, patcher, model_options or {})
            theirs = [*nets.patchers, *self._motion.patchers]  # the ranks'
            others = [other for other in others if not any(other is each for each in theirs)]
            need, least = (size + extra for size in helpers.estimate_memory(patcher, noise_shape, conds))
            networks, call = [patcher, *theirs], need if items > 1 else least  # of two prompts, or of one
            # half as much again is what the host wants to see free before it has prompts share a call
            if plan.branches > 1 and not self._options.branches and not affordable(networks, plan, devices, 1.5 * call):
                plan, devices = self._options.resolve(items, branching=False)

            def load(ranks: list[Any]) -> None:
                comfy.model_management.load_models_gpu([*others, *ranks], memory_required=need, minimum_memory_required=least)
                comfy.model_management.soft_empty_cache()  # the ranks are other processes

            if self._motion.patchers:
                self._motion.take_out()
                noise_shape = [self._motion.frames, *noise_shape[1:]]
            room = room_for_weights(devices, call / plan.branches, networks)
            balance = Balance(patcher, plan, noise_shape, devices, room)
            poll = comfy.model_management.throw_exception_if_processing_interrupted
            acquire = functools.partial(POOL.acquire, patcher, nets.networks, plan, devices, noise_shape, load, poll, balance)
            self._acquire, self._nets = acquire, nets
            self._with_ranks(lambda: None)
        except (OneDeviceError, BusyError) as error:
            return self._note(str(error))
        except UnsupportedModelError as error:
            return self._note(f"this model cannot be split: {error}")
        except _FAILURES as error:
            return self._give_up(error)
        self._own = OwnNetwork(patcher, [*self._motion.patchers, *nets.patchers])
        self._own.prepare()
        self._watched = [Watched(network) for network in (patcher.model.diffusion_model, *nets.networks)]
        sampling = patcher.get_model_object("model_sampling")
        self._streams = Streams(sampling, noise_shape, self._guider, self._sampler, model_options)
        verify = setting("Verify") if self._options.verify == "auto" else self._options.verify
        self._audit = Audit(verify, patcher, strangers(patcher, model_options, self._guider))
        self._changes.enter_context(self._own.batched_for(self._room_for_calls(room_for_weights(devices, 0.0, networks))))
        calls = rehearse(self._sampler, self._sigmas, patcher)
        levels = _levels(sampling, calls, rest=float(self._sigmas[-1]))
        plan = _in_calls(plan, len(calls) / steps)
        wanted = self._options.preset == "Custom" and self._options.speedup
        if wanted:
            try:
                plan = self.group.placement.within(self._options.speedup, plan, len(calls), levels)
            except PlanError as error:
                self._note(str(error))
                plan = replace(plan, warmup=1)
        here = plan.at(levels)
        if plan.segments > 1 and not wanted and len(calls) <= here.warmup + here.cooldown < ALWAYS:
            self._note(
                f"all of these {steps} steps are exact, so none is much faster: a warm-up of {here.warmup} and a cool-down of "
                f"{here.cooldown} leave none between them. Take more steps, or a shorter warm-up with the preset Fast or Custom"
            )
        self._plan, self._balance, self._calls = plan, balance, len(calls) - here.cooldown

        def begin(group: WorkerGroup) -> None:
            group.begin(sampling.timestep(calls), plan, self._on_record, levels)
            self._progress.sampling(group, plan, len(calls))

        def begin_balanced() -> None:
            if placement := balance.better(self.group, self._calls - here.warmup, running=False):
                POOL.move(self.group, placement, patcher)
            begin(self.group)

        self._begin = begin
        try:
            self._with_ranks(begin_balanced)
        except _FAILURES as error:
            return self._give_up(error)
        for note in nets.notes:
            self._note(note)
        self._changes.enter_context(nets.recorded())
        without_compiled_network(model_options)
        return patcher.model, conds, others

    def evaluate(self, x: torch.Tensor, sigma: torch.Tensor) -> None:
        """The sampler evaluates the model at its latent ``x`` [B, C, ...], whose noise is ``sigma`` [B]."""
        if self.group is not None:
            self._streams.evaluate(x, sigma)

    def computes(self, network: Any) -> bool:
        """Whether calls of ``network`` are this sampling's to compute."""
        return network is self._patcher.model.diffusion_model

    def pass_by(self, network: Any, given: dict[str, Any]) -> None:
        """A call of ``network`` with these arguments is not, such as one of a guider's second model."""
        self._note(f"ComfyUI computes what is called of another model within this sampling ({type(network).__name__})")
        if calls := take(given.get("control")):  # of the same prompts' ControlNets
            comfy.model_management.load_models_gpu(list(self._nets.patchers))
            complete(given["control"], calls)

    def call(self, given: dict[str, Any], network: Callable[[], torch.Tensor]) -> torch.Tensor:
        """One call of the network with these arguments, latent and timesteps first; by the group if that can be."""
        comfy.model_management.throw_exception_if_processing_interrupted()  # a quick call never waits long enough to look
        (x, timesteps, *_), options = given.values(), given.get("transformer_options") or {}
        control = given.get("control")
        nets = take(control)

        def on_host() -> torch.Tensor:
            self._own.load(x)
            complete(control, nets)  # in the dictionary that the network is called with
            return network()

        def by_host(reason: str) -> torch.Tensor:
            self._note(reason)
            if self._motion.patchers:
                self._left = reason  # the host's network now has the motion modules, and weights of other names
            return on_host()

        if reason := self._left or self._call_obstacle(given, options):
            return by_host(reason)
        if not all(net.fits(x, timesteps) for net in nets):
            return by_host("a ControlNet is given another latent than the model")
        rest = rest_of(given)
        path = ""
        if self._motion.patchers:
            given["motion"] = state = self._motion.state()
            if state is None:
                return by_host(f"AnimateDiff-Evolved: {NOT_PLAIN}")
            path = self._motion.stream(state)
        shipped = shippable(options)
        given["transformer_options"] = shipped
        window = getattr(options.get("context_window"), "index_list", None) or options.get("ad_params", {}).get("sub_idxs")
        # the same prompt under a guidance patch, a control net that starts in mid-run, a window of frames: streams of their own
        patches, hung = self._patches.setdefault(identity(shipped), len(self._patches)), identity(shipped, by_value=False)
        shipped |= random_numbers(self._patcher.model.diffusion_model, shipped, x)
        kind = tuple(x.shape), outline_of(rest), _outline(control), tuple(net.net for net in nets), patches
        prompt = tuple(options.get("uuids", ())), *kind, repr(window), path
        stream, moved_on = self._stream(prompt, x, timesteps, rest, window)
        self._progress.call(stream, self._windows.turn)
        if self._plan.branches > len(x):
            self._note(
                "the host evaluates prompts one after the other, or a guidance node one of them again: then there is nothing to "
                f"divide, and only the first of {self._plan.branches} branches works. AsyncDiff Options, Custom, branches=1 uses "
                "all devices"
            )

        def by_ranks() -> torch.Tensor:
            self._rebalance()
            for gone in moved_on:
                self.group.forget(gone)
            if nets:
                given["nets"] = {self._slots[net.net]: net.to_send(self._plan.microbatches > 1) for net in nets}
            try:
                return self.group(stream=stream, **given)
            except ScheduleError:
                self._do_without_schedule()
                return self.group(stream=stream, **given)

        try:
            result = self._with_ranks(by_ranks)
            self._sampled = True
            if self._finite and not self.group.finite:
                self._explain_nan(x, given)
            if self._to_compare(stream, (*kind[:-1], hung), x, shipped):
                try:
                    expected = self._own.for_once(on_host)
                except comfy.model_management.OOM_EXCEPTION:
                    self._note(_NO_ROOM)
                else:
                    if report := self._audit.differs(self.group, result, expected, x, {"arguments": kind[1], "patches": hung}):
                        self._left = report
                        self._note(report)
                        return expected
            elif self._audit.lacked_room:
                self._note(_NO_ROOM)
            return give_back(options, result) if isinstance(result, tuple) else result
        except UnsupportedModelError as error:
            return by_host(f"this call cannot be split: {error}")
        except GroupClosedError:
            self._left = "ComfyUI took the ranks' memory back in mid-run; going on without them"
        except _FAILURES as error:
            self._left = f"{_brief(error)}: going on without them"
            POOL.bury()
        return by_host(self._left)

    def _call_obstacle(self, given: dict[str, Any], options: dict[str, Any]) -> str | None:
        """Why only the host can compute this call; None if the ranks can."""
        network = self._patcher.model.diffusion_model
        if found := [each for watched in self._watched for each in watched.changes()]:
            return f"another node replaced code of the network: {', '.join(sorted(found)[:3])}"
        return surroundings(given, network) or call_obstacle(network, options)

    def _stream(
        self, prompt: Any, x: torch.Tensor, timesteps: torch.Tensor, rest: list[Any], window: Any
    ) -> tuple[Any, list[Any]]:
        """The stream of a call, and those that will not be called again."""
        timestep = float(timesteps.flatten()[0])
        if window is not None:
            return self._windows.stream(prompt, timestep)
        if self._plan.warmup >= ALWAYS or self._plan.segments == 1:  # no call builds on another
            return prompt, []
        stream = self._streams.of(prompt[0], prompt, x, timestep, rest)
        if stream is None:
            self._do_synchronously()
        return stream or prompt, []

    def _to_compare(self, stream: Any, kind: Any, x: torch.Tensor, shipped: dict[str, Any]) -> bool:
        """Whether the host is to compute this call as well: the first of its stream, which was synchronous."""
        first = stream not in self._streams_seen
        self._streams_seen.add(stream)
        # motion modules are put into the host's network for good, and random numbers that are drawn again are others
        return first and not self._motion.patchers and NUMBERS not in shipped and self._audit.wants(kind, x)

    def close(self) -> None:
        """However it ended: leave the host's objects as they were, and the memory of its devices to what comes next."""
        self._changes.close()
        if self.group is not None:
            POOL.give_back(self.group)
            if not self.group.closed:
                with contextlib.suppress(AsyncDiffError):  # then the next run starts others
                    self.group.tidy()

    def finish(self) -> None:
        """The sampling went well: publish what is known about it."""
        try:
            left = RunRecord(tuple(self._notes), self._plan)
            rest = _REPORT_GRACE + time.monotonic() - self._started  # what is worked ahead takes no longer than all before it
            verified = self._audit.agreed if self.group else 0
            record = left if self._left else RunRecord.of(self.group, self._plan, self._notes, rest, verified)
        except AsyncDiffError as error:  # the picture is done: it must not be lost for a report
            self._note(f"there is no report on this run: {_brief(error)}")
            POOL.bury()
            record = RunRecord(tuple(self._notes), self._plan)
        publish(record)
        if self._balance is not None:
            self._balance.finish()
        self._progress.enter("done")

    def fail(self, error: BaseException) -> None:
        """The sampling was cancelled or went wrong."""
        cancelled = isinstance(error, comfy.model_management.InterruptProcessingException)
        if not cancelled:
            self._notes.append(str(error))
        self._progress.enter("cancelled" if cancelled else "failed")

    @property
    def _on_record(self) -> Callable[[CallRecord], None]:
        progress, balance = self._progress, self._balance  # not self: the group would keep the model alive

        def tell(record: CallRecord) -> None:
            progress.add(record)
            balance.add(record)

        return tell

    def _rebalance(self) -> None:
        """Once the ranks have told how fast they are: have the blocks change their ranks, if that pays in what is left."""
        if self.group.closed or not self._balance.learnt(self._plan):
            return
        placement = self._balance.better(self.group, self._calls - self._progress.posted, running=True)
        if placement is None:
            return
        log.info("AsyncDiff: dividing the work anew, at %s", ", ".join(placement.cuts))
        POOL.move(self.group, placement, self._patcher)

    def _with_ranks(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns, with ranks. Where these fail others do it, once per sampling, unless the user wants none.

        Of what the first ranks did since the call that fails nothing is used: a stream's next call is its first on the others,
        as if the sampling began there.
        """
        try:
            if self.group is None:
                self._enter()
            return work()
        except (*_FAILURES, GroupClosedError) as error:
            taken = isinstance(error, GroupClosedError)
            log.warning("AsyncDiff: the ranks %s", "are gone" if taken else "failed", exc_info=error)
            # their memory is wanted once where a ControlNet encodes its picture before the first call, later for good
            if self._restarted or self._options.on_failure != "restart" or (taken and self._sampled):
                raise
            self._restarted = True
            cause = "ComfyUI took the ranks' memory back before the first call" if taken else _brief(error)
            self._notes.append(f"{cause}: others have taken their place")
        self._enter()
        return work()

    def _enter(self) -> None:
        """Get a group, and have it begin at the call that is due, if the run goes on already."""
        self.group = self._acquire()
        self._slots = POOL.slots(self.group, self._nets.networks)
        if self._begin is not None:
            self._begin(self.group)

    def _give_up(self, error: AsyncDiffError) -> None:
        """The ranks failed before the first call."""
        self.group = None
        POOL.bury()
        self._note(_brief(error))

    def _explain_nan(self, x: torch.Tensor, given: dict[str, Any]) -> None:
        """The ranks' results have NaN or infinity: say where these come from, once per sampling."""
        self._finite, step = False, self._progress.posted
        if not x.isfinite().all():
            return self._note(f"the latent of step {step} has NaN or infinity, before the network is called")
        block = self.group.origin_of_nan(**given)
        self._begin(self.group)
        where = "though not if it is computed synchronously"
        if block is not None:
            placement = self.group.placement
            index = placement.graph.names.index(block)
            where = f"from block {block} on, on {self.group.devices[placement.segments[index]]}"
        self._note(
            f"the network's result in step {step} has NaN or infinity, {where}: see whether another precision helps "
            "(ComfyUI's --force-fp32, or ModelComputeDtype), and whether a LoRA or patch does it"
        )

    def _do_without_schedule(self) -> None:
        """The calls are not those that were announced: only the sampler knows which there are (dpm_adaptive, another pack's)."""
        without = "nothing is computed ahead" if self._plan.stride == 1 else f"stride={self._plan.stride} is not possible"
        self._note(f"which calls of the network this sampler makes is not known beforehand: {without}")
        self._go_on(replace(self._plan, stride=1, forecast=0))

    def _do_synchronously(self) -> None:
        """It cannot be told which earlier call a call goes on from: none of its values may reach another."""
        self._note(
            "a node calls the network for other parts of the latent, or with other arguments, in a way that changes from step to "
            "step: every step is synchronous, and none is faster"
        )
        self._go_on(replace(self._plan, warmup=ALWAYS, stride=1, forecast=0, cooldown=0))

    def _go_on(self, plan: Plan) -> None:
        """With another plan, and without the schedule."""
        self._plan = plan

        def begin(group: WorkerGroup) -> None:
            group.begin(plan=plan, on_record=self._on_record)
            self._progress.sampling(group, plan)

        self._begin = begin
        begin(self.group)

    def _room_for_calls(self, room: Sequence[float]) -> float:
        """Bytes that ranks have beside their weights for the calls of all branches, with ``room`` for both on each."""
        plan, placement = self.group.plan, self.group.placement
        return plan.branches * min(space - placement.weight_bytes(plan.segment_of_rank(rank)) for rank, space in enumerate(room))

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
            self._progress.enter(self._progress.phase if self.group else "usual")
            log.warning("AsyncDiff: %s%s", "" if self.group else "not used, ComfyUI samples as usual: ", text)


def _brief(error: AsyncDiffError) -> str:
    """Its first line: what there is more is a rank's traceback, and in the log."""
    return str(error).partition("\n")[0]


def _levels(sampling: Any, sigmas: torch.Tensor, rest: float) -> NoiseLevels | None:
    """Of calls at ``sigmas`` [calls]; None if they make no sense, which is the sampler's to say."""
    scales = sampling.calculate_input(sigmas, torch.ones_like(sigmas))
    try:
        return NoiseLevels(tuple(sigmas.tolist()), tuple(scales.tolist()), rest)
    except ValueError:
        return None


def _in_calls(plan: Plan, calls_per_step: float) -> Plan:
    """``plan``, whose warm-up counts steps, for a sampler that makes so many calls per step."""
    if calls_per_step == 1:
        return plan
    warmup = math.ceil(plan.warmup * calls_per_step)
    return replace(plan, warmup=warmup + (1 - warmup) % plan.stride)  # see Plan: one more than a multiple of the stride


def _outline(control: dict[str, Any] | None) -> str:
    """Which control residuals there are: a net that starts or stops in mid-run begins new streams."""
    if control is None:
        return ""
    return str({name: [item is not None for item in items] for name, items in control.items()})
