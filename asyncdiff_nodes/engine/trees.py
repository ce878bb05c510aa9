"""Nested arguments and results as a list of leaves and a structure that pickles.

torch's pytree does the work, but for tuples, lists and dicts, which calls are made of: for these it takes as long as all else
that a call needs. Its ``TreeSpec`` objects are not sent between processes, since their form is not stable. ``None`` is part of
the structure: a block may return it in place of a tensor (SD 3's last one).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._pytree import tree_flatten, tree_is_leaf, tree_map, tree_unflatten


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves of ``tree``, and the same tree with each leaf replaced by its position."""
    leaves: list[Any] = []
    return leaves, _place(tree, leaves)


def _place(tree: Any, leaves: list[Any]) -> Any:
    """The structure of ``tree``, whose leaves are added to ``leaves``."""
    kind = type(tree)
    if tree is None:
        return None
    if kind is tuple or kind is list:
        return kind([_place(item, leaves) for item in tree])
    if kind is dict:
        return {key: _place(item, leaves) for key, item in tree.items()}
    if not tree_is_leaf(tree):
        found, spec = tree_flatten(tree)
        return tree_unflatten([_place(leaf, leaves) for leaf in found], spec)
    leaves.append(tree)
    return len(leaves) - 1


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """The tree that :func:`flatten` took apart, with other leaves."""
    kind = type(structure)
    if kind is int:
        return leaves[structure]
    if structure is None:
        return None
    if kind is tuple or kind is list:
        return kind([unflatten(leaves, item) for item in structure])
    if kind is dict:
        return {key: unflatten(leaves, item) for key, item in structure.items()}
    return tree_map(lambda place: None if place is None else leaves[place], structure)
