"""Nested arguments and results as a list of leaves and a structure that pickles.

torch's pytree does the work; its ``TreeSpec`` objects are not sent between processes, since their form is not stable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves of ``tree``, and the same tree with each leaf replaced by its position."""
    leaves, spec = tree_flatten(tree)
    return leaves, tree_unflatten(range(len(leaves)), spec)


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """The tree that :func:`flatten` took apart, with other leaves."""
    return tree_map(leaves.__getitem__, structure)
