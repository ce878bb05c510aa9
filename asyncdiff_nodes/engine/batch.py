"""A call's batch divided into parts that are computed apart from each other, and their results put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # (args, kwargs) of one call


def sample_of(args: tuple[Any, ...], kwargs: dict[str, Any], place: tuple[int, str]) -> Any:
    """Find the noisy sample among a call's arguments, at ``place``: (position, keyword); None if it is not there."""
    position, keyword = place
    return args[position] if len(args) > position else kwargs.get(keyword)


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any], place: tuple[int, str]) -> int:
    """Return how many items the sample at ``place`` has, which may be several tensors [B, ...].

    >>> batch_of(([torch.zeros(2, 4), torch.zeros(2, 8)], 0.5), {}, (0, "x"))
    2
    """
    return next(len(leaf) for leaf in tree_leaves(sample_of(args, kwargs, place)) if isinstance(leaf, torch.Tensor))


def divide(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, parts: int) -> list[Arguments]:
    """Divide a call into at most ``parts`` calls, each for a part of its ``batch`` items, as equal as can be.

    Tensors whose first dimension is the batch are divided (views), everything else goes to all parts.

    >>> first, second = divide((torch.tensor([1, 2]),), {"scale": 0.5}, batch=2, parts=2)
    >>> second
    ((tensor([2]),), {'scale': 0.5})
    """
    parts = min(parts, batch)

    def of(part: int) -> Any:
        def pick(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == batch:
                return leaf.tensor_split(parts)[part]
            return leaf

        return pick

    return [tree_map(of(part), (args, kwargs)) for part in range(parts)]


def concatenated(parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Put the leaves of a result [B, ...] together from those of its parts."""
    return [torch.cat(leaves) for leaves in zip(*parts, strict=True)] if len(parts) > 1 else list(parts[0])
