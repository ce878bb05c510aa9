"""A model's skeleton as bytes that a rank makes it of again."""

from __future__ import annotations

import pickle
from collections.abc import Callable

from torch import nn

from asyncdiff_nodes.engine.errors import UnsupportedModelError


def pickled(skeleton: nn.Module, build: Callable[[], nn.Module] | None) -> bytes:
    """Pickle the skeleton; or, if a rank could not unpickle that, what builds it."""
    try:
        if build is None or all(map(_can_be_imported, map(type, skeleton.modules()))):
            return pickle.dumps(skeleton, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        if build is None:
            raise UnsupportedModelError(
                f"this {type(skeleton).__name__} cannot be sent to a worker process ({error}); "
                "its classes must be importable from a module, and it must hold no lambdas or hooks"
            ) from error
    return _pickled_build(build, type(skeleton).__name__)


def _pickled_build(build: Callable[[], nn.Module], name: str) -> bytes:
    try:
        return pickle.dumps(build, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise UnsupportedModelError(
            f"neither this {name} nor what builds it can be sent to a worker process ({error})"
        ) from error


def _can_be_imported(cls: type) -> bool:
    """Whether the name of a class's module is one that can be imported; programs may load files under other names."""
    return all(part.isidentifier() for part in cls.__module__.split("."))
