"""Choice of the modules of an unknown network that are to be blocks, by what one forward of it did."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from asyncdiff_nodes.engine.tensors import tensors_of

from .provenance import blocks_of, made_of, memory_of
from .recording import ModuleCall, Operation, Recording

# shares of the network's multiply-accumulates and of its weights' bytes, up to which what is in no list is left to every rank
_MINOR_MACS, _MINOR_WEIGHTS = 0.005, 0.01
_LARGE = 0.25  # share of the multiply-accumulates of one module above which it is opened
_DEEP = 3  # items of a list for which a layer is opened
_WIDE = 0.2  # share of all blocks that may read one that does not depend on the sample
_CHEAP = 0.05  # share of the multiply-accumulates up to which it is computed by every rank instead


@dataclass(frozen=True)
class Chosen:
    """Blocks of a network, in execution order.

    Attributes:
        calls: of each block.
        edges: (producer, consumer) by index; the network's own result is the consumer after the last block.
    """

    calls: tuple[ModuleCall, ...]
    edges: frozenset[tuple[int, int]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return tuple(call.name for call in self.calls)


def choose(recording: Recording, sample: Iterable[torch.Tensor], avoid: Iterable[str] = ()) -> Chosen:
    """Choose blocks: modules that run once, hand on floating-point tensors alone, and are neither too large nor too small.

    Args:
        sample: the tensors among the inputs that are denoised.
        avoid: modules that cannot be one.

    The network is walked down from its root. A module is opened, so that what is within it are blocks, where it cannot be one
    itself, where it has more than a quarter of the work, or where most of its work is in a list of three or more alike items.
    What is small, or read by many blocks and not made of the sample, is no block: every rank computes it.
    """
    walk = _Walk(recording, frozenset(avoid))
    sampled = following(recording.operations, sample)
    kept = [call for call in walk.blocks if not walk.minor(call, sampled)]
    while True:
        chosen = _connected(recording, kept)
        readers = Counter(producer for producer, _ in chosen.edges)
        unread = {call.name for index, call in enumerate(kept) if not readers[index]}
        wide = {
            call.name
            for index, call in enumerate(kept)
            if readers[index] > max(2, _WIDE * len(kept)) and not depends(call, sampled) and walk.share(call) < _CHEAP
        }
        if not unread | wide:
            return chosen
        kept = [call for call in kept if call.name not in unread | wide]


def depends(call: ModuleCall, tainted: set[int]) -> bool:
    """Whether a module was given, or returned, one of the tensors with these ids."""
    return any(id(leaf) in tainted for leaf in (*call.given, *call.returned))


class _Walk:
    """The blocks that a network can have, at first sight."""

    def __init__(self, recording: Recording, avoid: frozenset[str]) -> None:
        self._root, self._avoid = recording.root, avoid
        self._times = Counter(call.name for call in recording.calls)
        self._alike = _lists(recording, self._times)
        self.blocks = list(self._within(self._root))
        self._weights = {call.name: _nbytes(call.module) for call in self.blocks}
        self._whole = max(1, _nbytes(self._root.module))
        self._groups: dict[str, list[ModuleCall]] = defaultdict(list)
        for call in self.blocks:
            self._groups[self._group(call)].append(call)

    def share(self, call: ModuleCall) -> float:
        """Return the share of the network's work."""
        return call.macs / max(1, self._root.macs)

    def minor(self, call: ModuleCall, sampled: set[int]) -> bool:
        """Whether a block, with the list that it is in, is too small to be worth it."""
        group = self._groups[self._group(call)]
        macs = sum(map(self.share, group))
        weights = sum(self._weights[other.name] for other in group) / self._whole
        if macs < _MINOR_MACS and weights < _MINOR_WEIGHTS:
            return True
        return not depends(call, sampled) and macs < 2 * _MINOR_MACS and weights < 2 * _MINOR_WEIGHTS

    def _group(self, call: ModuleCall) -> str:
        return call.name.rpartition(".")[0] if self._listed(call, 2) else call.name

    def _within(self, outer: ModuleCall) -> Iterator[ModuleCall]:
        for call in outer.children:
            if self._usable(call) and not self._opens(call):
                yield call
            else:
                yield from self._within(call)

    def _usable(self, call: ModuleCall) -> bool:
        tensors = [leaf for leaf in call.returned if isinstance(leaf, torch.Tensor)]
        hands_on = bool(tensors) and len(tensors) == len(call.returned) and all(leaf.is_floating_point() for leaf in tensors)
        return self._times[call.name] == 1 and hands_on and call.name not in self._avoid and _has_weights(call)

    def _opens(self, call: ModuleCall) -> bool:
        if not call.children:
            return False
        if self.share(call) > _LARGE and self._covered(call) > 0.9 * call.macs:
            return True
        return not self._listed(call, _DEEP) and call.macs > 0 and self._in_lists(call) > 0.5 * call.macs

    def _covered(self, call: ModuleCall) -> int:
        """Return the work of what could be a block within a module."""
        return sum(child.macs if self._usable(child) else self._covered(child) for child in call.children)

    def _in_lists(self, call: ModuleCall) -> int:
        """Return the work within a module of what is in its outermost lists."""
        return sum(
            child.macs
            if self._times[child.name] == 1 and self._listed(child, _DEEP) and _has_weights(child)
            else self._in_lists(child)
            for child in call.children
        )

    def _listed(self, call: ModuleCall, least: int) -> bool:
        """Whether it is in a list with ``least`` items of its class, itself included."""
        return self._alike[call.name.rpartition(".")[0], type(call.module)] >= least


def _lists(recording: Recording, times: Mapping[str, int]) -> Counter[tuple[str, type]]:
    """Count the modules that ran in each list, by its name and their class."""
    holders = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    root, found = recording.root.module, Counter[tuple[str, type]]()
    for name in times:
        parent = name.rpartition(".")[0]
        # what only holds others, and does not run itself, is as good as a list
        if isinstance(root.get_submodule(parent), holders) or (parent and parent not in times):
            found[parent, type(root.get_submodule(name))] += 1
    return found


def following(operations: Sequence[Operation], tensors: Iterable[torch.Tensor]) -> set[int]:
    """Find the ids of ``tensors``, and of what is made of them."""
    found, memory = {id(tensor) for tensor in tensors}, set[int]()
    for operation in operations:
        if any(id(tensor) in found or memory_of(tensor) in memory for tensor in operation.reads):
            found.update(map(id, operation.makes))
            memory.update(map(memory_of, operation.writes))
    return found


def _connected(recording: Recording, calls: Sequence[ModuleCall]) -> Chosen:
    """Find which of these blocks reads which."""
    looked_at, result, _ = made_of(recording, calls, ())
    edges = {(producer, index) for index, sources in enumerate([*looked_at, result]) for producer in blocks_of(sources)}
    return Chosen(tuple(calls), frozenset(edges))


def _has_weights(call: ModuleCall) -> bool:
    return next(call.module.parameters(), None) is not None


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for _, tensor in tensors_of(module))
