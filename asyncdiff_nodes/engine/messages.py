"""What the parent says to a rank in each computing call: named here, since both ends read it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from .bands import Bands
from .inputs import Packed
from .tensors import TensorMeta

Layout = tuple[tuple[TensorMeta, ...], Any]  # a block's output: its tensors, and the structure they make up


class Opening(NamedTuple):
    """First part of a stream's first message: what stays as it is in all of its calls.

    Attributes:
        structure, positional: as in :class:`~.inputs.Inputs`.
        layouts: output layouts of all blocks.
        bands: how calls of the stream are computed in bands, if any are.
    """

    structure: Any
    positional: bool
    layouts: tuple[Layout, ...]
    bands: Bands | None = None


class CallMessage(NamedTuple):  # which pickles without the names
    """One computing call, for one rank.

    Attributes:
        run, stream, index: which call of which stream.
        targets, reads: as in :class:`~.schedule.Call`; ``reads`` is this rank's.
        why: it is synchronous: "warm-up", "move", "cool-down", or "" where it is not.
        ahead: the call is no call of the caller's; see :func:`~.schedule.calls_ahead`.
        banded: all ranks of the branch compute it together, in bands.
        parts: of its batch, that the rank is to compute one after the other.
        compression: of the values that cross in it.
        timed: its record is to say how long each block took.
        checked: its record is to say which blocks NaN or infinity come from.
        leaves: as in :class:`~.inputs.Inputs`.
        timestep, timestep_structure: this rank's, as leaves and what they make up.
        opening: on a stream's first call only, and on the first one after a move.
        result: index of the call whose result this rank returns, or None.
    """

    run: int
    stream: Hashable
    index: int  # type: ignore[assignment]  # in place of a tuple's method, which nobody calls here
    synchronous: bool
    why: str
    computes: bool
    ahead: bool
    banded: bool
    parts: int
    compression: str
    timed: bool
    checked: bool
    targets: tuple[int, ...]
    reads: int | None
    leaves: tuple[Packed, ...]
    timestep: Sequence[Packed]
    timestep_structure: Any
    opening: Opening | None
    result: int | None

    @property
    def changes_cross(self) -> bool:
        """Whether changes of hidden states cross, not their values: those are for calls that are to be exact."""
        return self.ahead or not self.synchronous
