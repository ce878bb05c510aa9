"""Nested arguments and results as a list of leaves and a structure that pickles.

torch's pytree does the work; its ``TreeSpec`` objects are not sent between processes, since their form is not stable. ``None``
is part of the structure: a block may return it in place of a tensor (SD 3's last one).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves of ``tree``, and the same tree with each leaf replaced by its position."""
    leaves, spec = tree_flatten(tree)
    places = itertools.count()
    structure = tree_unflatten([None if leaf is None else next(places) for leaf in leaves], spec)
    return [leaf for leaf in leaves if leaf is not None], structure


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """The tree that :func:`flatten` took apart, with other leaves."""
    return tree_map(lambda place: None if place is None else leaves[place], structure)
