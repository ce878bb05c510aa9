"""Where bands are in what modules are given and return: which dimensions, which axes, and numbers that say where parts begin."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from asyncdiff_nodes.engine.bands import Axis
from asyncdiff_nodes.engine.trees import flatten

from .local_operations import varying
from .recording import ModuleCall, Operation

_cat = torch.ops.aten.cat


def divisible(call: ModuleCall, taller: ModuleCall) -> list[tuple[int, int, int]]:
    """Find the arguments of a module that have tokens or rows: their numbers, the one dimension of these, and how many."""
    given = (flatten(each.arguments)[0] for each in (call, taller))
    pairs = ((number, one, varying(one, other)) for number, one, other in tensor_pairs(*given))
    return [(number, dims[0], one.shape[dims[0]]) for number, one, dims in pairs if len(dims) == 1]


def tensor_pairs(leaves: Sequence[Any], others: Sequence[Any]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield the tensors among two equal lists of leaves, with their numbers."""
    for number, (one, other) in enumerate(zip(leaves, others, strict=True)):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            yield number, one, other


def flattened(shape: Sequence[int], dim: int, axis: Axis) -> dict[int, Axis]:
    """Find the axis of tokens that are the places of a tensor whose rows, on ``dim``, are divided: those of one frame together.

    >>> flattened((1, 3, 4, 2, 64), 2, Axis(((0, 2, 4),)))  # frames, rows, columns, channels
    {24: Axis(parts=((0, 4, 8), (0, 4, 8), (0, 4, 8)))}
    """
    if len(shape) < 4 or dim == len(shape) - 1:
        return {}
    inner = {math.prod(shape[dim + 1 : -1]), shape[dim + 1]}  # with or without the batch
    outer = {math.prod(shape[1:dim]), math.prod(shape[:dim])}
    return {
        frames * axis.length * columns: Axis((tuple(bound * columns for bound in axis.parts[0]),) * frames)
        for columns in inner
        for frames in outer
    }


def put_together(operations: Sequence[Operation], length: int, axes: Mapping[int, Axis]) -> Axis | None:
    """Find the axis of so many tokens that are some of these axes, and others, one after the other."""
    for operation in operations:
        if operation.func._overloadpacket is not _cat:
            continue
        dim = operation.args[1] if len(operation.args) > 1 else 0
        sizes = [piece.shape[dim] for piece in operation.args[0]]
        if sum(sizes) == length and any(size in axes for size in sizes):
            return Axis(tuple(part for size in sizes for part in (axes[size].parts if size in axes else ((0, size),))))
    return None


def chains(arguments: Any, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Find among a module's arguments lists of (begin, end, ...) that make up so many tokens.

    Yields:
        Numbers of the leaves that are borders, and the sizes of the parts.

    >>> list(chains((torch.empty(12), [(0, 3, "prompt"), (3, 12, "picture")]), 12))
    [([1, 2, 4, 5], [3, 9])]
    """
    leaves, structure = flatten(arguments)

    def walk(node: Any) -> Iterator[tuple[list[int], list[int]]]:
        if isinstance(node, dict):
            node = list(node.values())
        if not isinstance(node, list | tuple):
            return
        pairs = [item[:2] for item in node if isinstance(item, tuple) and len(item) > 1 and all(map(_is_int, item[:2]))]
        if pairs and len(pairs) == len(node):
            begins, ends = ([leaves[pair[side]] for pair in pairs] for side in (0, 1))
            if all(map(_is_int, (*begins, *ends))) and [*begins, length] == [0, *ends]:
                yield [number for pair in pairs for number in pair], [b - a for a, b in zip(begins, ends, strict=True)]
                return
        for item in node:
            yield from walk(item)

    yield from walk(structure)


def _is_int(value: Any) -> bool:
    return type(value) is int
