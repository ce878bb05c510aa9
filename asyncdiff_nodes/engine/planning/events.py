"""A loop of events: processes wait for them, and each happens once, at some time."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Hashable, Iterable

Process = Generator[Hashable, float, None]  # yields events, is sent their times


class EventLoop:
    """Runs processes until all have ended.

    A process is a generator. It yields the event that it needs and is sent the time of it. The order in which processes are run
    does not matter as long as each of them only adds up times and takes the later of two.

    >>> loop = EventLoop()
    >>> def reader():
    ...     print("read at", 1.0 + (yield "written"))
    >>> def writer():
    ...     loop.happens("written", 2.0)
    ...     yield from ()
    >>> loop.run([reader(), writer()])
    read at 3.0
    """

    def __init__(self) -> None:
        self._times: dict[Hashable, float] = {}
        self._blocked: dict[Hashable, list[Process]] = {}
        self._ready: deque[tuple[Process, float | None]] = deque()

    def happens(self, event: Hashable, time: float) -> None:
        """Say when an event happens; those that wait for it go on."""
        self._times[event] = time
        self._ready.extend((process, time) for process in self._blocked.pop(event, ()))

    def run(self, processes: Iterable[Process]) -> None:
        """Run ``processes`` to their ends, all of whose events one of them must bring about."""
        self._ready.extend((process, None) for process in processes)
        while self._ready:
            process, time = self._ready.popleft()
            try:
                event = next(process) if time is None else process.send(time)
            except StopIteration:
                continue
            if event in self._times:
                self._ready.append((process, self._times[event]))
            else:
                self._blocked.setdefault(event, []).append(process)
        assert not self._blocked, f"nothing will ever bring about {list(self._blocked)}"
