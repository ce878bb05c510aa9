"""Change attributes of other people's objects for a while."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set ``name`` of ``owner`` to ``value`` for a while, in place of what its class or other code put there."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


@contextlib.contextmanager
def without(owner: Any, name: str) -> Iterator[None]:
    """Take ``name`` off ``owner`` for a while, so that the attribute of its class counts."""
    value = vars(owner).pop(name)
    try:
        yield
    finally:
        setattr(owner, name, value)


@contextlib.contextmanager
def layers_with_weights() -> Iterator[None]:
    """Have the host build its layers with weights.

    With dynamic VRAM, the default on NVIDIA cards, its linear layers have none until their file is read.
    """
    memory = sys.modules.get("comfy.memory_management")  # not in 0.3
    with contextlib.nullcontext() if memory is None else replaced(memory, "aimdo_enabled", False):
        yield
