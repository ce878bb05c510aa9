"""What a rank keeps of another segment's blocks: values on their way, and old ones that stand in for new ones."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch

Value = tuple[torch.Tensor, ...]  # of a block: the leaves of its output
Arrival = Callable[[], Value]  # waits for a value


def value_for(call: int, history: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Make a new tensor: the value for ``call``, given those computed for other calls.

    What was computed for it, if that is known; otherwise on the straight line through the two nearest, or the only one as it is.
    Numbers that are no fractions, such as places of experts, have no line: the nearest stand in.

    >>> history = {1: torch.tensor(10.0), 2: torch.tensor(12.0)}
    >>> value_for(2, history), value_for(4, history), value_for(4, {1: torch.tensor(10.0)})
    (tensor(12.), tensor(16.), tensor(10.))
    >>> value_for(4, {1: torch.tensor(3), 2: torch.tensor(5)})
    tensor(5)
    """
    near, *rest = sorted(history, key=lambda other: abs(other - call))
    if near == call or not rest or not history[near].is_floating_point():
        return history[near].clone()
    far = rest[0]
    return torch.lerp(history[far], history[near], (call - far) / (near - far))  # in one kernel, with nothing beside the result


class Inbox:
    """The values of one producer block on one rank, in one stream: on their way, and the latest that arrived.

    A value was computed for some call, not always the one that it was sent in, and is whole or a *change*: without the hidden
    states that it was made of.

    Args:
        depth: how many values to keep, if more than two.

    Three values are sent, for calls 0 to 2. In call 2 the rank makes do with what was sent before it, and does not wait for the
    third one: the two that it has say what comes.

    >>> inbox = Inbox(depth=1)
    >>> for call, value in enumerate((10.0, 12.0, 15.0)):
    ...     inbox.expect(call, lambda value=value: (torch.tensor(value),))
    >>> inbox.stale(2), inbox.current()
    ((tensor(14.),), (tensor(15.),))
    """

    def __init__(self, depth: int) -> None:
        self._expected: deque[tuple[int, bool, Arrival]] = deque()
        self._history: deque[tuple[int, bool, Value]] = deque(maxlen=max(2, depth))

    def expect(self, call: int, arrival: Arrival, change: bool = False) -> None:
        """Note that a value, computed for ``call``, is on its way."""
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

    def current(self) -> Value:
        """Wait for this call's value (a synchronous call). Copies, since a model's forward may change what it is given."""
        self.settle()
        return tuple(leaf.clone() for leaf in self._history[-1][2])

    def stale(self, call: int | None) -> Value:
        """Make what stands in for the value for ``call``, from those that were sent before this call (an asynchronous one).

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
    norm: torch.Tensor = torch.linalg.vector_norm(value, dtype=torch.float32)
    return norm


def drift(norms: Sequence[float]) -> float:
    """Relative L2 difference of two values; see :meth:`Inbox.norms`.

    >>> drift([3.0, 4.0, 6.0, 8.0])  # two leaves changed by 3 and 4, from 6 and 8
    0.5
    """
    leaves = len(norms) // 2
    return math.hypot(*norms[:leaves]) / max(math.hypot(*norms[leaves:]), 1e-15)
