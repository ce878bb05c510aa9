"""ControlNets that the ranks compute as a part of the network; the host would compute them whole before each call."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.controlnet
import torch
from comfy.controlnet import ControlBase, ControlNet
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import nn

from asyncdiff_nodes.engine import UnsupportedModelError
from asyncdiff_nodes.host import OURS
from asyncdiff_nodes.host.attributes import replaced
from asyncdiff_nodes.host.patches.foreign_code import foreign_classes
from asyncdiff_nodes.host.patches.registry import models_of
from asyncdiff_nodes.host.workers.skeleton import net_skeleton

from .network import CONTROLLED, MERGE, Residuals


@dataclass(frozen=True)
class NetCall:
    """A call of a ControlNet that has not been made yet.

    Attributes:
        net: index of its network in :attr:`ControlNets.networks`.
        arguments: the arguments of its network.
    """

    control: ControlNet
    net: int
    arguments: dict[str, Any]

    def fits(self, x: torch.Tensor, timesteps: torch.Tensor) -> bool:
        """Whether its sample and timesteps follow from ``x`` and ``timesteps`` of the network's call."""
        sample, times = self.arguments["x"], self.arguments["timesteps"]
        return (
            len(x) == len(sample)
            and x.dtype == sample.dtype
            and torch.equal(x[:, : sample.shape[1]], sample)
            and torch.equal(timesteps.to(times.dtype), times)
        )

    def to_send(self, per_item: bool) -> dict[str, Any]:
        """The call in the form that :meth:`~.network.Controlled.forward` takes.

        Args:
            per_item: whether each batch item gets its own hint, as micro-batches need; otherwise one serves them all.
        """
        merge = {name: getattr(self.control, name) for name in MERGE}
        merge["strength_type"] = merge["strength_type"].value  # plain data
        rest = {name: value for name, value in self.arguments.items() if name not in ("x", "timesteps")}
        if per_item:
            rest["hint"] = rest["hint"].expand(len(self.arguments["x"]), *rest["hint"].shape[1:])
        return {"channels": self.arguments["x"].shape[1], "merge": merge, **rest}


class ControlNets:
    """The ControlNets of one sampling's prompts that the ranks can compute: the outermost ones of each chain.

    Where they cannot compute one, the host computes it and all before it, as residuals are added up in this order.

    Args:
        conds: the sampling's prompts by name.

    Attributes:
        networks: their networks; one is here twice where a chain has it twice.
        patchers: the host's patchers of the same networks.
        notes: why the host computes some that one would expect here.
    """

    def __init__(self, conds: dict[str, Any], patcher: ModelPatcher, model_options: dict[str, Any]) -> None:
        self.networks: list[nn.Module] = []
        self.patchers: list[ModelPatcher] = []
        self.notes: list[str] = []
        self._within = False  # a chain is being asked for its residuals
        self._chains: dict[ControlBase, dict[ControlNet, int]] = {}  # outermost one -> one of its chain -> its network
        hosts = set()
        for control in _outermost(conds):
            chain = list(_chain(control))
            mine = list(itertools.takewhile(functools.partial(self._takes, patcher, model_options), chain))
            hosts |= {id(getattr(each, "control_model", None)) for each in chain[len(mine) :]}
            self._chains[control] = {}
            for each in reversed(mine):
                self._chains[control][each] = self._index(each, self._chains[control].values())
        # the host must load the networks that it computes itself
        self.patchers = [each for each in self.patchers if id(each.model) not in hosts]

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Note the calls of these ControlNets for :func:`take` for a while, instead of making them when the host asks."""
        with contextlib.ExitStack() as stack:
            for control, nets in self._chains.items():
                if nets:
                    stack.enter_context(replaced(control, "get_control", self._recording(control, nets)))
            yield

    def _recording(self, control: ControlBase, nets: dict[ControlNet, int]) -> Callable[..., dict[str, Any] | None]:
        """A ``control.get_control`` that notes the calls of ``nets`` among the residuals instead of making them."""
        original = control.get_control

        def get_control(*args: Any, **kwargs: Any) -> dict[str, Any] | None:
            if self._within:  # it is asked as a part of another chain, which notes its call
                return original(*args, **kwargs)
            calls: list[NetCall] = []
            with contextlib.ExitStack() as stack:
                stack.enter_context(replaced(self, "_within", True))
                for net, index in nets.items():
                    stack.enter_context(replaced(net, "control_model", _Recorder(net, index, calls)))
                residuals = original(*args, **kwargs)
            return {**residuals, OURS: calls} if calls else residuals

        return get_control

    def _takes(self, patcher: ModelPatcher, model_options: dict[str, Any], control: ControlBase) -> bool:
        if not isinstance(control, ControlNet):
            return False
        if (reason := _obstacle(control, patcher, model_options)) is None:
            return True
        if (note := f"ComfyUI computes a ControlNet before each step: {reason}") not in self.notes:
            self.notes.append(note)
        return False

    def _index(self, control: ControlNet, taken: Collection[int]) -> int:
        """The index of the network of ``control`` among :attr:`networks`, other than those ``taken``."""
        for index, network in enumerate(self.networks):
            if network is control.control_model and index not in taken:
                return index
        self.networks.append(control.control_model)
        self.patchers.append(control.control_model_wrapped)
        return len(self.networks) - 1


def without_ranks(conds: dict[str, Any]) -> str | None:
    """Why a ControlNet of these prompts keeps the whole network from the ranks, in words; None if none does."""
    fun = getattr(comfy.controlnet, "QwenFunControlNet", ())  # older hosts have none
    if any(isinstance(each, fun) for control in _outermost(conds) for each in _chain(control)):
        return "a QwenFunControlNet uses weights of the network, so ComfyUI has to load the whole network"
    return None


def take(control: dict[str, Any] | None) -> list[NetCall]:
    """Take the calls of ControlNets that are noted among a call's residuals out of these."""
    return control.pop(OURS, []) if control else []


def complete(control: Residuals, calls: Sequence[NetCall]) -> None:
    """Make ``calls`` here, on the host's own networks, and add their residuals to ``control``."""
    for call in calls:
        own = call.control.control_model(**call.arguments)
        control.update(call.control.control_merge(own, dict(control), None))


def _outermost(conds: dict[str, Any]) -> list[ControlBase]:
    """The last ControlNet of each chain of these prompts, once."""
    return list(dict.fromkeys(entry["control"] for entries in conds.values() for entry in entries if "control" in entry))


def _chain(control: ControlBase | None) -> Iterator[ControlBase]:
    while control is not None:
        yield control
        control = control.previous_controlnet


def _obstacle(control: ControlNet, patcher: ModelPatcher, model_options: dict[str, Any]) -> str | None:
    """Why the ranks cannot compute ``control``, in words; None if they can."""
    if type(control) is not ControlNet:
        return f"a {type(control).__name__} does more than run a network"
    network, wrapped, controls = control.control_model, control.control_model_wrapped, type(patcher.model.diffusion_model)
    if controls not in CONTROLLED or type(network) is not CONTROLLED[controls].net_class:
        return f"there is no block list for its {type(network).__name__} with this {controls.__name__}"
    if models_of(patcher):
        return "the network contains further modules, such as AnimateDiff's"
    if "model_function_wrapper" in model_options:
        return "another node wraps the model's function"
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    for kind in (WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL):
        for others in (wrappers.get(kind, {}), patcher.wrappers.get(kind, {})):
            if names := [str(name) for name in others if name != OURS]:
                return f"another node ({', '.join(names)}) may change the inputs of the network"
    if control.extra_hooks is not None or wrapped.patches or wrapped.object_patches:
        return "another node changes its weights"
    dtype = control.manual_cast_dtype or network.dtype
    ours = patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()
    if dtype != ours:
        return f"it computes in {dtype}, the model in {ours}"
    if code := foreign_classes(network):
        return f"its {type(network).__name__} runs code of other packs: {', '.join(code[:3])}"
    try:
        net_skeleton(network, patcher)
    except UnsupportedModelError as error:
        return str(error)
    return None


class _Recorder:
    """Stand-in for a ControlNet's network that notes its calls and returns no residuals."""

    def __init__(self, control: ControlNet, net: int, calls: list[NetCall]) -> None:
        self.dtype = control.control_model.dtype
        self._control, self._net, self._calls = control, net, calls

    def __call__(self, **arguments: Any) -> Residuals:
        self._calls.append(NetCall(self._control, self._net, arguments))
        return {}
