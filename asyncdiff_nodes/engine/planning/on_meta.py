"""A forward on the meta device: what it needs to run there as it does on devices, and why it cannot."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from asyncdiff_nodes.engine.errors import UnsupportedModelError

from .known_values import KnownValues
from .meta_kernels import operands

_NO_META_KERNEL = re.compile(  # in PyTorch's words: for its own operators, and for those of others
    r"(\w+::\w+): attempted to run this operator with Meta|no fake impl registered for <CustomOpDef\((\S+)\)>"
)


def to_meta(tree: Any) -> tuple[Any, dict[torch.Tensor, torch.Tensor]]:
    """Replace the tensors of ``tree`` by others on meta; returns it, and which of these stands for which tensor with values."""
    known: dict[torch.Tensor, torch.Tensor] = {}

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        meta = torch.empty_like(leaf, device="meta")
        if not leaf.is_meta:
            known[meta] = leaf
        return meta

    return tree_map(moved, tree), known


@contextlib.contextmanager
def shapes_kept(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """While this lasts, the modules ``names`` of ``module`` return something like their largest argument, and look at no values.

    Mixtures of experts do, since tokens are sorted by what they say. They count as if each token passed all of their weights.
    """
    changed = [module.get_submodule(name) for name in names]
    for child in changed:
        numel = sum(parameter.numel() for parameter in child.parameters())
        child.forward = functools.partial(_like_largest, numel)
    try:
        yield
    finally:
        for child in changed:
            del child.forward


def _like_largest(numel: int, *args: Any, **kwargs: Any) -> torch.Tensor:
    largest = max(operands((args, kwargs.values())), key=torch.Tensor.numel)
    rows, column = largest.new_empty(largest.numel() // largest.shape[-1], 1), largest.new_empty(1, numel)
    rows @ column  # is counted
    return torch.empty_like(largest)


@contextlib.contextmanager
def on_meta(known: Mapping[torch.Tensor, torch.Tensor]) -> Iterator[KnownValues]:
    """Run a forward on meta while this lasts. What is entered within sees operations earlier.

    Args:
        known: see :func:`to_meta`.

    Raises:
        UnsupportedModelError: it needs values that do not follow from its small inputs, or an operator that does not run on meta.
    """
    try:
        with torch.no_grad(), KnownValues(known) as values:
            yield values
    except (NotImplementedError, RuntimeError) as error:
        if missing := _NO_META_KERNEL.search(str(error)):
            raise UnsupportedModelError(
                f"it uses {missing[1] or missing[2]}, an operator of which PyTorch cannot tell the result's shape without "
                "computing it (it has no meta kernel). The model may be split where another one does its work"
            ) from error
        if "meta" not in str(error).lower():
            raise
        raise UnsupportedModelError(f"with these inputs its forward depends on values, not shapes alone ({error})") from error
