"""Nested arguments and results as a list of leaves and a structure that pickles.

torch's pytree does the work, but for tuples, lists and dicts, which calls are made of: for these it takes as long as all else
that a call needs. Its ``TreeSpec`` objects are not sent between processes, since their form is not stable. ``None`` is part of
the structure: a block may return it in place of a tensor (SD 3's last one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_LEAVES = (torch.Tensor, int, float, str)  # what most leaves are


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Take ``tree`` apart: its leaves, and the same tree with each leaf replaced by its position.

    >>> flatten((1.5, {"context": "a prompt", "control": None}))
    ([1.5, 'a prompt'], (0, {'context': 1, 'control': None}))
    """
    leaves: list[Any] = []
    return leaves, _rebuilt(tree, partial(_placed, leaves))


def _placed(leaves: list[Any], node: Any) -> Any:
    """Add the leaves of what is not taken apart here to ``leaves``, and return its structure."""
    if not isinstance(node, _LEAVES):
        parts, spec = tree_flatten(node)
        if len(parts) != 1 or parts[0] is not node:
            return tree_unflatten([None if part is None else _placed(leaves, part) for part in parts], spec)
    leaves.append(node)
    return len(leaves) - 1


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """Put the tree together again that :func:`flatten` took apart, with other leaves.

    >>> unflatten(["x", "y"], (0, {"context": 1, "control": None}))
    ('x', {'context': 'y', 'control': None})
    """

    def leaf(node: Any) -> Any:
        if type(node) is int:
            return leaves[node]
        return tree_map(lambda position: None if position is None else leaves[position], node)

    return _rebuilt(structure, leaf)


def _rebuilt(tree: Any, other: Callable[[Any], Any]) -> Any:
    """Make a tree like ``tree``, with ``other(node)`` in place of what is neither None nor a tuple, a list or a dict."""
    kind = type(tree)
    if tree is None:
        return None
    if kind is tuple or kind is list:
        return kind([_rebuilt(item, other) for item in tree])
    if kind is dict:
        return {key: _rebuilt(item, other) for key, item in tree.items()}
    return other(tree)
