"""The block graph: a model's blocks in execution order, who reads whose output, and what each block costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from asyncdiff_nodes.engine.errors import OtherPathError, PlanError
from asyncdiff_nodes.engine.tensors import TensorMeta


@dataclass(frozen=True)
class Block:
    """One placeable unit.

    Attributes:
        name: its name in the module tree.
        outputs: layout of each output tensor for the traced inputs.
        structure: how these tensors make up the output; see :mod:`~asyncdiff_nodes.engine.trees`.
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
        """Return ``blocks``, and those whose outputs they are made of, by index."""
        needed = set(blocks)
        for producer, consumer in sorted(self.edges, reverse=True, key=lambda edge: edge[1]):
            if consumer in needed:
                needed.add(producer)
        return needed

    def within(self, whole: BlockGraph) -> BlockGraph:
        """Return the graph of a call that leaves some blocks of ``whole`` out: with these, as blocks that return nothing.

        Raises:
            OtherPathError: the call takes another path through the model than ``whole``.
        """
        own, index = {block.name: block for block in self.blocks}, {name: i for i, name in enumerate(whole.names)}
        known = [name for name in whole.names if name in own] == list(self.names) and self.names[-1] == whole.names[-1]
        known = known and (self.hidden is None) == (whole.hidden is None)
        if not known or any((index[self.names[p]], index[self.names[c]]) not in whole.edges for p, c in self.edges):
            raise OtherPathError("these inputs take another path through the model than it was split for")
        blocks = tuple(
            own.get(block.name) or replace(block, outputs=(), structure=(), macs=0, reads=frozenset()) for block in whole.blocks
        )
        hidden = replace(whole.hidden, reads=self.hidden.reads) if whole.hidden and self.hidden else None
        return BlockGraph(blocks, whole.edges, self.glue_macs, self.glue_bytes, hidden)

    def find(self, prefix: str) -> int:
        """Return the index of the first block that is ``prefix`` or lies under it.

        Raises:
            PlanError: there is none.
        """
        for index, name in enumerate(self.names):
            if name == prefix or name.startswith(prefix + "."):
                return index
        raise PlanError(f"unknown cut {prefix!r}: no block has this name or prefix. Blocks in order: {', '.join(self.names)}")
