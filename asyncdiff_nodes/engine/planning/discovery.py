"""How to split a network that nobody has listed: found out from its forward and the arguments of one call, on meta."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine.batch import sample_of
from asyncdiff_nodes.engine.errors import UnsupportedModelError
from asyncdiff_nodes.engine.tensors import meta_copy
from asyncdiff_nodes.engine.trees import flatten

from .choice import Chosen, choose, following
from .family import Family, Findings, listed_family
from .graph import BlockGraph
from .hidden import find_hidden
from .meta_kernels import operands
from .on_meta import on_meta, shapes_kept, to_meta
from .recording import Recording, record
from .soundness import State, arguments_of, changed_state, kept_values, owners, problems, state_of, stub_fault
from .trace import graph_of

Place = tuple[int, str]  # position and keyword in a forward
Prepare = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]

_TIMESTEPS = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level", "r")  # its usual names
_LEAST = 0.2  # share of the work that must be in blocks: else splitting brings nothing
_MOST_FAULTS = 8  # how many modules are left to every rank because others look into them


def discover(
    skeleton: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    entry: str = "forward",
    places: tuple[Place, Place] | None = None,
    prepare: Prepare | None = None,
    tracing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    avoid: Collection[str] = (),
) -> tuple[Family, BlockGraph]:
    """Find the family of ``skeleton``, which is on meta, and its block graph for this call.

    Args:
        args, kwargs: of the call. Of its tensors, only small ones with values are looked into.
        entry: the method that is called.
        places: of sample and timestep, where they are known.
        prepare, tracing: as ``trace_inputs`` and ``tracing`` of :class:`~.family.Family`.
        avoid: modules that are to be no blocks, as other calls run them more than once.

    Raises:
        UnsupportedModelError: it cannot be split, or not without changing what it computes; says why.

    A network that is in no list, with its arguments in an unusual order:

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    ...     def forward(self, prompt, t, latent):
    ...         for layer in self.layers:
    ...             latent = latent + layer(latent) * t + prompt
    ...         return latent
    >>> family, graph = discover(Net().to("meta"), (torch.empty(1, 8), 0.5, torch.empty(1, 4, 8)), {})
    >>> graph.names, family.sample, family.timestep
    (('layers.0', 'layers.1', 'layers.2', 'layers.3'), (2, 'latent'), (1, 't'))
    """
    with tracing():
        family, graph = _Discovery(skeleton, args, kwargs, entry, prepare, avoid).family(places)
    return replace(family, tracing=tracing), graph


def family_of(skeleton: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Family:
    """Return the family that lists the class of ``skeleton``, which is on meta; or what :func:`discover` finds for this call.

    Raises:
        UnsupportedModelError: none lists it, and it cannot be split.
    """
    return listed_family(skeleton) or discover(skeleton, args, kwargs)[0]


class _Discovery:
    """One network, and one call of it."""

    def __init__(
        self,
        skeleton: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        entry: str,
        prepare: Prepare | None,
        avoid: Collection[str],
    ) -> None:
        self._skeleton, self._call, self._entry, self._prepare = skeleton, (args, kwargs), entry, prepare
        self._name, self._avoid = type(skeleton).__name__, frozenset(avoid)
        self._given: list[Any] = []  # the leaves of the call's arguments, on meta, as they were recorded last
        self._keep_shape: tuple[str, ...] = ()

    def family(self, places: tuple[Place, Place] | None) -> tuple[Family, BlockGraph]:
        """Find it, and the graph; see :func:`discover`."""
        while True:
            working = meta_copy(self._skeleton)  # a call may leave something in it
            before = state_of(working)
            try:
                recording = self._record(working)
                break
            except UnsupportedModelError as error:
                if not self._look_past(error, working):
                    raise
        given, (args, kwargs) = self._given, recording.root.arguments
        sample, timestep = places or find_places(getattr(type(working), self._entry), args, kwargs, recording)
        samples = operands([sample_of(args, kwargs, sample)])
        chosen = self._runnable(recording, samples)
        if len(chosen.names) < 2:
            raise UnsupportedModelError(f"{self._name} has no parts with a notable share of its work that run once per call")
        blocks = tuple(f"{name}." for name in chosen.names)
        if outside := [name for name in self._keep_shape if not f"{name}.".startswith(blocks)]:
            raise UnsupportedModelError(f"{self._name} takes its path by values, in {outside[0]}")
        covered = sum(call.macs for call in chosen.calls) / max(1, recording.root.macs)
        if covered < _LEAST:
            raise UnsupportedModelError(f"{self._name} has only {covered:.0%} of its work in parts that run once per call")
        self._refuse(problems(recording, chosen))
        if (after := state_of(working)) != before:
            self._call_again(working, recording, chosen, after)
        family = Family(
            name=self._name,
            block_names=lambda _: list(chosen.names),
            timestep=timestep,
            trace_inputs=self._prepare,
            sample=sample,
            hidden=find_hidden(recording, chosen, following(recording.operations, samples)),
            entry=self._entry,
            keep_shape=self._keep_shape,
            found=Findings(covered, bool(recording.decisive)),
        )
        return family, graph_of(recording, chosen.names, family, given)

    def _record(self, module: nn.Module) -> Recording:
        (args, kwargs), known = to_meta(self._call)
        self._given = flatten((args, kwargs))[0]
        if self._prepare is not None:
            args, kwargs = self._prepare(args, kwargs)
        before = arguments_of(args, kwargs)
        inside = [name for name in self._keep_shape if _has(module, name)]  # not those in stubs
        with on_meta(known) as values, shapes_kept(module, inside):
            recording = record(module, args, kwargs, values, self._entry)
        if arguments_of(args, kwargs) != before:
            raise UnsupportedModelError(f"{self._name} changes its own arguments, which other ranks would not see")
        return recording

    def _look_past(self, error: UnsupportedModelError, working: nn.Module) -> bool:
        """Take it that modules of the class that an error is from keep their largest argument's shape; whether that is new."""
        names, found = {id(module): name for name, module in working.named_modules()}, ""
        trace = error.__cause__.__traceback__ if error.__cause__ is not None else None
        while trace is not None:
            frame = trace.tb_frame
            if frame.f_code.co_name == "forward":
                found = names.get(id(frame.f_locals.get("self"))) or found
            trace = trace.tb_next
        if not found or found in self._keep_shape:
            return False
        kind = type(working.get_submodule(found))
        self._keep_shape += tuple(name for name, module in working.named_modules() if type(module) is kind)
        return True

    def _runnable(self, recording: Recording, samples: Sequence[torch.Tensor]) -> Chosen:
        """Choose blocks such that the rest of the network runs without their weights."""
        avoid = set(self._avoid)
        while True:
            chosen = choose(recording, samples, avoid)
            if looked_at := set(_looked_at(recording, chosen)):
                avoid |= looked_at
                continue
            fault = stub_fault(self._skeleton, chosen, self._record) if chosen.names else None
            if fault is None:
                return chosen
            block, error = fault
            if block is None or len(avoid - self._avoid) >= _MOST_FAULTS:
                raise UnsupportedModelError(f"{self._name} does not run without the weights of its parts ({error})")
            avoid.add(block)

    def _call_again(self, working: nn.Module, recording: Recording, chosen: Chosen, state: State) -> None:
        """Look whether a second call depends on what the first one has left in the network."""
        try:
            again = self._record(working)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self._name} looks at what the call before has kept ({error})") from error
        self._refuse(changed_state(state, state_of(working)))
        self._refuse(kept_values(recording, again, chosen))
        if [call.name for call in again.calls] != [call.name for call in recording.calls]:
            raise UnsupportedModelError(f"{self._name} takes another path in its second call than in the first")

    def _refuse(self, found: Iterable[str]) -> None:
        if texts := list(dict.fromkeys(found)):
            raise UnsupportedModelError(f"{self._name}: {'; '.join(texts[:3])}")


def find_places(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], recording: Recording
) -> tuple[Place, Place]:
    """Find where a forward, with these arguments, takes the sample and the timestep.

    The sample is the first argument that has the shape of the result, or, failing that, the first tensor; the timestep has one of
    its usual names, or is the first number or tensor of one dimension.
    """
    names = [parameter.name for parameter in inspect.signature(forward).parameters.values()][1:]
    given = {(position, names[position] if position < len(names) else ""): value for position, value in enumerate(args)}
    given |= {(names.index(name) if name in names else len(names), name): value for name, value in kwargs.items()}
    shapes = [leaf.shape for leaf in recording.root.returned if isinstance(leaf, torch.Tensor)]
    tensors = {place: leaves for place, value in given.items() if (leaves := _floats(value))}
    alike = [place for place, leaves in tensors.items() if [leaf.shape for leaf in leaves] == shapes]
    if not tensors:
        raise UnsupportedModelError("this call has no tensor that could be the sample")
    sample = (alike or list(tensors))[0]
    others = {place: value for place, value in given.items() if place != sample}
    named = [place for place in others if place[1] in _TIMESTEPS]
    numbers = [place for place, value in others.items() if _is_number(value)]
    if not named + numbers:
        raise UnsupportedModelError("this call has no number that could be the timestep")
    return sample, (named + numbers)[0]


def _looked_at(recording: Recording, chosen: Chosen) -> Iterable[str]:
    """Yield the blocks whose weights are used outside of them."""
    owner = owners(recording, chosen)
    home = {index: call.name for call in chosen.calls for index in range(call.begins, call.ends)}
    for index, operation in enumerate(recording.operations):
        for tensor in operation.reads:
            block = owner.get(id(tensor))
            if block not in (None, home.get(index)):
                yield block


def _floats(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in operands([value]) if leaf.is_floating_point() and leaf.ndim > 1]


def _is_number(value: Any) -> bool:
    leaves = flatten(value)[0]
    numbers = [leaf.ndim < 2 if isinstance(leaf, torch.Tensor) else type(leaf) in (int, float) for leaf in leaves]
    return bool(numbers) and all(numbers)


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True
