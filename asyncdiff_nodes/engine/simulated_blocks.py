"""The blocks of a model that pretends to be several ranks: some compute, the others hand back values of earlier calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine.planning.placement import Placement
from asyncdiff_nodes.engine.rank.hidden_states import add_states, take_states
from asyncdiff_nodes.engine.rank.inbox import value_for

from .batch import sample_of
from .stub import runner
from .trees import flatten, unflatten


@dataclass(frozen=True)
class EarlierCall:
    """One call, as other segments have it.

    Attributes:
        targets: per rank, the call that it computed for.
        values: block -> its output, as it crossed.
        changes: whether hidden states among them are how blocks changed them.
    """

    targets: tuple[int, ...]
    values: dict[str, Any]
    changes: bool


class SimulatedBlocks:
    """``module`` with its blocks wrapped, until :meth:`close`: run as a whole, or as the rank of one segment runs it."""

    def __init__(self, module: nn.Module, placement: Placement, entry: str) -> None:
        self._module, self._placement = module, placement
        self._run = runner(module, entry)
        self._hidden = placement.hidden
        self._carriers = self._hidden.carriers if self._hidden else {}
        self._segment: int | None = None  # the one that runs; None runs all
        self._reads: int | None = None  # the call whose values it wants
        self._history: Sequence[EarlierCall] = ()
        self._made: dict[str, Any] = {}  # block -> what it has just returned
        self._states = torch.empty(0)  # hidden ones, of what is running
        for name in placement:
            block = module.get_submodule(name)
            block.forward = partial(self._run_block, name, block.forward)

    def close(self) -> None:
        """Restore the module."""
        for name in self._placement:
            self._module.get_submodule(name).__dict__.pop("forward", None)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Run the whole model; returns its output, and that of each block."""
        self._segment, self._made = None, {}
        return self._run(*args, **kwargs), self._made

    def run_segment(
        self, segment: int, reads: int | None, history: Sequence[EarlierCall], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Run one segment.

        Args:
            reads: the call whose values it wants of the others; None for the latest, whatever they are.
            history: earlier calls, oldest first.

        Returns:
            The model's output, and of the blocks that others read of this segment what they returned; of hidden states that every
            segment makes, how these changed.
        """
        self._segment, self._reads, self._history, self._made = segment, reads, history, {}
        output = self._run(*args, **kwargs)
        own = {name: value for name, value in self._made.items() if self._placement[name] == segment}
        for name in own.keys() & self._carriers.keys():
            own[name] = _mapped(torch.clone, own[name])  # its output may be read as well
            take_states(flatten(own[name])[0][self._carriers[name]], self._states)
        return output, own

    def _run_block(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._hidden and name == self._hidden.block:
            self._states = sample_of(args, kwargs, self._hidden.argument).clone()
        index = self._placement.graph.names.index(name)
        if self._segment is None or index in self._placement.owned(self._segment):
            output = forward(*args, **kwargs)
            self._made[name] = _mapped(torch.clone, output)
            return output
        return self._handed_back(name, read=index in self._placement.incoming(self._segment))

    def _handed_back(self, name: str, read: bool) -> Any:
        """Make up the output of a block of another segment, from what it returned in earlier calls.

        Args:
            read: whether any block of the running segment reads it.
        """
        sender, carries = self._placement[name], name in self._carriers
        sent = [
            (carries and call.changes, call.targets[sender], call.values[name]) for call in self._history if name in call.values
        ]
        change, _, latest = sent[-1]
        if not read:  # only its shape matters; no view of a kept value, which glue might change
            return _mapped(torch.empty_like, latest)
        segment, reads = self._segment, self._reads
        if segment is None or reads is None:
            value = _mapped(torch.clone, latest)
        else:
            known = {target: value for kind, target, value in sent[-max(2, segment - sender) :] if kind == change}
            value = _mapped(lambda *leaves: value_for(reads, dict(zip(known, leaves, strict=True))), *known.values())
        if change:
            add_states(flatten(value)[0][self._carriers[name]], self._states)
        return value


def _mapped(function: Callable[..., torch.Tensor], *trees: Any) -> Any:
    """Make a tree like these, of what ``function`` makes of their tensors.

    >>> _mapped(torch.add, (torch.tensor(1), None), (torch.tensor(2), None))
    (tensor(3), None)
    """
    leaves, structures = zip(*map(flatten, trees), strict=True)
    return unflatten([function(*each) for each in zip(*leaves, strict=True)], structures[0])
