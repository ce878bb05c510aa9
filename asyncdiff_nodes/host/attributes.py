"""Attributes of other people's objects, changed for a while."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner`` with ``value`` in place of what its class, or somebody else, has under ``name``."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


@contextlib.contextmanager
def without(owner: Any, name: str) -> Iterator[None]:
    """``owner`` with what its class has under ``name``."""
    value = vars(owner).pop(name)
    try:
        yield
    finally:
        setattr(owner, name, value)


@contextlib.contextmanager
def layers_with_weights() -> Iterator[None]:
    """While the host's layers are built: with weights, where its linear ones are otherwise without until their file is read.

    That is so with dynamic VRAM, the default on NVIDIA cards.
    """
    memory = sys.modules.get("comfy.memory_management")  # not in 0.3
    with contextlib.nullcontext() if memory is None else replaced(memory, "aimdo_enabled", False):
        yield
