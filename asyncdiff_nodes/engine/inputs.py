"""The arguments of one call: the timestep apart, the rest flat, and only what changed on its way to the ranks."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from . import accelerator
from .batch import sample_of
from .tensors import TensorMeta, copied, dense_on_cpu
from .trees import flatten, unflatten

_ALONE = 2**15  # elements up to which PyTorch works in the calling thread only

# ("same", None), ("value", object), ("tensor", index into a message's tensors), or ("unused", layout) of a tensor not needed;
# ("parameter", (number, index)) of one, without an index where the rank has it from an earlier run
Packed = tuple[str, Any]


class SentParameters:
    """Parameters that one rank has, by number. Both ends drop at each reset those that the run before it did not use."""

    def __init__(self) -> None:
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._used: set[int] = set()
        self._next = itertools.count()

    def number(self, parameter: nn.Parameter) -> tuple[int, bool]:
        """Return its number, and whether the rank has it. It will from now on."""
        known = parameter in self._numbers
        if not known:
            self._numbers[parameter] = next(self._next)
        self._used.add(self._numbers[parameter])
        return self._numbers[parameter], known

    def reset(self) -> None:
        """Begin a new run."""
        for parameter, number in list(self._numbers.items()):
            if number not in self._used:
                del self._numbers[parameter]
        self._used.clear()


@dataclass(frozen=True)
class Inputs:
    """Arguments as a list of leaves.

    Attributes:
        leaves, structure: of (args, kwargs) without the timestep; see :mod:`.trees`; a parameter is one, wherever it occurs.
        timestep: a number or a tensor, as the model's forward takes it.
        place: (position, keyword) of the timestep in the model's forward.
        positional: whether the timestep was passed by position.
        echoes: positions among ``leaves`` of the same tensor as the timestep, passed once more: of another part of the sample.
    """

    leaves: list[Any]
    structure: Any
    timestep: Any
    place: tuple[int, str]
    positional: bool
    echoes: tuple[int, ...] = ()

    @classmethod
    def take(cls, args: tuple[Any, ...], kwargs: dict[str, Any], place: tuple[int, str]) -> Inputs:
        """Take a call's arguments apart. Raises TypeError if there is no timestep."""
        position, keyword = place
        if len(args) > position:
            timestep, rest, positional = args[position], (args[:position] + args[position + 1 :], kwargs), True
        elif keyword in kwargs:
            others = {name: value for name, value in kwargs.items() if name != keyword}
            timestep, rest, positional = kwargs[keyword], (args, others), False
        else:
            raise TypeError(f"missing argument {keyword!r}: pass the timestep as the model's forward takes it")
        leaves, structure = _flat(rest)
        echoes = [index for index, leaf in enumerate(leaves) if leaf is timestep and isinstance(leaf, torch.Tensor)]
        return cls(leaves, structure, timestep, place, positional, tuple(echoes))

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` as they were."""
        return join(self.leaves, self.structure, self.timestep, self.place, self.positional)

    def positions(self, reads: frozenset[int]) -> frozenset[int]:
        """Find the positions among ``leaves`` of those at ``reads`` among the leaves of :meth:`arguments`."""
        read = {id(leaf) for position, leaf in enumerate(flatten(self.arguments())[0]) if position in reads}
        return frozenset(position for position, leaf in enumerate(self.leaves) if id(leaf) in read)

    def samples(self, place: tuple[int, str]) -> tuple[int, ...]:
        """Find the tensors at ``place``, (position, keyword), among ``leaves``: the sample. Raises TypeError if there is none."""
        values = [leaf for leaf in flatten(sample_of(*self.arguments(), place))[0] if isinstance(leaf, torch.Tensor)]
        if not values:
            raise TypeError(f"missing argument {place[1]!r}: pass the sample as the model's forward takes it")
        return tuple(position for position, leaf in enumerate(self.leaves) if any(leaf is value for value in values))

    @property
    def signature(self) -> tuple[Any, ...]:
        """Structure, shapes, dtypes and flags: what may not change within a run."""
        return (repr(self.structure), self.positional, tuple(map(_kind, self.leaves)))

    @property
    def integers(self) -> tuple[int, ...]:
        """Integers among the leaves, which may say where parts of the others begin and end, as shapes do."""
        return tuple(leaf for leaf in self.leaves if type(leaf) is int)

    @property
    def device(self) -> torch.device:
        """Device of the first tensor."""
        return next((leaf.device for leaf in self.leaves if isinstance(leaf, torch.Tensor)), torch.device("cpu"))

    def timestep_number(self) -> float:
        """Return the timestep as a number; the largest of several: of batch items, or of tokens, some of which may be at rest."""
        return max(float(leaf.max() if isinstance(leaf, torch.Tensor) else leaf) for leaf in flatten(self.timestep)[0])

    def timestep_like(self, value: float) -> Any:
        """Return ``value`` in the form of this call's timestep; where that has several, all in the same proportion."""
        largest = self.timestep_number()

        def like(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return type(leaf)(value if leaf == largest else leaf * (value / largest))
            if bool((leaf == largest).all()):
                return torch.full_like(leaf, value)
            return (leaf * (value / largest)).to(leaf.dtype)

        return _each(like, self.timestep)

    def pack(self, sent: list[Any] | None, always: Collection[int]) -> tuple[list[Packed], list[torch.Tensor], list[Any]]:
        """Pack what to send, given the leaves that the ranks have (``None``: nothing yet); those at ``always`` in any case.

        Returns:
            One :data:`Packed` per leaf, the tensors that these name (on the CPU, but for parameters), and the leaves that the
            ranks have afterwards (where the caller has them, so that unchanged ones are compared there and never copied).
        """
        packed: list[Packed] = []
        tensors: list[torch.Tensor] = []
        known: list[Any] = []
        for position, leaf in enumerate(self.leaves):
            if not isinstance(leaf, torch.Tensor):
                packed.append(("value", leaf))
                known.append(leaf)
                continue
            constant = isinstance(leaf, nn.Parameter)
            # others by value: a caller may build the same conditioning anew each step, or change a tensor in place
            same = operator.is_ if constant else _equal
            if sent is not None and position not in always and same(leaf, sent[position]):
                packed.append(("same", None))
                known.append(sent[position])
            else:
                packed.append(("tensor", len(tensors)))
                # a copy: the sending threads and the next comparison read it later
                known.append(leaf if constant else copied(leaf))
                tensors.append(known[-1])
        return packed, tensors, known


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare as ``torch.equal`` does tensors of one dtype, in this thread alone; see :func:`~.tensors.copied`."""
    return a.shape == b.shape and all(map(torch.equal, a.reshape(-1).split(_ALONE), b.reshape(-1).split(_ALONE)))


def on_cpu(calls: Sequence[Inputs]) -> list[Inputs]:
    """Copy all tensors but parameters to the CPU; a GPU is waited for once."""
    devices: set[torch.device] = set()

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, nn.Parameter) or leaf.is_cpu:
            return leaf
        devices.add(leaf.device)
        return leaf.to("cpu", non_blocking=True)

    copies = [replace(call, leaves=[*map(copy, call.leaves)], timestep=_each(copy, call.timestep)) for call in calls]
    for device in devices:
        accelerator.synchronize_stream(device)
    return copies


def _each(function: Callable[[Any], Any], tree: Any) -> Any:
    leaves, structure = flatten(tree)
    return unflatten([function(leaf) for leaf in leaves], structure)


def only(
    packed: list[Packed], tensors: list[torch.Tensor], needed: frozenset[int], parameters: SentParameters
) -> tuple[list[Packed], list[torch.Tensor]]:
    """Leave what a rank is to be sent that needs the tensors at ``needed`` only, and has ``parameters``."""
    kept: list[Packed] = []
    sent: list[torch.Tensor] = []
    for position, (kind, what) in enumerate(packed):
        if kind == "tensor" and position not in needed:
            kind, what = "unused", TensorMeta.of(tensors[what])
        elif kind == "tensor":
            tensor, what, known = tensors[what], len(sent), False
            if isinstance(tensor, nn.Parameter):
                number, known = parameters.number(tensor)
                kind, what = "parameter", (number, None if known else what)
            if not known:
                sent.append(dense_on_cpu(tensor))
        kept.append((kind, what))
    return kept, sent


def join(
    leaves: list[Any], structure: Any, timestep: Any, place: tuple[int, str], positional: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``(args, kwargs)`` with the timestep back in its place."""
    args, kwargs = unflatten(leaves, structure)
    position, keyword = place
    if positional:
        return (*args[:position], timestep, *args[position:]), kwargs
    return args, {**kwargs, keyword: timestep}


def difference(old: tuple[Any, ...], new: tuple[Any, ...]) -> str:
    """Say how two signatures differ, in words."""
    if old[:2] != new[:2]:
        return "other arguments"
    return next((f"{a} became {b}" for a, b in zip(old[2], new[2], strict=True) if a != b), "no difference")


def _flat(tree: Any) -> tuple[list[Any], Any]:
    """Flatten as :func:`~.trees.flatten`, with parameters that occur several times once."""
    leaves, structure = flatten(tree)
    kept: list[Any] = []
    places: list[int] = []
    first: dict[int, int] = {}
    for leaf in leaves:
        place = first.setdefault(id(leaf), len(kept)) if isinstance(leaf, nn.Parameter) else len(kept)
        if place == len(kept):
            kept.append(leaf)
        places.append(place)
    return kept, structure if len(kept) == len(leaves) else unflatten(places, structure)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype
    return leaf if isinstance(leaf, bool | str | type(None)) else type(leaf)
