"""What a rank is told first: what it is, and all that it needs to be it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from asyncdiff_nodes.engine.bands import BandMode
from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.rendezvous import Rendezvous

from .links import RankLocation
from .share import Share


@dataclass(frozen=True)
class Boot:
    """First message to a rank.

    Attributes:
        locations, rendezvous: of all ranks of the group.
        skeleton: the pickled module tree on the meta device, or what makes it.
        compile: as of the group.
        prepare: called before the skeleton is unpickled.
        timestep, sample: position and keyword of each in a call.
        entry: the method of the model that a call is of.
        threads: intra-op threads of PyTorch.
        divide, banded: as in :class:`~.family.Family`.
        timeout: seconds until a link whose other end says nothing fails.
        staged: as of the group.
        replicated_bytes: bytes of the weights that every rank holds.
    """

    share: Share
    locations: tuple[RankLocation, ...]
    rendezvous: Rendezvous
    skeleton: bytes
    compile: Mapping[str, Any] | None
    prepare: Callable[[], None] | None
    threads: int
    timestep: tuple[int, str]
    sample: tuple[int, str]
    entry: str
    divide: Callable[[tuple[Any, ...], dict[str, Any], int, int], list[Arguments]]
    banded: Callable[[tuple[Any, ...], dict[str, Any], BandMode], Arguments] | None
    timeout: float
    staged: Collection[frozenset[str]]
    replicated_bytes: int
