"""Times of a run: how long what takes in it, and when what happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncdiff_nodes.engine.errors import PlanError

from .schedule import Kind


def check_numbers(name: str, values: Sequence[float], count: int, zero: bool = False) -> None:
    """Refuse anything but ``count`` positive numbers.

    Args:
        name: what they are, for the message.
        zero: whether they may be zero.

    Raises:
        PlanError: the numbers are other ones.
    """
    if len(values) != count or not all(0 < value < float("inf") or (zero and value == 0) for value in values):
        raise PlanError(f"{name}: give {count} {'numbers from 0 on' if zero else 'positive numbers'}, not {list(values)}")


@dataclass(frozen=True)
class Link:
    """Link between any two ranks.

    Attributes:
        latency: seconds until the first byte is there; the link is free again before that.
        bandwidth: bytes per second.
        direct: it is NCCL's, whose transfers begin when both ends have computed their asynchronous call; see
            :mod:`asyncdiff_nodes.engine.rank.transport`.
    """

    latency: float = 0.0
    bandwidth: float = float("inf")
    direct: bool = False

    def __post_init__(self) -> None:
        check_numbers("latency", [self.latency], 1, zero=True)
        if not self.bandwidth > 0:
            raise PlanError(f"bandwidth={self.bandwidth}: give a positive number of bytes per second")


@dataclass(frozen=True)
class Costs:
    """Seconds of everything in a call, on a device of speed 1.

    Attributes:
        blocks: of each block, in execution order, for the batch that one rank computes.
        glue: of what every rank computes besides its blocks.
        bands: of a rank's part of a call that all ranks of a branch compute in bands, with all that it exchanges in it.
        link: between ranks.
        round_trip: from a result, on its rank, to the ranks' start with the next call, if the caller does nothing between.
        caller: what the caller does between two calls, such as the sampler's step.
    """

    blocks: tuple[float, ...]
    glue: float = 0.0
    bands: float = 0.0
    link: Link = Link()
    round_trip: float = 0.0
    caller: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        check_numbers("blocks", self.blocks, len(self.blocks), zero=True)
        for name in ("glue", "bands", "round_trip", "caller"):
            check_numbers(name, [getattr(self, name)], 1, zero=True)

    @property
    def unrouted(self) -> float:
        """Seconds of one call of the whole model on one device."""
        return sum(self.blocks) + self.glue


@dataclass(frozen=True)
class CallTimes:
    """One call, as the caller sees it, in seconds from the beginning of the run.

    Attributes:
        index: of the call in the run.
        start: when it was made.
        result: when its result was there.
    """

    index: int
    kind: Kind
    start: float
    result: float


@dataclass(frozen=True)
class RankTimes:
    """One rank over a run.

    Attributes:
        busy: seconds spent computing.
        waiting: seconds spent waiting, in a call, for values of other ranks and for its own to be taken.
        end: when it was done, in seconds from the beginning of the run.
    """

    rank: int
    busy: float
    waiting: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A run of one stream."""

    calls: tuple[CallTimes, ...]
    ranks: tuple[RankTimes, ...]

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, up to its last result."""
        return self.calls[-1].result

    def pace(self, first: int, last: int) -> float:
        """Seconds per call from the result of call ``first`` to that of call ``last``."""
        return (self.calls[last].result - self.calls[first].result) / (last - first)
