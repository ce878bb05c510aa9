"""The block graph: a model's blocks in execution order, who reads whose output, and what each block costs.

Everything is traced on the meta device: no weight is read, moved or allocated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from asyncdiff_nodes.engine.batch import sample_of
from asyncdiff_nodes.engine.errors import PlanError, UnsupportedModelError
from asyncdiff_nodes.engine.trees import flatten

from .family import Family, HiddenStates


@dataclass(frozen=True)
class TensorMeta:
    """Shape, stride (in elements) and dtype of one tensor; what a receiver needs to allocate it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def __reduce__(self) -> tuple[Any, ...]:
        """The dtype by its name: pickle would look for the module that it comes from, among all, each time."""
        return _meta, (self.shape, self.stride, str(self.dtype).removeprefix("torch."))

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorMeta:
        """Layout of ``tensor``; a tensor with gaps or overlaps (an expanded view) gets the contiguous one."""
        dense = tensor if tensor.is_contiguous() else torch.empty_like(tensor, device="meta")
        return cls(tuple(tensor.shape), dense.stride(), tensor.dtype)

    def divides(self, batch: int) -> bool:
        """Whether the first dimension can be that of a batch of so many items, each of which is in one piece."""
        return bool(self.shape) and self.shape[0] % batch == 0 and self.stride[0] * self.shape[0] == self.numel

    def part(self, items: int, batch: int) -> TensorMeta:
        """The layout for ``items`` of the ``batch`` items; see :meth:`divides`."""
        return TensorMeta((self.shape[0] // batch * items, *self.shape[1:]), self.stride, self.dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the elements."""
        return self.numel * self.dtype.itemsize


def _meta(shape: tuple[int, ...], stride: tuple[int, ...], dtype: str) -> TensorMeta:
    return TensorMeta(shape, stride, getattr(torch, dtype))


@dataclass(frozen=True)
class Block:
    """One placeable unit.

    Attributes:
        name: its name in the module tree.
        outputs: layout of each output tensor for the traced inputs.
        structure: how these tensors make up the output; see :mod:`.trees`.
        macs: multiply-accumulates of one call for the traced inputs.
        reads: positions of the model's own inputs that it depends on other than through blocks, among the leaves of
            ``(args, kwargs)``: what it is given, and what a function that it is given looks at.
        weight_bytes: bytes of its parameters and buffers.
    """

    name: str
    outputs: tuple[TensorMeta, ...]
    structure: Any
    macs: int
    weight_bytes: int
    reads: frozenset[int] = frozenset()

    @property
    def output_bytes(self) -> int:
        """Bytes that one reader on another rank receives per call."""
        return sum(meta.nbytes for meta in self.outputs)


@dataclass(frozen=True)
class Hidden:
    """The hidden states that the first block of a transformer takes, in one block graph.

    Attributes:
        block, argument: as in :class:`~.family.HiddenStates`.
        made_of: the blocks that they are made of, by index.
        reads: positions of the model's own inputs that they are made of other than through blocks.
        carriers: block that hands them on -> their index among the tensors that it returns.
    """

    block: str
    argument: tuple[int, str]
    made_of: frozenset[int]
    reads: frozenset[int]
    carriers: Mapping[str, int]


@dataclass(frozen=True)
class BlockGraph:
    """Blocks in execution order and their data dependencies.

    Attributes:
        blocks: in execution order.
        edges: pairs (producer, consumer) of block indices, skip connections included. What the model's own output reads
            counts as read by the last block, whose rank returns the result.
        glue_macs, glue_bytes: cost of what is not placed (embeddings, concatenations) and computed by every rank.
        hidden: of a transformer whose family knows them.
    """

    blocks: tuple[Block, ...]
    edges: frozenset[tuple[int, int]]
    glue_macs: int
    glue_bytes: int
    hidden: Hidden | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Block names in execution order."""
        return tuple(block.name for block in self.blocks)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call of the whole model."""
        return self.glue_macs + sum(block.macs for block in self.blocks)

    def made_of(self, blocks: Iterable[int]) -> set[int]:
        """``blocks``, and those whose outputs they are made of, by index."""
        found = set(blocks)
        for producer, consumer in sorted(self.edges, reverse=True, key=lambda edge: edge[1]):
            if consumer in found:
                found.add(producer)
        return found

    def within(self, whole: BlockGraph) -> BlockGraph:
        """The graph of a call that leaves some blocks of ``whole`` out: with these, as blocks that return nothing.

        Raises:
            UnsupportedModelError: the call takes another path through the model than ``whole``.
        """
        own, index = {block.name: block for block in self.blocks}, {name: i for i, name in enumerate(whole.names)}
        known = [name for name in whole.names if name in own] == list(self.names) and self.names[-1] == whole.names[-1]
        known = known and (self.hidden is None) == (whole.hidden is None)
        if not known or any((index[self.names[p]], index[self.names[c]]) not in whole.edges for p, c in self.edges):
            raise UnsupportedModelError("these inputs take another path through the model than it was split for")
        nothing = {"outputs": (), "structure": (), "macs": 0, "reads": frozenset()}
        blocks = tuple(own.get(block.name) or replace(block, **nothing) for block in whole.blocks)
        hidden = whole.hidden and replace(whole.hidden, reads=self.hidden.reads)
        return BlockGraph(blocks, whole.edges, self.glue_macs, self.glue_bytes, hidden)

    def find(self, prefix: str) -> int:
        """Index of the first block that is ``prefix`` or lies under it.

        Raises:
            PlanError: there is none.
        """
        for index, name in enumerate(self.names):
            if name == prefix or name.startswith(prefix + "."):
                return index
        raise PlanError(f"unknown cut {prefix!r}: no block has this name or prefix. Blocks in order: {', '.join(self.names)}")


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of all parameters and buffers, shared ones under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose parameters and buffers are on the meta device; no weight is copied on the way."""
    memo: dict[int, Any] = {}
    for _, tensor in tensors_of(module):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"the module tree of this {type(module).__name__} cannot be copied without its weights ({error}); remove hooks "
            "and quantised layers that hold tensors of their own"
        ) from error


class _Provenance(TorchDispatchMode):
    """Remembers for every tensor which blocks' outputs (i) and model inputs (~i) it was made from, outside of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: int | None = None  # index of the running block
        self.looked_at: set[int] = set()  # by it
        self._sources: WeakIdKeyDictionary = WeakIdKeyDictionary()
        # of what was written in place, which others see through views; by its storage, kept so that no other takes its address
        self._written: dict[int, tuple[frozenset[int], Any]] = {}

    def sources(self, tree: Any) -> frozenset[int]:
        leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        own = (self._sources.get(leaf, frozenset()) for leaf in leaves)
        written = (self._written[key][0] for leaf in leaves if (key := leaf.untyped_storage()._cdata) in self._written)
        return frozenset().union(*own, *written)

    def mark(self, tree: Any, sources: frozenset[int]) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                self._sources[leaf] = sources

    def leave(self, output: Any) -> None:
        """The running block returns ``output``, whatever was written to its memory before."""
        self.mark(output, frozenset({self.inside}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._written.pop(leaf.untyped_storage()._cdata, None)
        self.inside = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sources = self.sources((args, kwargs))
        if self.inside is not None:
            self.looked_at |= sources
        elif sources:
            self.mark(out, sources)
            if func._schema.is_mutable:
                for leaf, argument in zip(args, func._schema.arguments, strict=False):
                    if argument.alias_info is not None and argument.alias_info.is_write:
                        storage = leaf.untyped_storage()
                        self._written[storage._cdata] = sources, storage
        return out


class _ConvolutionLayouts(TorchDispatchMode):
    """Gives the results of 2D convolutions the memory format that devices give them, which torch's meta kernel leaves open.

    Values cross in the traced layouts, and other kernels serve another layout, with other rounding.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.convolution.default or out.ndim != 4:
            return out
        last = torch.channels_last in map(suggest_memory_format, args[:2])
        return torch.empty_like(out, memory_format=torch.channels_last) if last else out


def trace(skeleton: nn.Module, family: Family, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockGraph:
    """Run ``skeleton`` (a :func:`meta_copy`) once on meta inputs and record its block graph.

    Args:
        skeleton: the model on the meta device.
        family: names the blocks.
        args, kwargs: inputs of one call; tensors on any device, only their shapes and dtypes are used.

    Raises:
        UnsupportedModelError: a block is nested in another, or ran more than once; the forward needs values.
        Exception: whatever the model's forward raises for these inputs.
    """
    listed = family.block_names(skeleton)
    for name in listed:
        if any(other != name and name.startswith(other + ".") for other in listed):
            raise UnsupportedModelError(f"family {family.name}: block {name} lies within another block")
    args, kwargs = tree_map(_to_meta, (args, kwargs))

    order: list[str] = []
    reads: list[frozenset[int]] = []
    outputs: dict[str, tuple[tuple[TensorMeta, ...], Any]] = {}
    macs: dict[str, int] = {}
    edges: set[tuple[int, int]] = set()
    states: list[tuple[TensorMeta, frozenset[int]]] = []  # hidden ones, that the first block takes, and what they are made of
    provenance, flops = _Provenance(), FlopCounterMode(display=False)

    def enter(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if name in macs:
                raise UnsupportedModelError(f"family {family.name}: block {name} runs more than once per call")
            provenance.inside = len(order)
            order.append(name)
            sources = provenance.sources((args, kwargs))
            provenance.looked_at = set(sources)
            edges.update((source, provenance.inside) for source in sources if source >= 0)
            if family.hidden is not None and name == family.hidden.block:
                taken = sample_of(args, kwargs, family.hidden.argument)
                if isinstance(taken, torch.Tensor):  # else this version of the model calls it otherwise
                    states.append((TensorMeta.of(taken), provenance.sources(taken)))
            macs[name] = -flops.get_total_flops()

        return hook

    def leave(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            macs[name] += flops.get_total_flops()
            leaves, structure = flatten(output)
            outputs[name] = tuple(TensorMeta.of(leaf) for leaf in leaves), structure
            reads.append(frozenset(~source for source in provenance.looked_at if source < 0))
            provenance.leave(output)

        return hook

    hooks = []
    for name in listed:
        block = skeleton.get_submodule(name)
        hooks.append(block.register_forward_pre_hook(enter(name), with_kwargs=True))
        hooks.append(block.register_forward_hook(leave(name)))
    try:
        for position, leaf in enumerate(flatten((args, kwargs))[0]):
            provenance.mark(leaf, frozenset({~position}))
        if family.trace_inputs is not None:
            args, kwargs = family.trace_inputs(args, kwargs)
        with torch.no_grad(), _ConvolutionLayouts(), flops, provenance:
            result = skeleton(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
        raise UnsupportedModelError(f"with these inputs its forward depends on values, not shapes alone ({error})") from error
    finally:
        for hook in hooks:
            hook.remove()

    last = len(order) - 1
    sources = provenance.sources(result)
    reads[last] |= {~source for source in sources if source < 0}
    edges.update((source, last) for source in sources if 0 <= source < last)
    blocks = tuple(
        Block(name, *outputs[name], macs[name] // 2, _nbytes(skeleton.get_submodule(name)), reads[index])
        for index, name in enumerate(order)
    )
    graph = BlockGraph(
        blocks=blocks,
        edges=frozenset(edges),
        glue_macs=flops.get_total_flops() // 2 - sum(block.macs for block in blocks),
        glue_bytes=_nbytes(skeleton) - sum(block.weight_bytes for block in blocks),
    )
    return replace(graph, hidden=_hidden(graph, family.hidden, *states[0])) if states else graph


def _hidden(graph: BlockGraph, known: HiddenStates, taken: TensorMeta, sources: frozenset[int]) -> Hidden:
    carriers = {}
    for block in graph.blocks:
        index = known.lists.get(block.name.rpartition(".")[0])
        if index is not None and index < len(block.outputs) and _holds(block.outputs[index].shape, taken.shape):
            carriers[block.name] = index
    made_of = frozenset(graph.made_of(source for source in sources if source >= 0))
    reads = frozenset(~source for source in sources if source < 0)
    return Hidden(known.block, known.argument, made_of, reads, carriers)


def _holds(shape: tuple[int, ...], states: tuple[int, ...]) -> bool:
    """Whether hidden states [B, T, ...] can be the last tokens of a tensor of this shape."""
    return len(shape) == len(states) and shape[1] >= states[1] and (shape[0], *shape[2:]) == (states[0], *states[2:])


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for _, tensor in tensors_of(module))


def _to_meta(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, torch.Tensor) else leaf
