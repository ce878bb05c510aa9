"""A transformer's hidden states of the sample, found in what a forward did: which blocks add to them and hand them on."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from .choice import Chosen, depends
from .family import HiddenStates
from .recording import ModuleCall, Operation, Recording

_aten = torch.ops.aten
_ENTRIES = 4  # how many lists of blocks are tried
_LEAST = 0.3  # share of the blocks after the first one, in the same parts of the network, that must hand them on

Place = tuple[int, int]  # first token, number of tokens

_SAME = {_aten.clone, _aten.detach, _aten.alias, _aten._to_copy, _aten.lift_fresh, _aten.contiguous, _aten.nan_to_num}
_FAR = 60_000  # limits beyond that are those of half precision, which hidden states are far from
_VIEWS = {_aten.view, _aten._unsafe_view, _aten.reshape, _aten.expand}
_SUMS = {_aten.add, _aten.add_, _aten.sub, _aten.sub_, _aten.addcmul, _aten.addcmul_}
_PIECES = {_aten.split, _aten.split_with_sizes, _aten.chunk}


def find_hidden(recording: Recording, chosen: Chosen, sampled: set[int]) -> HiddenStates | None:
    """Find the hidden states that are handed on nearest to the result, and by most blocks; None if there are none.

    A block's argument [B, T, ...] that is made of the sample is followed through what is added to it, and through being joined
    with other tokens and cut out again.
    """
    best, most = None, (0, 0)
    for call, place, tensor in _entries(chosen, sampled):
        index = chosen.calls.index(call)
        after = chosen.calls[index:]
        carried = _carried(recording, call, tensor, after)
        lists, handing = _by_list(carried, tensor.shape[1])
        rank = (max(map(chosen.names.index, handing), default=0), len(handing))
        beside = [other for other in after if _part(other.name) in set(map(_part, handing))]
        if call.name.rpartition(".")[0] in lists and len(handing) > _LEAST * len(beside) and rank > most:
            best, most = HiddenStates(call.name, place, lists), rank
    return best


def _part(name: str) -> str:
    """Return the part of the network that a block is in."""
    return name.partition(".")[0]


def _entries(chosen: Chosen, sampled: set[int]) -> Iterator[tuple[ModuleCall, tuple[int, str], torch.Tensor]]:
    """Yield the first block of each list that takes a tensor [B, T, ...] made of the sample, and where."""
    seen: set[str] = set()
    for call in chosen.calls:
        prefix = call.name.rpartition(".")[0]
        if prefix in seen or len(seen) == _ENTRIES:
            continue
        for place, value in _arguments(call):
            tokens = (
                isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and value.ndim >= 3
                and value.shape[1:-1].numel() > 1
            )
            if tokens and id(value) in sampled and depends(call, sampled):
                seen.add(prefix)
                yield call, place, value


def _has_tokens(value: Any) -> bool:
    """Whether it is a floating-point tensor [B, T, ...] of several tokens; a picture's [B, 1, h, w, ...] has them behind T."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 3 and value.shape[1:-1].numel() > 1


def _arguments(call: ModuleCall) -> Iterator[tuple[tuple[int, str], Any]]:
    """Yield each argument of a block with its position and keyword."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p.name for p in inspect.signature(type(call.module).forward).parameters.values() if p.kind in kinds][1:]
    args, kwargs = call.arguments
    for position, value in enumerate(args):
        yield (position, parameters[position] if position < len(parameters) else f"argument {position}"), value
    for name, value in kwargs.items():
        yield (parameters.index(name) if name in parameters else len(parameters), name), value


def _carried(
    recording: Recording, first: ModuleCall, tensor: torch.Tensor, blocks: tuple[ModuleCall, ...]
) -> dict[str, tuple[int, Place, int]]:
    """Find which blocks hand ``tensor`` on: index among what they return, its place there, and how many tokens there are."""
    places, found = _Places(tensor), {}
    done = first.begins
    for call in blocks:
        places.follow(recording.operations[done : call.ends])
        done = call.ends
        for index, leaf in enumerate(call.returned):
            if (place := places.at.get(id(leaf))) is not None:
                found[call.name] = index, place, leaf.shape[1]
                break
    return found


def _by_list(carried: dict[str, tuple[int, Place, int]], length: int) -> tuple[dict[str, int], list[str]]:
    """Say for each list at which index its blocks hand the hidden states on as the last tokens; and which blocks do."""
    places: dict[str, list[tuple[int, bool]]] = defaultdict(list)
    for name, (index, (start, _), tokens) in carried.items():
        places[name.rpartition(".")[0]].append((index, start + length == tokens))
    lists = {
        prefix: Counter(index for index, _ in found).most_common(1)[0][0]
        for prefix, found in places.items()
        if all(last for _, last in found)
    }
    return lists, [name for name in carried if name.rpartition(".")[0] in lists]


class _Places:
    """Where the hidden states are: in which tensors they are a summand, and at which tokens.

    Attributes:
        at: id of a tensor -> the place in it.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.at: dict[int, Place] = {id(tensor): (0, tensor.shape[1])}
        self._stacked: dict[int, tuple[int, Place]] = {}

    def follow(self, operations: list[Operation]) -> None:
        """Follow them through these operations."""
        for operation in operations:
            if any(id(tensor) in self.at or id(tensor) in self._stacked for tensor in operation.reads):
                self._follow(operation)

    def _follow(self, operation: Operation) -> None:
        func, args, makes = operation.func._overloadpacket, operation.args, operation.makes
        first = operation.reads[0]
        place = self.at.get(id(first))
        if func in _SUMS:
            self._sum(operation, first, place)
        elif func is _aten.cat:
            self._joined(args[0], _dim(args, 1, makes[0].ndim), makes[0])
        elif func is _aten.stack:
            held = [piece for piece in args[0] if id(piece) in self.at]
            if len(held) == 1:
                self._stacked[id(makes[0])] = _dim(args, 1, makes[0].ndim), self.at[id(held[0])]
        elif func is _aten.sum and id(first) in self._stacked:
            dim, held_at = self._stacked[id(first)]
            if len(args) > 1 and [d % first.ndim for d in args[1]] == [dim]:
                self.at[id(makes[0])] = held_at
        elif func is _aten.copy_ and id(args[1]) in self.at and first.shape == args[1].shape:
            self.at[id(first)] = self.at[id(args[1])]  # such as x[:, :n] += what a ControlNet adds
        elif place is None:
            return
        elif (
            func in _SAME
            or (func is _aten.clamp and all(abs(limit) > _FAR for limit in args[1:3]))
            or (func in _VIEWS and makes[0].shape[:2] == first.shape[:2])
        ):
            self.at[id(makes[0])] = place
        elif func is _aten.slice:
            self._sliced(args, first, place, makes[0])
        elif func in _PIECES and _dim(args, 2, first.ndim) == 1:
            start = 0
            for piece in makes:
                self._cut(piece, place, start)
                start += piece.shape[1]
        elif any(written is first for written in operation.writes):
            del self.at[id(first)]

    def _sum(self, operation: Operation, first: torch.Tensor, place: Place | None) -> None:
        args, (made, *_) = operation.args, operation.makes
        other = args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else None
        also = None if other is None else self.at.get(id(other))
        plain = operation.func._overloadpacket is _aten.add and operation.kwargs.get("alpha", 1) == 1
        if place is not None and also is None and made.shape == first.shape:
            self.at[id(made)] = place
        elif also is not None and other is not None and place is None and plain and made.shape == other.shape:
            self.at[id(made)] = also
        elif made is first and place is not None:
            del self.at[id(first)]

    def _sliced(self, args: Any, first: torch.Tensor, place: Place, made: torch.Tensor) -> None:
        if _dim(args, 1, first.ndim) != 1:
            if made.shape == first.shape:
                self.at[id(made)] = place
        elif len(args) < 5 or args[4] == 1:
            start = args[2] if len(args) > 2 and args[2] is not None else 0
            self._cut(made, place, max(0, start + first.shape[1]) if start < 0 else start)

    def _cut(self, piece: torch.Tensor, place: Place, start: int) -> None:
        """Note the place in ``piece``, the tokens from ``start`` on, if all of it is there."""
        if start <= place[0] and place[0] + place[1] <= start + piece.shape[1]:
            self.at[id(piece)] = place[0] - start, place[1]

    def _joined(self, pieces: Any, dim: int, made: torch.Tensor) -> None:
        held = [piece for piece in pieces if id(piece) in self.at]
        if len(held) != 1 or dim != 1:
            return
        start = 0
        for piece in pieces:
            if piece is held[0]:
                first, count = self.at[id(piece)]
                self.at[id(made)] = start + first, count
            start += piece.shape[1]


def _dim(args: Any, position: int, ndim: int) -> int:
    """Return the dimension that an operation works on, the first one where none is given."""
    return (args[position] if len(args) > position else 0) % ndim
