"""The same call for a picture of another height: what differs between the two is of rows or tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch.utils._pytree import tree_map

from asyncdiff_nodes.engine.batch import sample_of
from asyncdiff_nodes.engine.trees import flatten

from .rehearsal import sized

_TALLER = 64  # rows that the other picture has more: what resamplings divide by


def heights(sample: Any) -> Iterator[tuple[int, int]]:
    """Yield which dimension of a picture or a sequence could have how many more rows or tokens; some may be too many."""
    first = next(leaf for leaf in flatten(sample)[0] if isinstance(leaf, torch.Tensor))
    dims = (-2,) if first.ndim > 3 else (-2, -1)
    yield from ((dim, _TALLER) for dim in dims)
    yield from ((dim, -(first.shape[dim] // 2)) for dim in dims if first.shape[dim] > 1)


def grown(args: tuple[Any, ...], kwargs: dict[str, Any], place: tuple[int, str], dim: int, more: int) -> tuple[Any, Any]:
    """Make the same call for ``more`` rows of the sample at ``place``; all else that has its proportions grows with it."""
    sample = next(leaf for leaf in flatten(sample_of(args, kwargs, place))[0] if isinstance(leaf, torch.Tensor))
    height, width = sample.shape[dim], sample.shape[-1]

    def larger(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim < 2:
            return leaf
        if sample.ndim > 3:
            times = _times(leaf.shape[-2], height, leaf.shape[-1], width) if leaf.ndim > 2 else None
        else:
            times = Fraction(1) if leaf.shape[dim] == height else None
        return leaf if times is None else sized(leaf.to("meta"), dim, leaf.shape[dim] + int(more * times))

    made: tuple[Any, Any] = tree_map(larger, (args, kwargs))
    return made


def _times(rows: int, height: int, columns: int, width: int) -> Fraction | None:
    """Say how many times larger, or smaller, a picture is than another of its proportions, by a power of two.

    >>> _times(128, 64, 96, 48), _times(5, 9, 4, 8), _times(77, 64, 768, 48)
    (Fraction(2, 1), Fraction(1, 2), None)
    """
    for power in range(-6, 4):
        times = Fraction(2) ** power
        if rows == math.ceil(height * times) and columns == math.ceil(width * times):
            return times
    return None
