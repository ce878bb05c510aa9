"""Compare two networks: the live one, and the one rebuilt from it for the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine import UnsupportedModelError
from asyncdiff_nodes.engine.tensors import tensors_of
from asyncdiff_nodes.host.patches.foreign_code import functions_of


def compare(rebuilt: nn.Module, live: nn.Module, says: str, originals: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
    """Refuse a ``rebuilt`` network that is not the ``live`` one, with its ``originals`` (see :func:`~.weights.originals_of`).

    Args:
        says: where the rebuilt one comes from, for the message, such as "its file says".

    Raises:
        UnsupportedModelError: the layers, shapes of weights, code of layers, or numbers of attention heads differ.
    """
    for what, describe in (("layers", classes_of), ("weights", shapes_of), ("code", functions_of), ("attention heads", heads_of)):
        described = describe(live)
        if describe is shapes_of:
            described |= {name: tuple(tensor.shape) for name, tensor in originals.items()}
        refuse_others(live, what, says, describe(rebuilt), described)


def refuse_others(live: nn.Module, what: str, says: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise UnsupportedModelError if the dictionaries differ; its message names ``what`` they describe."""
    if changed := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        raise UnsupportedModelError(f"its {type(live).__name__} has other {what} than {says}: {', '.join(changed[:3])}")


def classes_of(module: nn.Module) -> dict[str, tuple[str, str]]:
    """Module and name of each layer's class, as a class made inside a function is a new one each time."""
    return {name: (type(child).__module__, type(child).__qualname__) for name, child in module.named_modules() if name}


def shapes_of(module: nn.Module) -> dict[str, Any]:
    """The shape of each weight."""
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(module)}


def heads_of(module: nn.Module) -> dict[str, Any]:
    """The number of heads of each attention, which no weight shows."""
    return {name: value for name, value in settings_of(module).items() if name.endswith(".heads")}


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Plain settings of each layer, such as numbers, but not those of the host's loader or of training."""
    kinds = bool | int | float | str | tuple | torch.dtype
    return {
        f"{name}.{attribute}": value
        for name, child in module.named_modules()
        for attribute, value in vars(child).items()
        if isinstance(value, kinds) and attribute != "training" and "comfy" not in attribute
    }
