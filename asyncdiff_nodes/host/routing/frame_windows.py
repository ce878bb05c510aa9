"""Windows of frames: each is a stream of its own, and some nodes move them from step to step."""

from __future__ import annotations

from collections.abc import Hashable


class Windows:
    """The streams of a sampling's windows that were called recently.

    Attributes:
        turn: number of timesteps so far, including the current one.
    """

    def __init__(self) -> None:
        self._timestep: float | None = None
        self.turn = 0
        self._streams: dict[Hashable, tuple[int, int]] = {}  # -> first and last turn

    def stream(self, stream: Hashable, timestep: float) -> tuple[Hashable, list[Hashable]]:
        """A name for ``stream``, and the names of streams that will not be called again.

        The name is new if the stream was not called at the timestep before. The ranks forget the streams that are gone, as the
        values of all of them would fill their memory.
        """
        gone = []
        if timestep != self._timestep:
            self._timestep, self.turn = timestep, self.turn + 1
            gone = [(name, first) for name, (first, last) in self._streams.items() if last < self.turn - 1]
            for name, _ in gone:
                del self._streams[name]
        first, _ = self._streams.get(stream, (self.turn, 0))
        self._streams[stream] = first, self.turn
        return (stream, first), gone
