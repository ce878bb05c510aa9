"""What every tensor of a recorded forward was made from: which blocks' outputs, and which of the model's own inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .recording import ModuleCall, Operation, Recording

Sources = frozenset[int]  # block i as i, the model's own input i as ~i

_NOTHING: Sources = frozenset()


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


def made_of(
    recording: Recording, blocks: Sequence[ModuleCall], inputs: Sequence[object]
) -> tuple[list[Sources], Sources, Sources]:
    """Find what each of ``blocks``, which follow each other, looks at; what the result is made of; and what decided the path.

    Args:
        inputs: the model's own.

    Outside of blocks, what an operation returns is made from what it was given. A block's output is made from that block alone,
    whatever was written to its memory before.
    """
    provenance = _Provenance(inputs)
    looked_at, done = [], 0
    for index, call in enumerate(blocks):
        provenance.follow(recording.operations[done : call.begins])
        done = call.ends
        inside = (operation.reads for operation in recording.operations[call.begins : call.ends])
        looked_at.append(_NOTHING.union(provenance.of(call.given), *map(provenance.of, inside)))
        provenance.returned(index, [leaf for leaf in call.returned if isinstance(leaf, torch.Tensor)])
    provenance.follow(recording.operations[done:])
    result = provenance.of(leaf for leaf in recording.root.returned if isinstance(leaf, torch.Tensor))
    return looked_at, result, provenance.of(recording.decisive)


def sources_at(
    recording: Recording, blocks: Sequence[ModuleCall], inputs: Sequence[object], index: int, tensor: torch.Tensor
) -> Sources:
    """Find what ``tensor`` is made of when the block ``index`` begins; see :func:`made_of`."""
    provenance, done = _Provenance(inputs), 0
    for number, call in enumerate(blocks[:index]):
        provenance.follow(recording.operations[done : call.begins])
        done = call.ends
        provenance.returned(number, [leaf for leaf in call.returned if isinstance(leaf, torch.Tensor)])
    provenance.follow(recording.operations[done : blocks[index].begins])
    return provenance.of([tensor])


def memory_of(tensor: torch.Tensor) -> int:
    """Return an address that all views of a tensor share."""
    address: int = tensor.untyped_storage()._cdata
    return address


class _Provenance:
    """The sources of every tensor, as far as operations were followed."""

    def __init__(self, inputs: Sequence[object]) -> None:
        # by identity: the recording keeps every tensor, so that none takes another's
        self._sources = {id(leaf): frozenset({~position}) for position, leaf in enumerate(inputs)}
        self._written: dict[int, Sources] = {}  # of what was written in place, which others see through views, by its memory

    def of(self, tensors: Iterable[torch.Tensor]) -> Sources:
        """Return what any of these tensors is made from."""
        found: list[Iterable[int]] = []
        for tensor in tensors:
            found += self._sources.get(id(tensor), ()), self._written.get(memory_of(tensor), ()) if self._written else ()
        return _NOTHING.union(*found)

    def follow(self, operations: Iterable[Operation]) -> None:
        """Follow operations that are in no block."""
        for operation in operations:
            if sources := self.of(operation.reads):
                self._sources.update((id(tensor), sources) for tensor in operation.makes)
                self._written.update((memory_of(tensor), sources) for tensor in operation.writes)

    def returned(self, block: int, tensors: Iterable[torch.Tensor]) -> None:
        """Note what a block has returned."""
        for tensor in tensors:
            self._sources[id(tensor)] = frozenset({block})
            self._written.pop(memory_of(tensor), None)
