"""Stale values: what a rank keeps of other segments, and the stubs that hand it to the model's own forward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def forecast(history: Sequence[torch.Tensor], calls: Sequence[int], target: int, order: int) -> torch.Tensor:
    """A new tensor: the value expected in call ``target``, from those of ``calls`` (oldest first).

    Order 0 repeats the last value; order 1 extrapolates the last two linearly, or repeats while there is only one.
    """
    if order == 0 or len(history) < 2:
        return history[-1].clone()
    return history[-1] + (history[-1] - history[-2]) * ((target - calls[-1]) / (calls[-1] - calls[-2]))


class Inbox:
    """The values of one producer block on one rank, in one stream: on their way, and the latest that arrived.

    A value is a tuple of tensors, the leaves of the block's output. It was computed for some call: with a stride, for another
    than the one that it was sent in.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._expected: deque[tuple[int, Callable[[], tuple[torch.Tensor, ...]]]] = deque()
        self._history: deque[tuple[torch.Tensor, ...]] = deque(maxlen=2)
        self._calls: deque[int] = deque(maxlen=2)  # that the values of the history were computed for

    def expect(self, call: int, arrival: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        """Note that a value, computed for ``call``, is on its way; ``arrival`` waits for it."""
        self._expected.append((call, arrival))

    def settle(self, leave: int = 0) -> None:
        """Wait until at most ``leave`` values are still on their way."""
        while len(self._expected) > leave:
            call, arrival = self._expected.popleft()
            self._history.append(arrival())
            self._calls.append(call)

    def current(self) -> tuple[torch.Tensor, ...]:
        """This call's value (a synchronous call). Copies, since a model's forward may change what it is given."""
        self.settle()
        return tuple(leaf.clone() for leaf in self._history[-1])

    def predicted(self, call: int) -> tuple[torch.Tensor, ...]:
        """What stands in for the value of ``call``, from those that were sent before this call (an asynchronous one)."""
        self.settle(leave=1)
        return tuple(forecast(leaves, self._calls, call, self._order) for leaves in zip(*self._history, strict=True))

    def drift(self) -> torch.Tensor | None:
        """Relative L2 change between the last two values that arrived; None before the second."""
        if len(self._history) < 2:
            return None
        old, new = self._history
        change = sum((b.float() - a.float()).square().sum() for a, b in zip(old, new, strict=True))
        return (change / sum(a.float().square().sum() for a in old).clamp_min(1e-30)).sqrt()


def make_stub(block: nn.Module, fetch: Callable[[], Any]) -> None:
    """Make a stub of ``block``, which another rank owns: it hands back what ``fetch`` returns, whatever its arguments.

    It loses its weights and children but keeps its class, since a model's forward may choose arguments by class.
    """
    for members in (block._parameters, block._buffers, block._modules):
        members.clear()
    block.forward = lambda *args, **kwargs: fetch()
