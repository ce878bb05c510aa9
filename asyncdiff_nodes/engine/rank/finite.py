"""NaN and infinity: whether there are any, and where they begin."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine.trees import flatten


def is_finite(leaves: Iterable[Any]) -> bool:
    """Whether all floating-point tensors among ``leaves`` are without NaN and infinity."""
    floats = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
    # a sum is finite only if all of it is; where one is not, it may be too large
    return all(math.isfinite(leaf.sum(dtype=torch.float32)) or bool(leaf.isfinite().all()) for leaf in floats)


@contextlib.contextmanager
def origins(module: nn.Module, names: Iterable[str]) -> Iterator[list[str]]:
    """Note, while it lasts, those of the blocks ``names`` that make something that is not finite of what was, as they run."""
    makers: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in names:

            def look(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                if not is_finite(flatten(output)[0]) and is_finite(flatten((args, kwargs))[0]):
                    makers.append(name)

            stack.callback(module.get_submodule(name).register_forward_hook(look, with_kwargs=True).remove)
        yield makers
