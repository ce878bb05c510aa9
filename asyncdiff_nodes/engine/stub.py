"""Stale values: what a rank keeps of other segments, and the stubs that hand it to the model's own forward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
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


class Inbox:
    """The values of one producer block on one rank, in one stream: on their way, and the latest that arrived.

    A value is a tuple of tensors, the leaves of the block's output. It was computed for some call, not always the one that it
    was sent in.

    Args:
        depth: how many values to keep, if more than two.
    """

    def __init__(self, depth: int) -> None:
        self._expected: deque[tuple[int, Callable[[], tuple[torch.Tensor, ...]]]] = deque()
        self._history: deque[tuple[int, tuple[torch.Tensor, ...]]] = deque(maxlen=max(2, depth))

    def expect(self, call: int, arrival: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        """Note that a value, computed for ``call``, is on its way; ``arrival`` waits for it."""
        self._expected.append((call, arrival))

    def settle(self, leave: int = 0) -> None:
        """Wait until at most ``leave`` values are still on their way."""
        while len(self._expected) > leave:
            call, arrival = self._expected.popleft()
            self._history.append((call, arrival()))

    def current(self) -> tuple[torch.Tensor, ...]:
        """This call's value (a synchronous call). Copies, since a model's forward may change what it is given."""
        self.settle()
        return tuple(leaf.clone() for leaf in self._history[-1][1])

    def stale(self, call: int | None) -> tuple[torch.Tensor, ...]:
        """What stands in for the value for ``call``, from those that were sent before this call (an asynchronous one).

        None asks for the latest as it is.
        """
        self.settle(leave=1)
        if call is None:
            return tuple(leaf.clone() for leaf in self._history[-1][1])
        columns = zip(*(leaves for _, leaves in self._history), strict=True)
        calls = [at for at, _ in self._history]
        return tuple(value_for(call, dict(zip(calls, column, strict=True))) for column in columns)

    def drift(self) -> torch.Tensor | None:
        """Relative L2 change between the last two values that arrived; None before the second, or of a block left out."""
        if len(self._history) < 2 or not self._history[-1][1]:
            return None
        (_, old), (_, new) = list(self._history)[-2:]
        change = sum((b.float() - a.float()).square().sum() for a, b in zip(old, new, strict=True))
        return (change / sum(a.float().square().sum() for a in old).clamp_min(1e-30)).sqrt()


def make_stub(block: nn.Module, fetch: Callable[[], Any]) -> None:
    """Make a stub of ``block``, which another rank owns: it hands back what ``fetch`` returns, whatever its arguments.

    It loses its weights and children but keeps its class, since a model's forward may choose arguments by class.
    """
    for members in (block._parameters, block._buffers, block._modules):
        members.clear()
    block.forward = lambda *args, **kwargs: fetch()
