"""One run of the host's sampler on a worker group, from its first call to its end."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from asyncdiff_nodes.engine import (
    AsyncDiffError,
    CallRecord,
    GroupClosedError,
    OtherPathError,
    Plan,
    ScheduleError,
    UnsupportedModelError,
    WorkerGroup,
)
from asyncdiff_nodes.host.choices import ALWAYS, CUSTOM
from asyncdiff_nodes.host.controlnet.calls import NetCall, complete, take, without_ranks
from asyncdiff_nodes.host.page.progress import Progress
from asyncdiff_nodes.host.page.report import RunRecord, publish
from asyncdiff_nodes.host.page.settings import setting
from asyncdiff_nodes.host.patches.foreign_code import Watched
from asyncdiff_nodes.host.patches.obstacles import READ_BY_NETWORKS, call_obstacle, missing, obstacle, shippable, surroundings
from asyncdiff_nodes.host.patches.protocol import RoutedCall
from asyncdiff_nodes.host.workers import banded, links
from asyncdiff_nodes.host.workers.block_times import Balance
from asyncdiff_nodes.host.workers.found import options_read
from asyncdiff_nodes.host.workers.pool import POOL, BusyError
from asyncdiff_nodes.host.workers.repeated import RepeatedFailureError
from asyncdiff_nodes.host.workers.skeleton import fingerprint_of

from . import first_use
from .announced import Announced, Evaluation
from .band_choice import BandChoice
from .network_call import NetworkCall
from .options import OneDeviceError, Options
from .own_network import OwnNetwork
from .preparation import Preparation
from .ranks import FAILURES, Ranks, brief
from .stream_names import NamedCall, StreamNames
from .streams import Streams, rest_of
from .verify import Audit, distrusted, strangers

log = logging.getLogger(__name__)

_NO_ROOM = "verify: nothing was compared, because there is no room for ComfyUI's own network beside the ranks"
_UNCHECKED = (
    "the blocks of this network were found automatically, and nothing was compared with ComfyUI's own result, because there is "
    "no room for its network beside the ranks"
)
_REPORT_GRACE = 5.0  # seconds


class Sampling:
    """One run of the host's sampler on a worker group.

    Args:
        guider: the host's GUIDER.
        sampler: the host's SAMPLER.
        sigmas: its schedule, [steps + 1].
    """

    def __init__(self, options: Options, guider: Any, sampler: Any, sigmas: torch.Tensor) -> None:
        self._options = options
        self._guider, self._patcher = guider, guider.model_patcher
        self._sampler, self._sigmas = sampler, sigmas
        self._plan: Plan | None = None  # None before the ranks are ready
        self._ranks: Ranks | None = None
        self._ready: Preparation
        self._announced: Announced
        self._band_choice: BandChoice | None = None  # None where there were no ranks to choose for
        self._names: StreamNames
        self._watched: list[Watched]  # the network, and those of ControlNets
        self._audit: Audit
        self._own: OwnNetwork
        self._routes = self._begun = False
        self._evaluation: Evaluation | None = None  # the latest
        self._left = ""  # why the host continues without the ranks
        self._finite = True  # no NaN or infinity was seen yet
        self._started = time.monotonic()
        self._changes = contextlib.ExitStack()  # to the host's objects, for this sampling
        self._progress = Progress(steps=len(sigmas) - 1)
        self._notes = self._progress.notes

    @property
    def routes(self) -> bool:
        """Whether calls of the network come here; else the host computes it as usual."""
        return self._routes

    @property
    def group(self) -> WorkerGroup | None:
        """The group of ranks; None while the host computes the network itself."""
        return self._ranks and self._ranks.group

    def prepare(
        self,
        patcher: ModelPatcher,
        noise_shape: Sequence[int],
        conds: dict[str, Any],
        model_options: dict[str, Any] | None = None,
        **_: Any,
    ) -> tuple[Any, Any, list[Any]] | None:
        """Get a group and the host's other models ready. Returns None, and notes why, if the host samples as usual."""
        given = {} if model_options is None else model_options
        if reason := distrusted(patcher) or obstacle(patcher, given) or without_ranks(conds):
            return self._note(reason)
        if len(self._sigmas) < 2:
            return self._note("there is no step to sample")
        try:
            self._ready = ready = Preparation(self._options, self._guider, patcher, noise_shape, conds, given)
            function = getattr(self._sampler, "sampler_function", None)
            run = tuple(self._sigmas.tolist()), getattr(function, "__qualname__", "")
            self._band_choice = BandChoice(self._options.preset, ready.band_times, patcher.model, run)
            self._ranks = Ranks(ready.request, self._options.on_failure == "restart", self._notes.append)
            self._plan = None  # another pack's node may sample several times within one of ours
            self._ranks.prepare()
            self._look_at_host(given)
        except (OneDeviceError, BusyError, RepeatedFailureError) as error:
            return self._do_without(str(error))
        except UnsupportedModelError as error:
            return self._do_without(f"this model cannot be split: {error}")
        except FAILURES as error:
            return self._do_without(brief(error))
        self._changes.enter_context(ready.nets.recorded())
        for patch in ready.patches:
            patch.begin(given)
        self._routes = True
        return patcher.model, conds, ready.others

    def _do_without(self, reason: str) -> None:
        """Give up the ranks, and let the host sample for this ``reason``."""
        self._changes.close()
        if self._ranks is not None:
            self._ranks.give_up()
        self._note(reason)

    def _look_at_host(self, model_options: dict[str, Any]) -> None:
        """Bring the host's objects into the state that they have in a sampling, and remember that state."""
        ready, patcher = self._ready, self._patcher
        self._fingerprint = fingerprint_of(patcher)
        self._own = OwnNetwork(patcher, ready.theirs)
        self._own.prepare()
        self._watched = [Watched(network) for network in (patcher.model.diffusion_model, *ready.nets.networks)]
        sampling = patcher.get_model_object("model_sampling")
        self._names = StreamNames(Streams(sampling, ready.shape, self._guider, self._sampler, model_options))
        verify = setting("Verify") if self._options.verify == "auto" else self._options.verify
        rounds = any(patch.rounds for patch in ready.patches)
        self._audit = Audit(verify, patcher, strangers(patcher, model_options, self._guider), rounds)
        self._changes.enter_context(self._own.batched_for(ready.room_for_calls(self.group and self.group.placement)))

    def _start(self, call: NetworkCall) -> str | None:
        """Get the ranks ready for the first ``call``, and begin. Returns why only the host can compute, in words."""
        try:
            self._ranks.start(call.entry, call.places, call.given)
            self._begin()
        except (OneDeviceError, BusyError, RepeatedFailureError) as error:
            reason = str(error)
        except UnsupportedModelError as error:
            reason = f"this model cannot be split: {error}"
        except FAILURES as error:
            reason = brief(error)
        else:
            for note in (*self._ready.nets.notes, *links.notes(self._ready.request.devices)):
                self._note(note)
            return None
        self._ranks.give_up()
        return reason

    @property
    def _read(self) -> Collection[str]:
        """The options that the network reads; all that it may read, before that is found out."""
        known = options_read(self._fingerprint)
        return READ_BY_NETWORKS if known is None else known

    def _of_those_read(self, sent: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Leave of the options in ``sent`` what a later call with ``options`` has, in the same order."""
        later = shippable(options, self._read)
        return {key: sent[key] for key in dict.fromkeys((*later, *sent)) if key in later or key not in READ_BY_NETWORKS}

    def _begin(self) -> None:
        """Have the ranks begin, with the blocks placed by all that is known about their speed."""
        ready, placement = self._ready, self.group.placement
        wanted = replace(ready.plan, bands=self.group.plan.bands)
        self._announced = calls = Announced(
            self._options, self._patcher, self._sampler, self._sigmas, wanted, placement, self._evaluation, self._note
        )
        if self._options.preset == CUSTOM and self.group.bandless:
            self._note(f"bands={ready.plan.bands} is not possible: {self.group.bandless}")
        self._plan = self._band_choice.plan(calls, self.group)
        begin = self._beginning(self._plan, calls)

        def begin_balanced() -> None:
            if better := ready.balance.better(self.group, calls.asynchronous, running=False):
                self._ranks.move(better)
            begin(self.group)

        self._ranks.begin(begin_balanced, begin)

    def _beginning(self, plan: Plan, calls: Announced | None) -> Callable[[WorkerGroup], None]:
        """Return what begins the run in a group, with the schedule of ``calls`` if they follow it."""
        timesteps, levels = (None, None) if calls is None else (calls.timesteps, calls.levels)

        def begin(group: WorkerGroup) -> None:
            self._plan = replace(plan, bands=min(plan.bands, group.plan.bands))  # there may be no room for them any more
            group.begin(timesteps, self._plan, self._on_record, levels)
            self._progress.sampling(group, self._plan, calls and len(calls))

        return begin

    def evaluate(self, x: torch.Tensor, sigma: torch.Tensor) -> None:
        """Note that the sampler evaluates the model at its latent ``x`` [B, C, ...] with noise ``sigma`` [B]."""
        if self.routes:
            self._names.evaluate(x, sigma)

    def evaluating(self, model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Note that ``model``, the host's, is evaluated with the arguments of its ``apply_model``."""
        if model is self._patcher.model:
            self._evaluation = Evaluation.of(model, args, kwargs)

    def computes(self, network: Any) -> bool:
        """Whether this sampling computes the calls of ``network``."""
        return network is self._patcher.model.diffusion_model

    def pass_by(self, call: NetworkCall) -> None:
        """Note a call of another network, such as that of a guider's second model; the host computes it."""
        self._note(f"ComfyUI computes the calls of another model within this sampling ({type(call.network).__name__})")
        if calls := take(call.given.get("control")):  # ControlNets of the same prompts
            comfy.model_management.load_models_gpu(list(self._ready.nets.patchers))
            complete(call.given["control"], calls)

    def call(self, called: NetworkCall) -> Any:
        """Compute one call of the network; on the ranks if possible."""
        comfy.model_management.throw_exception_if_processing_interrupted()  # a quick call never waits long enough to check
        given, x, timesteps = called.given, called.x, called.timesteps
        options, control = given.get("transformer_options") or {}, given.get("control")
        nets = take(control)

        def on_host(**other: Any) -> Any:
            self._own.load(x)
            complete(control, nets)  # in the dictionary that the network is called with
            return called.compute(**other)

        def by_host(reason: str) -> torch.Tensor:
            self._note(reason)
            if any(patch.only_ranks for patch in self._ready.patches):
                self._left = reason
            return on_host()

        if reason := self._left or self._call_obstacle(given, options):
            return by_host(reason)
        if not all(net.fits(x, timesteps) for net in nets):
            return by_host("a ControlNet gets a different latent than the model")
        rest = rest_of(given)
        call = RoutedCall(self._patcher.model.diffusion_model, given, options, x)
        given["transformer_options"] = shippable(options, self._read)
        # before patches draw random numbers for the ranks
        only_bands = self._ready.plan.bands > 1 and self._ready.plan.segments == 1
        if only_bands and (reason := banded.obstacle(given["transformer_options"])):
            return by_host(f"this call cannot be computed in bands: {reason}")
        for patch in self._ready.patches:
            if reason := patch.before(call):
                return by_host(reason)
        if self._plan is None:
            if nets:  # without a group they have no places yet
                given["nets"] = {index: net.to_send(self._ready.plan.microbatches > 1) for index, net in enumerate(nets)}
            if reason := self._start(called):
                self._left = reason
                return by_host(reason)
            given["transformer_options"] = self._of_those_read(given["transformer_options"], options)
        if reason := missing(options, self._read):
            return by_host(reason)
        try:
            if (plan := self._band_choice.instead(self._progress.posted)) is not None:
                self._go_on(plan, self._announced)
            synchronous = self._plan.warmup >= ALWAYS or self._plan.segments == 1
            named = self._names.of(call, rest, timesteps, nets, synchronous)
            if not named.certain:
                self._do_synchronously()
            if call.repeatable and (difference := self._first_use(called, call, nets, on_host)):
                self._left, expected = difference
                self._note(self._left)
                return expected
            result = self._by_ranks(call, named, nets)
            if difference := self._compared(call, named, result, on_host):
                self._left, expected = difference
                self._note(self._left)
                return expected
        except UnsupportedModelError as error:
            return by_host(f"this call cannot be split: {error}")
        except GroupClosedError:
            self._left = "ComfyUI took the ranks' memory back during the run; it finishes the picture by itself"
            return by_host(self._left)
        except FAILURES as error:
            self._left = f"{brief(error)}; ComfyUI finishes the picture by itself"
            POOL.bury()
            return by_host(self._left)
        for patch in self._ready.patches:
            result = patch.after(call, result)
        return result

    def _call_obstacle(self, given: dict[str, Any], options: dict[str, Any]) -> str | None:
        """Why only the host can compute this call; None if the ranks can."""
        network = self._patcher.model.diffusion_model
        if changes := [each for watched in self._watched for each in watched.changes()]:
            return f"another node replaced code of the network: {', '.join(sorted(changes)[:3])}"
        return surroundings(given, network) or call_obstacle(network, options)

    def _by_ranks(self, call: RoutedCall, named: NamedCall, nets: Sequence[NetCall]) -> Any:
        """Return the ranks' result for ``call``."""
        self._progress.call(named.stream, self._names.turn)
        if self._plan.branches > len(call.x):
            self._note(
                "some calls cannot be divided, because ComfyUI evaluates the prompts one after the other, or a guidance node "
                f"evaluates one of them again: only the first of {self._plan.branches} branches computes these. To use all "
                "devices, set preset=Custom and branches=1 in AsyncDiff Options"
            )
        given = call.arguments

        def compute() -> Any:
            self._rebalance()
            for gone in named.gone:
                self.group.forget(gone)
            if nets:
                given["nets"] = {self._ranks.slots[net.net]: net.to_send(self._plan.microbatches > 1) for net in nets}
            return self._on_group(named.stream, given)

        result = self._ranks.compute(compute)
        if self._finite and not self.group.finite:
            self._explain_nan(call.x, given)
        return result

    def _on_group(self, stream: Hashable, given: dict[str, Any]) -> Any:
        """Return the group's result for a call with these arguments, whatever has to be changed for that."""
        while True:
            try:
                return self.group(stream=stream, **given)
            except ScheduleError:
                self._do_without_schedule()
            except OtherPathError as error:
                self._ranks.place_anew(given, error)

    def _compared(
        self, call: RoutedCall, named: NamedCall, result: Any, on_host: Callable[[], torch.Tensor]
    ) -> tuple[str, torch.Tensor] | None:
        """Have the host compute ``call`` as well, if it is due. Returns a report and the host's result where the two differ."""
        # only the first call of a stream, which was synchronous, is compared
        if not (named.first and call.repeatable and self._audit.wants(named.kind, call.x)):
            if self._audit.lacked_room:
                self._note(_NO_ROOM)
            return None
        try:
            expected = self._own.for_once(on_host)
        except comfy.model_management.OOM_EXCEPTION:
            self._note(_NO_ROOM)
            return None
        facts = {"arguments": named.arguments, "patches": named.patches}
        report = self._audit.differs(self.group, result, expected, call.x, facts)
        return report and (report, expected)

    def _first_use(
        self, called: NetworkCall, call: RoutedCall, nets: Sequence[NetCall], on_host: Callable[..., torch.Tensor]
    ) -> tuple[str, torch.Tensor] | None:
        """Compare two calls with the host's, if how to split this network was found out and it was never compared.

        The sampling then begins as if nothing had been.

        Returns:
            None if they agree; else a report, and the host's result for ``called``.
        """
        first, self._begun = not self._begun, True
        bands = self._plan.bands > 1
        if not first or nets or not (self._audit.watches and first_use.due(self.group.family, self._fingerprint, bands)):
            return None
        try:
            with POOL.kept(self.group):  # the host offloads what does not fit beside the ranks
                expected = self._own.for_once(lambda: first_use.computed(called, call.x, self._own, on_host))
        except comfy.model_management.OOM_EXCEPTION:
            self._note(_UNCHECKED)
            return None
        for changes, theirs in expected:
            ours = self._ranks.compute(functools.partial(self._on_group, "first use", call.arguments | changes))
            self.group.forget("first use")
            facts = {"found automatically": len(self.group.placement)}
            # a GPU may choose other kernels for ComfyUI, which has other memory, and every user of the model comes by here
            if report := self._audit.differs(self.group, ours, theirs, call.x, facts, rounds=call.x.device.type != "cpu"):
                return report, expected[0][1]
        self._ranks.resume()
        first_use.passed(self._fingerprint, bands, type(called.network).__name__)
        return None

    def close(self) -> None:
        """End the sampling, however it went: restore the host's objects, and free the devices' memory for what comes next."""
        self._changes.close()
        if self._ranks is not None:
            self._ranks.close()

    def finish(self) -> None:
        """Publish the report of a sampling that went well."""
        try:
            left = RunRecord(tuple(self._notes), self._plan)
            rest = _REPORT_GRACE + time.monotonic() - self._started  # work done ahead takes no longer than everything before it
            verified = self._audit.agreed if self.group else 0
            used = self.group if self._plan is not None else None  # ranks of another sampling may have been found, and not called
            choice = self._band_choice.why if self._band_choice else ""
            record = left if self._left else RunRecord.of(used, self._plan, self._notes, rest, verified, choice)
        except AsyncDiffError as error:  # the picture is done: a missing report must not cost it
            self._note(f"there is no report on this run: {brief(error)}")
            POOL.bury()
            record = RunRecord(tuple(self._notes), self._plan)
        publish(record)
        if self._plan is not None:
            self._ready.balance.finish()
            self._ready.band_times.finish()
        self._progress.enter("done")

    def fail(self, error: BaseException) -> None:
        """Note that the sampling was cancelled or went wrong."""
        cancelled = isinstance(error, comfy.model_management.InterruptProcessingException)
        if not cancelled:
            self._notes.append(str(error))
        self._progress.enter("cancelled" if cancelled else "failed")

    @property
    def _on_record(self) -> Callable[[CallRecord], None]:
        # not self: the group would keep the model alive
        progress, balance, bands = self._progress, self._ready.balance, self._ready.band_times

        def tell(record: CallRecord) -> None:
            progress.add(record)
            balance.add(record)
            bands.add(record)

        return tell

    def _rebalance(self) -> None:
        """Move blocks to other ranks, once the ranks' speed is known and if that pays off in the rest of the run."""
        balance: Balance = self._ready.balance
        if self.group.closed or not balance.learnt(self._plan):
            return
        placement = balance.better(self.group, self._announced.left(self._progress.posted), running=True)
        if placement is None:
            return
        log.info("AsyncDiff: moving blocks between ranks; the new cuts are %s", ", ".join(placement.cuts))
        self._ranks.move(placement)

    def _explain_nan(self, x: torch.Tensor, given: dict[str, Any]) -> None:
        """Tell the user where NaN or infinity in the ranks' results come from, once per sampling."""
        self._finite, step = False, self._progress.posted
        if not x.isfinite().all():
            return self._note(f"the latent of step {step} has NaN or infinity already before the network is called")
        block = self.group.origin_of_nan(**given)
        self._ranks.resume()
        where = "but not if it is computed synchronously"
        if block is not None:
            placement = self.group.placement
            index = placement.graph.names.index(block)
            where = f"starting at block {block} on {self.group.devices[placement.segments[index]]}"
        self._note(
            f"the network's result in step {step} has NaN or infinity, {where}: try another precision "
            "(ComfyUI's --force-fp32, or ModelComputeDtype), and try without LoRAs and patches"
        )

    def _do_without_schedule(self) -> None:
        """Continue without the schedule: the sampler (dpm_adaptive, another pack's) makes other calls than were announced."""
        without = "nothing is computed ahead" if self._plan.stride == 1 else f"stride={self._plan.stride} is not possible"
        self._note(f"this sampler's calls of the network are not known in advance: {without}")
        self._go_on(replace(self._plan, stride=1, forecast=0))

    def _do_synchronously(self) -> None:
        """Make all calls synchronous: it is unknown which earlier call each continues, so none may use earlier values."""
        self._note(
            "a node calls the network for several parts of the latent, or with several arguments, and that changes from step to "
            "step: every step is synchronous, and none is faster"
        )
        self._go_on(replace(self._plan, warmup=ALWAYS, stride=1, forecast=0, cooldown=0))

    def _go_on(self, plan: Plan, calls: Announced | None = None) -> None:
        """Continue with another plan; with the schedule of ``calls``, if they follow it still."""
        self._plan = plan
        self._ranks.begin_anew(self._beginning(plan, calls))

    def _note(self, text: str) -> None:
        """Tell the user ``text`` once: on the node, in the page, and in the log."""
        if text not in self._notes:
            self._notes.append(text)
            self._progress.enter(self._progress.phase if self.group else "usual")
            log.warning("AsyncDiff: %s%s", "" if self.group else "not used, ComfyUI samples as usual: ", text)
