"""Stale values: what a rank keeps of other segments, and the stubs that hand it to the model's own forward."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


def value_for(call: int, history: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """A new tensor: the value for ``call``, given those computed for other calls.

    What was computed for it, if that is known; otherwise on the straight line through the two nearest, or the only one as it is.
    """
    if call in history or len(history) == 1:
        return history[call if call in history else next(iter(history))].clone()
    near, far = sorted(history, key=lambda other: abs(other - call))[:2]
    return history[near] + (history[near] - history[far]) * ((call - near) / (near - far))


def shift(leaf: torch.Tensor, states: torch.Tensor, sign: int) -> None:
    """Add hidden ``states`` [B, T, ...] to the last T tokens of ``leaf``, or, with the sign -1, take them away."""
    leaf[:, leaf.shape[1] - states.shape[1] :].add_(states, alpha=sign)


class Inbox:
    """The values of one producer block on one rank, in one stream: on their way, and the latest that arrived.

    A value is a tuple of tensors, the leaves of the block's output. It was computed for some call, not always the one that it
    was sent in, and is whole or a *change*: without the hidden states that it was made of.

    Args:
        depth: how many values to keep, if more than two.
    """

    def __init__(self, depth: int) -> None:
        self._expected: deque[tuple[int, bool, Callable[[], tuple[torch.Tensor, ...]]]] = deque()
        self._history: deque[tuple[int, bool, tuple[torch.Tensor, ...]]] = deque(maxlen=max(2, depth))

    def expect(self, call: int, arrival: Callable[[], tuple[torch.Tensor, ...]], change: bool = False) -> None:
        """Note that a value, computed for ``call``, is on its way; ``arrival`` waits for it."""
        self._expected.append((call, change, arrival))

    def settle(self, leave: int = 0) -> None:
        """Wait until at most ``leave`` values are still on their way."""
        while len(self._expected) > leave:
            call, change, arrival = self._expected.popleft()
            self._history.append((call, change, arrival()))

    @property
    def change(self) -> bool:
        """Whether the latest value is a change."""
        return self._history[-1][1]

    def current(self) -> tuple[torch.Tensor, ...]:
        """This call's value (a synchronous call). Copies, since a model's forward may change what it is given."""
        self.settle()
        return tuple(leaf.clone() for leaf in self._history[-1][2])

    def stale(self, call: int | None) -> tuple[torch.Tensor, ...]:
        """What stands in for the value for ``call``, from those that were sent before this call (an asynchronous one).

        None asks for the latest as it is.
        """
        self.settle(leave=1)
        if call is None:
            return tuple(leaf.clone() for leaf in self._history[-1][2])
        calls, values = zip(*((at, leaves) for at, change, leaves in self._history if change == self.change), strict=True)
        return tuple(value_for(call, dict(zip(calls, column, strict=True))) for column in zip(*values, strict=True))

    def norms(self) -> list[torch.Tensor]:
        """L2 norms of how the latest value's leaves differ from those before, and of these; none if they are of two kinds."""
        if len(self._history) < 2:
            return []
        (_, kind, old), (_, latest, new) = self._history[-2], self._history[-1]
        if kind != latest:
            return []
        return [*(_norm(b - a) for a, b in zip(old, new, strict=True)), *map(_norm, old)]


def _norm(value: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(value, dtype=torch.float32)


def drift(norms: Sequence[float]) -> float:
    """Relative L2 difference of two values; see :meth:`Inbox.norms`."""
    leaves = len(norms) // 2
    return math.hypot(*norms[:leaves]) / max(math.hypot(*norms[leaves:]), 1e-15)


def make_stub(block: nn.Module, fetch: Callable[[], Any]) -> None:
    """Make a stub of ``block``, which another rank owns: it hands back what ``fetch`` returns, whatever its arguments.

    It loses its weights and children but keeps its class, since a model's forward may choose arguments by class.
    """
    for members in (block._parameters, block._buffers, block._modules):
        members.clear()
    block.forward = lambda *args, **kwargs: fetch()
