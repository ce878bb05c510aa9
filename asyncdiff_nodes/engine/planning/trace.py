"""Trace of a model to its block graph, by one forward on the meta device: no weight is read, moved or allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine.batch import sample_of
from asyncdiff_nodes.engine.errors import OtherPathError, RepeatedBlockError, UnsupportedModelError
from asyncdiff_nodes.engine.tensors import TensorMeta, tensors_of
from asyncdiff_nodes.engine.trees import flatten

from .family import Family, HiddenStates
from .graph import Block, BlockGraph, Hidden
from .on_meta import on_meta, shapes_kept, to_meta
from .provenance import blocks_of, inputs_of, made_of, sources_at
from .recording import ModuleCall, Recording, record


def trace(skeleton: nn.Module, family: Family, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockGraph:
    """Run ``skeleton`` once on meta inputs and record its block graph.

    Args:
        skeleton: the model on the meta device; see :func:`~asyncdiff_nodes.engine.tensors.meta_copy`.
        family: names the blocks.
        args, kwargs: inputs of one call; tensors on any device, only their shapes and dtypes are used.

    Raises:
        UnsupportedModelError: a block is nested in another, or ran more than once; the forward needs values.
        Exception: whatever the model's forward raises for these inputs.

    Three layers, of which the last one reads the first one's output, too:

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.c = (nn.Linear(4, 4, device="meta") for _ in range(3))
    ...     def forward(self, x, t):
    ...         skip = self.a(x)
    ...         return self.c(self.b(skip) + skip)
    >>> family = Family("Net", lambda net: ["a", "b", "c"], timestep=(1, "t"), example_inputs=None, sample=(0, "x"))
    >>> graph = trace(Net(), family, (torch.empty(2, 4), 0), {})
    >>> graph.names, sorted(graph.edges)
    (('a', 'b', 'c'), [(0, 1), (0, 2), (1, 2)])
    >>> [block.macs for block in graph.blocks], graph.blocks[0].reads  # 2 rows of 4 times 4 weights; the first leaf is x
    ([32, 32, 32], frozenset({0}))
    """
    names = family.block_names(skeleton)
    for name in names:
        if any(other != name and name.startswith(other + ".") for other in names):
            raise UnsupportedModelError(f"family {family.name}: block {name} lies within another block")
    (args, kwargs), known = to_meta((args, kwargs))
    given = flatten((args, kwargs))[0]
    if family.trace_inputs is not None:
        args, kwargs = family.trace_inputs(args, kwargs)
    with family.tracing(), on_meta(known) as values, shapes_kept(skeleton, family.keep_shape):
        recording = record(skeleton, args, kwargs, values, family.entry)
    return graph_of(recording, names, family, given)


def graph_of(recording: Recording, names: Iterable[str], family: Family, given: list[Any]) -> BlockGraph:
    """Return the block graph of a model that has run on meta.

    Args:
        given: the leaves of ``(args, kwargs)`` that count as the model's inputs.

    Raises:
        UnsupportedModelError: a block ran more than once.
    """
    calls = _calls_of(recording, frozenset(names), family)
    if not calls:
        raise OtherPathError(f"family {family.name}: with these inputs the model runs none of its blocks")
    looked_at, result, decisive = made_of(recording, calls, given)
    last = len(calls) - 1
    looked_at[last] |= frozenset(source for source in result if source < 0)  # its rank returns the result
    looked_at = [sources | decisive for sources in looked_at]  # all ranks must take the same path
    blocks = tuple(_block(call, inputs_of(sources)) for call, sources in zip(calls, looked_at, strict=True))
    edges = {(producer, index) for index, sources in enumerate(looked_at) for producer in blocks_of(sources)}
    graph = BlockGraph(
        blocks=blocks,
        edges=frozenset(edges | {(producer, last) for producer in blocks_of(result) if producer < last}),
        glue_macs=recording.root.macs - sum(block.macs for block in blocks),
        glue_bytes=_nbytes(recording.root.module) - sum(block.weight_bytes for block in blocks),
    )
    return replace(graph, hidden=_hidden(graph, family.hidden, recording, calls, given)) if family.hidden else graph


def _calls_of(recording: Recording, names: frozenset[str], family: Family) -> list[ModuleCall]:
    """Return the calls of the blocks ``names``, in order."""
    calls = [call for call in recording.calls if call.name in names]
    times = Counter(call.name for call in calls)
    if twice := next((name for name, count in times.items() if count > 1), None):
        raise RepeatedBlockError(family.name, twice)
    return calls


def _block(call: ModuleCall, reads: frozenset[int]) -> Block:
    leaves, structure = flatten(call.output)
    return Block(call.name, tuple(map(TensorMeta.of, leaves)), structure, call.macs, _nbytes(call.module), reads)


def _hidden(
    graph: BlockGraph, known: HiddenStates, recording: Recording, calls: Sequence[ModuleCall], given: list[Any]
) -> Hidden | None:
    """Say which blocks hand on the hidden states, and what these are made of; None if this call of the model has none."""
    index = next((index for index, call in enumerate(calls) if call.name == known.block), None)
    states = None if index is None else sample_of(*calls[index].arguments, known.argument)
    if index is None or not isinstance(states, torch.Tensor):  # this version of the model calls it otherwise
        return None
    sources, taken = sources_at(recording, calls, given, index, states), TensorMeta.of(states)
    carriers = {}
    for block in graph.blocks:
        at = known.lists.get(block.name.rpartition(".")[0])
        if at is not None and at < len(block.outputs) and _holds(block.outputs[at].shape, taken.shape):
            carriers[block.name] = at
    return Hidden(known.block, known.argument, frozenset(graph.made_of(blocks_of(sources))), inputs_of(sources), carriers)


def _holds(shape: tuple[int, ...], states: tuple[int, ...]) -> bool:
    """Whether hidden states [B, T, ...] can be the last tokens of a tensor of this shape.

    >>> _holds((2, 77 + 1024, 64), (2, 1024, 64)), _holds((2, 1024, 128), (2, 1024, 64))
    (True, False)
    """
    return len(shape) == len(states) and shape[1] >= states[1] and (shape[0], *shape[2:]) == (states[0], *states[2:])


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for _, tensor in tensors_of(module))
