"""What every tensor of a forward was made from: which blocks' outputs, and which of the model's own inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Sources = frozenset[int]  # block i as i, the model's own input i as ~i


def blocks_of(sources: Iterable[int]) -> frozenset[int]:
    """Return the blocks among ``sources``, by index.

    >>> sorted(blocks_of([2, 0, ~0, ~3]))
    [0, 2]
    """
    return frozenset(source for source in sources if source >= 0)


def inputs_of(sources: Iterable[int]) -> frozenset[int]:
    """Return the model's own inputs among ``sources``, by position.

    >>> sorted(inputs_of([2, 0, ~0, ~3]))
    [0, 3]
    """
    return frozenset(~source for source in sources if source < 0)


class Provenance(TorchDispatchMode):
    """Remembers the sources of every tensor while it is entered.

    Outside of blocks, what an operation returns is made from what it was given. A block's output is made from that block alone;
    what the block was given, or looked at, is noted on the way.

    >>> a, b = torch.ones(2), torch.ones(2)
    >>> with Provenance() as provenance:
    ...     provenance.mark(a, frozenset({~0}))  # the model's first input
    ...     given = provenance.enter(5, a)  # block 5 begins, is given it, ...
    ...     out = a + b
    ...     looked_at = provenance.leave(out)  # ... and returns ``out``
    ...     glue = out * a  # no part of any block
    >>> inputs_of(looked_at), sorted(provenance.sources(out)), sorted(provenance.sources(glue))
    (frozenset({0}), [5], [-1, 5])
    """

    def __init__(self) -> None:
        super().__init__()
        self._inside: int | None = None  # index of the running block
        self._looked_at: set[int] = set()  # by it
        self._sources: WeakIdKeyDictionary = WeakIdKeyDictionary()
        # of what was written in place, which others see through views; by its storage, kept so that no other takes its address
        self._written: dict[int, tuple[Sources, Any]] = {}

    def mark(self, tree: Any, sources: Sources) -> None:
        """Note that the tensors of ``tree`` are made from ``sources``."""
        for tensor in _tensors(tree):
            self._sources[tensor] = sources

    def sources(self, tree: Any) -> Sources:
        """Return what the tensors of ``tree`` are made from."""
        tensors = _tensors(tree)
        own = (self._sources.get(tensor, frozenset()) for tensor in tensors)
        written = (self._written[key][0] for tensor in tensors if (key := _storage_of(tensor)) in self._written)
        return frozenset().union(*own, *written)

    def enter(self, block: int, arguments: Any) -> Sources:
        """Note that ``block`` begins; returns what its arguments are made from."""
        sources = self.sources(arguments)
        self._inside, self._looked_at = block, set(sources)
        return sources

    def leave(self, output: Any) -> Sources:
        """Note that the running block returns ``output``, whatever was written to its memory before.

        Returns:
            What the block's arguments, and whatever else it looked at, are made from.
        """
        assert self._inside is not None, "no block has begun"
        self.mark(output, frozenset({self._inside}))
        for tensor in _tensors(output):
            self._written.pop(_storage_of(tensor), None)
        self._inside = None
        return frozenset(self._looked_at)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sources = self.sources((args, kwargs))
        if self._inside is not None:
            self._looked_at |= sources
        elif sources:
            self.mark(out, sources)
            if func._schema.is_mutable:
                self._write(func, args, sources)
        return out

    def _write(self, func: Any, args: Any, sources: Sources) -> None:
        """Note what an operation that writes in place leaves in the memory of its arguments."""
        for leaf, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._written[_storage_of(leaf)] = sources, leaf.untyped_storage()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage_of(tensor: torch.Tensor) -> int:
    """Address of what holds the memory of a tensor, the same for all views of it."""
    address: int = tensor.untyped_storage()._cdata
    return address
