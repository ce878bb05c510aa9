"""Where one stream is in its schedule: which call comes next, and on which input and timestep ranks compute for it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from asyncdiff_nodes.engine.errors import ScheduleError
from asyncdiff_nodes.engine.inputs import Inputs
from asyncdiff_nodes.engine.planning.lookahead import NoiseLevels, Outlooks
from asyncdiff_nodes.engine.planning.plan import Plan
from asyncdiff_nodes.engine.planning.schedule import Call, Kind, call_at, calls_ahead, in_bands
from asyncdiff_nodes.engine.trees import flatten

from .run import Run

TIMED = 3  # how many calls are to say how long each block took, of either kind


class Course:
    """The calls of one stream in one run, one after the other.

    The run's plan holds, but for two things: after a move of blocks the warm-up is longer, since all caches start over; and while
    inputs cannot be foreseen nobody works ahead.

    Args:
        stream: its name, for messages.
        inputs: of the first call.

    Raises:
        ScheduleError: the first call's timestep is none of the run's.

    A run of three calls with a warm-up of one, in which blocks move before the last call:

    >>> sample = torch.zeros(1, 4, 8, 8)
    >>> inputs = {t: Inputs.take((sample, t), {}, (1, "timestep")) for t in (900, 600, 300)}
    >>> course = Course("prompt", Run(1, Plan(warmup=1), timesteps=(900.0, 600.0, 300.0)), inputs[900])
    >>> for t in inputs:
    ...     if t == 300:
    ...         course.move()
    ...     call = course.next(inputs[t], [sample])
    ...     print((call.index, call.kind.value, course.why(call)))
    ...     course.made(call, inputs[t])
    (0, 'synchronous', 'warm-up')
    (1, 'asynchronous', '')
    (2, 'synchronous', 'move')
    """

    def __init__(self, stream: Hashable, run: Run, inputs: Inputs) -> None:
        self._run = run
        self._next = 0  # the call that is expected
        self._cold = 0  # the first call on these ranks
        self._moved = False  # since the last call
        self._last_timestep: Any = None
        self._timesteps, self._outlook = None, None
        if run.timesteps is not None:
            first = _find(inputs, run.timesteps)
            if first is None:
                raise ScheduleError(
                    f"stream {stream!r} begins at timestep {inputs.timestep_number():g}, which is none of those that begin() "
                    "announced (stride=1 also runs without: call begin())"
                )
            self._timesteps = run.timesteps[first:]
            if run.plan.forecast:
                levels = run.levels or NoiseLevels.unknown(len(run.timesteps))
                self._outlook = Outlooks(NoiseLevels(levels.sigmas[first:], levels.scales[first:]))
        self._warm_up_to(run.plan)

    def _warm_up_to(self, plan: Plan) -> None:
        """Go by ``plan``, the run's with its warm-up or a longer one."""
        self._foreseeing, self._blind = plan, replace(plan, forecast=0)

    @property
    def _plan(self) -> Plan:
        """Plan for inputs as they are now; the latest values are the best for those that cannot be foreseen."""
        return self._foreseeing if self._outlook is None or self._outlook.steady else self._blind

    @property
    def _total(self) -> int | None:
        return None if self._timesteps is None else len(self._timesteps)

    def next(self, inputs: Inputs, samples: Sequence[torch.Tensor]) -> Call:
        """Say which call comes now, with these inputs, of which ``samples`` are some.

        Raises:
            ScheduleError: its timestep is not the one that was announced, or there is no further one.
        """
        index = self._position(inputs)
        if self._moved:
            self._begin_again(index)
        call = call_at(self._foreseeing, index, self._total)
        if self._outlook is None:
            return call
        self._outlook.see(index, samples)
        return call if self._outlook.steady else call_at(self._blind, index, self._total)

    def jobs(self, call: Call) -> Iterator[Call]:
        """Yield what the ranks compute now: the call, if they do, and then what they work ahead."""
        return (job for job in (call, *calls_ahead(self._plan, call.index, self._total)) if job.computes)

    def made(self, call: Call, inputs: Inputs) -> None:
        """Note that the call was made: the next one is expected."""
        self._next, self._last_timestep = call.index + 1, inputs.timestep

    def move(self) -> None:
        """Note that blocks have moved: the ranks have no values of this stream any more."""
        self._moved = True

    def _begin_again(self, index: int) -> None:
        """End the warm-up with call ``index``, the first after a move, or with its batch, if it was over."""
        self._cold, self._moved = index, False
        if index >= self._foreseeing.warmup:
            self._warm_up_to(replace(self._foreseeing, warmup=index + 1 + -index % self._foreseeing.stride))

    def _position(self, inputs: Inputs) -> int:
        """Find the index of the call with these inputs. At stride 1 some may have been left out, as nodes that cache do."""
        if self._timesteps is None or self._next >= len(self._timesteps):
            return self._next
        expected = self._timesteps[self._next :]
        skipped = _find(inputs, expected if self._run.plan.stride == 1 else expected[:1])
        if skipped is None:
            raise ScheduleError(
                f"call {self._next + 1} has timestep {inputs.timestep_number():g}, but begin() announced {expected[0]:g}: the "
                "calls of a run must follow the timesteps that it was begun with (stride=1 also runs without: call begin())"
            )
        return self._next + skipped

    def expected_samples(self, call: Call, target: int) -> Sequence[torch.Tensor]:
        """Return the samples that a rank that computes for call ``target`` is given; none for those of ``call`` itself."""
        return () if self._outlook is None or target == call.index else self._outlook.expected(target)

    def timestep(self, call: Call, index: int, inputs: Inputs) -> Any:
        """Return the timestep of call ``index``, in the form of that of ``call``, which has these inputs."""
        if index == call.index:
            return inputs.timestep
        if self._timesteps is None:
            return self._last_timestep  # time_shift
        return inputs.timestep_like(self._timesteps[index])

    def timed(self, call: Call) -> bool:
        """Whether ranks say how long blocks take: in the first few calls of either kind.

        Not in the very first one, in which kernels are loaded and caches are cold.
        """
        if call.kind is Kind.AHEAD or call.index == self._cold:
            return False
        plan = self._foreseeing
        return call.index - self._cold <= TIMED or 0 <= call.index - plan.warmup <= TIMED * plan.stride

    def banded(self, call: Call) -> bool:
        """Whether all ranks of a branch compute ``call`` together, if its inputs can be divided so."""
        return in_bands(self._plan, call, self._total)

    def why(self, call: Call) -> str:
        """Say why a call is synchronous; empty if it is not."""
        if call.kind is not Kind.SYNCHRONOUS:
            return ""
        if call.index < self._run.plan.warmup:
            return "warm-up"
        return "move" if call.index < self._foreseeing.warmup else "cool-down"


def _find(inputs: Inputs, timesteps: Sequence[float]) -> int | None:
    """Find the first of ``timesteps`` that is that of these inputs.

    >>> _find(Inputs.take((0, torch.tensor([600.0])), {}, (1, "timestep")), (900.0, 600.0, 300.0))
    1
    """
    given = inputs.timestep_number()  # once: it may be on a GPU
    timestep = flatten(inputs.timestep)[0][0]
    rounded = isinstance(timestep, torch.Tensor) and timestep.is_floating_point()  # as bfloat16, to three digits
    exact = max(1e-3, torch.finfo(timestep.dtype).eps if rounded else 0.0)
    near = (index for index, expected in enumerate(timesteps) if abs(given - expected) <= exact * max(1.0, abs(expected)))
    return next(near, None)
