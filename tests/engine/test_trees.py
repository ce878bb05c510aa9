"""Arguments as leaves and a structure."""

import gc
import pickle
import weakref
from collections import OrderedDict, namedtuple

import pytest
import torch

from asyncdiff_nodes.engine.trees import flatten, unflatten

Pair = namedtuple("Pair", "first second")
X, Y = torch.zeros(2), torch.ones(3)
TREES = {
    "a leaf": X,
    "nothing": None,
    "a call": ((X, 5), {"context": Y, "control": None, "transformer_options": {"cond_or_uncond": [1, 0], "empty": {}}}),
    "what torch's pytree knows": ((Pair(X, None),), {"outer": OrderedDict(a=[Y, None, (X,)], b=True)}),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_tree_comes_back(tree):
    leaves, structure = flatten(tree)
    assert None not in [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
    assert repr(unflatten(leaves, pickle.loads(pickle.dumps(structure)))) == repr(tree)
    others = [f"leaf {i}" for i in range(len(leaves))]
    assert flatten(unflatten(others, structure)) == (others, structure)


def test_kinds_and_leaves_are_kept():
    leaves, structure = flatten(TREES["what torch's pytree knows"])
    assert [leaf is other for leaf, other in zip(leaves, (X, Y, X, True), strict=True)] == [True] * 4
    (pair,), kwargs = unflatten(leaves, structure)
    assert type(pair) is Pair and type(kwargs["outer"]) is OrderedDict and pair.first is X


def test_nothing_is_held_until_garbage_is_collected():
    """A call's tensors may be large, and on a GPU."""
    tensor = torch.zeros(2)
    gone = weakref.ref(tensor)
    gc.disable()
    try:
        leaves, structure = flatten(((tensor,), OrderedDict(a=[tensor])))
        unflatten(leaves, structure)
        del tensor, leaves
        assert gone() is None
    finally:
        gc.enable()
