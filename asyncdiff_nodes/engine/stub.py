"""Modules as ranks have them: run by one of their methods, and with stubs for blocks that another rank computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def runner(module: nn.Module, entry: str) -> Callable[..., Any]:
    """Return what runs ``module`` by its method ``entry``: the module itself, with its hooks, where that is ``forward``."""
    return module if entry == "forward" else getattr(module, entry)


def make_stub(block: nn.Module, handed_back: Callable[[], Any]) -> None:
    """Make a stub of ``block``, which another rank owns: it returns what ``handed_back`` does, whatever its arguments.

    It loses its weights and children but keeps its class, since a model's forward may choose arguments by class.

    >>> block = nn.Linear(2, 2)
    >>> make_stub(block, lambda: "what its owner has sent")
    >>> block("anything"), list(block.parameters())
    ('what its owner has sent', [])
    """
    for members in (block._parameters, block._buffers, block._modules):
        members.clear()
    block.forward = lambda *args, **kwargs: handed_back()
