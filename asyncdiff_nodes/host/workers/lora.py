"""LoRA and other patches of weights as tensors and plain data, for weights that carry them along. Ranks import this too."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from comfy.weight_adapter import WeightAdapterBase

from asyncdiff_nodes.engine import UnsupportedModelError
from asyncdiff_nodes.engine.trees import flatten, unflatten

TENSOR = "patch"  # the names of their tensors begin with this
_ADAPTER = "adapter"


def take_apart(patches: Sequence[Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Take the host's patches of one weight apart: plain data, equal for patches that differ only in values, and tensors.

    Numbers such as a strength are among the tensors, in double precision, since they change from prompt to prompt.

    Raises:
        UnsupportedModelError: a patch is code, or of a class that is not the host's.
    """
    leaves, structure = flatten([_plain(*patch) for patch in patches])
    tensors, rest, numbers = {}, {}, []
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, float):
            numbers.append(place)
            leaf = torch.tensor(leaf, dtype=torch.float64)
        if isinstance(leaf, torch.Tensor):
            tensors[f"{TENSOR}{place}"] = leaf
        elif isinstance(leaf, str | int):
            rest[place] = leaf
        else:
            raise UnsupportedModelError(f"a patch on its quantised weights has a {type(leaf).__name__}, which a rank cannot get")
    return (structure, rest, numbers), tensors


def put_together(settings: Any, tensors: dict[str, torch.Tensor]) -> list[Any]:
    """Put the patches together that :func:`take_apart` took apart; ``tensors`` may have others too."""
    structure, rest, numbers = settings
    leaves = dict(rest)
    for name, tensor in tensors.items():
        if name.startswith(TENSOR):
            place = int(name.removeprefix(TENSOR))
            leaves[place] = tensor.item() if place in numbers else tensor
    return [_patch(*parts) for parts in unflatten([leaves[place] for place in range(len(leaves))], structure)]


def _plain(strength: float, value: Any, strength_model: float, offset: Any, function: Any) -> tuple[Any, ...]:
    if isinstance(value, WeightAdapterBase) and type(value).__module__.startswith("comfy."):
        value = (_ADAPTER, type(value).__module__, type(value).__qualname__, value.weights)
    return float(strength), value, float(strength_model), offset, function


def _patch(strength: float, value: Any, strength_model: float, offset: Any, function: Any) -> tuple[Any, ...]:
    if value[0] == _ADAPTER:
        _, module, name, weights = value
        value = getattr(importlib.import_module(module), name)(set(), weights)
    return strength, value, strength_model, offset, function
