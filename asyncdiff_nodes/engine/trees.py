"""Nested arguments and results as a list of leaves and a structure that pickles.

torch's pytree does the work, but for tuples, lists and dicts, which calls are made of: for these it takes as long as all else
that a call needs. Its ``TreeSpec`` objects are not sent between processes, since their form is not stable. ``None`` is part of
the structure: a block may return it in place of a tensor (SD 3's last one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.utils._pytree import tree_flatten, tree_is_leaf, tree_map, tree_unflatten


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves of ``tree``, and the same tree with each leaf replaced by its position."""
    leaves: list[Any] = []
    return leaves, _rebuilt(tree, partial(_placed, leaves))


def _placed(leaves: list[Any], node: Any) -> Any:
    """The structure of what is not taken apart here; its leaves are added to ``leaves``."""
    if tree_is_leaf(node):
        leaves.append(node)
        return len(leaves) - 1
    found, spec = tree_flatten(node)
    return tree_unflatten([None if leaf is None else _placed(leaves, leaf) for leaf in found], spec)


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """The tree that :func:`flatten` took apart, with other leaves."""

    def leaf(node: Any) -> Any:
        if type(node) is int:
            return leaves[node]
        return tree_map(lambda place: None if place is None else leaves[place], node)

    return _rebuilt(structure, leaf)


def _rebuilt(tree: Any, other: Callable[[Any], Any]) -> Any:
    """``tree`` with ``other(node)`` in place of what is neither None nor a tuple, a list or a dict."""
    kind = type(tree)
    if tree is None:
        return None
    if kind is tuple or kind is list:
        return kind([_rebuilt(item, other) for item in tree])
    if kind is dict:
        return {key: _rebuilt(item, other) for key, item in tree.items()}
    return other(tree)
