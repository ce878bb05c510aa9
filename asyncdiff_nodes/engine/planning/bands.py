"""How a call of a model is computed in bands: found out from what its forward does on meta, and tried out there first.

Three forwards are recorded: of the call, of one for a taller picture, and of one rank's bands. The dimensions that differ between
the first two are of tokens or rows. Where the third does the same operations as the first, each on what a rank has of that, and
none of them would need what others have but for those that are exchanged, the result is the model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from asyncdiff_nodes.engine.bands import REPLACED, Axis, BandMode, Bands, Place, Scope
from asyncdiff_nodes.engine.batch import sample_of
from asyncdiff_nodes.engine.errors import UnsupportedModelError
from asyncdiff_nodes.engine.tensors import meta_copy
from asyncdiff_nodes.engine.trees import flatten

from .family import Family
from .local_operations import mixes, varying
from .on_meta import on_meta, shapes_kept, to_meta
from .provenance import memory_of
from .recording import ModuleCall, Operation, Recording, record

_TALLER = 64  # rows that the other picture has more: what resamplings divide by
_LEAST_WORK = 40  # multiply-accumulates per byte that is gathered after a block, for which that is worth it
_cat = torch.ops.aten.cat


def find_bands(skeleton: nn.Module, family: Family, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: int) -> Bands:
    """Find out how a call of ``skeleton``, which is on meta, is computed by ``ranks`` ranks in bands.

    Where that works for the model as a whole, from the first operation to the last, these are bands of rows of the picture. Else
    they are bands of tokens, in blocks that hand them on to each other; what is around these is computed by every rank.

    Raises:
        UnsupportedModelError: it cannot be; says why.
    """
    finder = _Finder(skeleton, family, args, kwargs, ranks)
    try:
        return finder.as_a_whole()
    except UnsupportedModelError as whole:
        try:
            return finder.by_blocks()
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{family.name} cannot be computed in bands: {error} (as a whole: {whole})") from error


# -- rehearsals ------------------------------------------------------------------------------------------------------


class _Nobody:
    """Stands for the other ranks, on meta.

    Attributes:
        nbytes: what all ranks together would have sent.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.nbytes = rank, ranks, 0

    def gather(self, owns: Sequence[torch.Tensor], dim: int, lengths: Sequence[int]) -> list[list[torch.Tensor]]:
        """Make something of these lengths up."""
        others = [[_sized(own, dim, length) for length in lengths] for own in owns]
        self.nbytes += sum(tensor.nbytes for row in others for tensor in row) * (self.ranks - 1)
        return others

    def neighbours(self, band: torch.Tensor, dim: int, above: int, below: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Make up rows."""
        first, last = _sized(band, dim, above), _sized(band, dim, below)
        self.nbytes += (first.nbytes + last.nbytes) * (self.ranks - 1)
        return first if above and self.rank else None, last if below and self.rank < self.ranks - 1 else None


def _sized(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    shape = [*tensor.shape]
    shape[dim] = length
    return tensor.new_empty(shape)


class _Rehearsal(BandMode):
    """Runs on meta, with nothing recorded of what is replaced or exchanged.

    Args:
        expected: by module, what the same call of the whole needed; None for that one itself.

    Attributes:
        needs: lengths of keys or rows of everything that may be exchanged, with the module that it was in, in order.
        masks: memory of the masks of attentions.
        exchanges: by module: as of a scope.
    """

    def __init__(self, exchange: _Nobody, expected: Mapping[str, Sequence[int]] | None = None) -> None:
        super().__init__(exchange)
        self._expected = expected
        self._names: dict[int, str] = {}
        self.needs: list[tuple[str, int]] = []
        self.masks: set[int] = set()
        self.exchanges: dict[str, list[int | None]] = {}

    def name(self, scopes: Mapping[str, Scope]) -> None:
        """Take the names of scopes."""
        self._names = {id(scope): name for name, scope in scopes.items()}

    def _begins(self, scope: Scope, module: Any, args: Any, kwargs: Any) -> Any:
        with _disable_current_modes():
            self.exchanges[self._names[id(scope)]] = []
            return super()._begins(scope, module, args, kwargs)

    def _ends(self, scope: Scope, module: Any, args: Any, output: Any) -> Any:
        with _disable_current_modes():
            leaves = flatten(output)[0]
            for number, dim, length in scope.gives:
                if leaves[number].shape[dim] != scope.axes[length].band(self._exchange.rank):
                    raise UnsupportedModelError(f"{self._names[id(scope)]} returns {leaves[number].shape[dim]} of {length}")
            return super()._ends(scope, module, args, output)

    def _needed(self, length: int) -> Axis | None:
        name = "" if self._scope is None else self._names[id(self._scope)]
        if self._expected is None or self._scope is None:
            self.needs.append((name, length))
            return None
        done = self.exchanges[name]
        whole = self._expected[name][len(done)]
        done.append(None if whole == length else whole)
        if whole == length:
            return None
        axis = self._scope.axes.get(whole)
        if axis is None or axis.band(self._exchange.rank) != length:
            raise UnsupportedModelError(f"{name or 'it'} attends to {length} of {whole} tokens or rows, which are no band")
        return axis

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replaced = None if self._as_is else REPLACED.get(func)
        if replaced is None:
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            return replaced(self, func, args, kwargs or {})

    @contextmanager
    def as_is(self) -> Iterator[None]:
        """As of bands; nothing is recorded."""
        with super().as_is(), _disable_current_modes():
            yield

    def attended(self, query: Any, key: Any, value: Any, mask: Any, dim: int) -> Any:
        """As of bands; notes the mask."""
        if mask is not None:
            self.masks.add(memory_of(mask))
        with _disable_current_modes():
            return super().attended(query, key, value, mask, dim)


class _Finder:
    """One call of a model."""

    def __init__(self, skeleton: nn.Module, family: Family, args: Any, kwargs: Any, ranks: int) -> None:
        self._skeleton, self._family, self._ranks, self._call = skeleton, family, ranks, (args, kwargs)
        blocks = {name: Scope((), (), {}) for name in family.block_names(skeleton)}
        self._whole, mode, _ = self._rehearse(self._call, blocks)
        self._needs, self._masks = mode.needs, mode.masks
        self._taller, self._more = self._another(blocks)

    def _another(self, blocks: Mapping[str, Scope]) -> tuple[Recording, int]:
        """Record the same call for a picture of another height; returns by how many rows, or tokens, it is taller, too."""
        faults = []
        for dim, more in _heights(sample_of(*self._call, self._family.sample)):
            try:
                recording, *_ = self._rehearse(_grown(*self._call, self._family.sample, dim, more), blocks)
            except Exception as error:  # whatever a forward may raise
                faults.append(str(error))
                continue
            if _alike(self._whole, recording):
                return recording, more
            faults.append("it takes another path there")
        why = f" ({faults[0].splitlines()[0]})" if faults else ""
        raise UnsupportedModelError(f"{self._family.name} cannot be tried with a picture of another height{why}")

    def _rehearse(
        self,
        call: tuple[Any, Any],
        scopes: Mapping[str, Scope],
        expected: Mapping[str, Sequence[int]] | None = None,
        rank: int = 0,
    ) -> tuple[Recording, _Rehearsal, int]:
        """Run the model on meta, with these scopes in the bands of ``rank``, if what they need is given."""
        module, family = meta_copy(self._skeleton), self._family
        exchange = _Nobody(rank, self._ranks)
        mode = _Rehearsal(exchange, expected)
        mode.name(scopes)
        (args, kwargs), known = to_meta(call)
        if family.trace_inputs is not None:
            args, kwargs = family.trace_inputs(args, kwargs)
        with (
            family.tracing(),
            on_meta(known) as values,
            shapes_kept(module, family.keep_shape),
            mode.scoped(module, Bands(scopes, 0)),
        ):
            try:
                root = scopes.get("")
                if root is not None:
                    args, kwargs = mode._begins(root, None, args, kwargs)
                recording = record(module, args, kwargs, values, family.entry)
                if root is not None:
                    mode._ends(root, None, None, recording.root.output)
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                if expected is None:
                    raise
                raise UnsupportedModelError(f"it does not run on bands ({str(error).splitlines()[0]})") from error
        return recording, mode, exchange.nbytes

    def _tried(self, scopes: Mapping[str, Scope]) -> Bands:
        """Run the first and the last rank's part, and look whether any operation would need more than that."""
        expected = {name: [length for block, length in self._needs if name in ("", block)] for name in scopes}
        axes = [axis for scope in scopes.values() for axis in scope.axes.values()]
        for rank in (0, self._ranks - 1):
            band, mode, nbytes = self._rehearse(self._call, scopes, expected, rank)
            if not _alike(self._whole, band):
                raise UnsupportedModelError("it takes another path on bands")
            sizes = {(axis.length, axis.band(rank)) for axis in axes}
            for one, other in zip(self._whole.operations, band.operations, strict=True):
                if why := mixes(one, other, lambda *size, sizes=sizes: size in sizes):
                    raise UnsupportedModelError(f"{why} in {one.call.name or 'its own forward'}")
        return Bands({name: replace(scope, exchanges=tuple(mode.exchanges[name])) for name, scope in scopes.items()}, nbytes)

    # -- as a whole --------------------------------------------------------------------------------------------------

    def as_a_whole(self) -> Bands:
        """Find bands of rows of the picture."""
        shares = {one.shape[dim]: Fraction(other.shape[dim] - one.shape[dim], self._more) for one, other, dim in self._tensors()}
        height = next((length for length, share in shares.items() if share == 1), 0)
        unit = math.lcm(*(share.denominator for share in shares.values()))
        bounds = [unit * round(height / unit * rank / self._ranks) for rank in range(self._ranks)]
        if any(a >= b for a, b in pairwise([*bounds, height])):
            raise UnsupportedModelError(f"{height} rows in steps of {unit} are too few for {self._ranks} ranks")
        rows = {length: Axis(((*(int(share * bound) for bound in bounds), length),)) for length, share in shares.items()}
        axes = {length: axis for length, axis in rows.items() if math.ceil(shares[length] * height) == length}
        for length in rows.keys() - axes.keys():  # rows and something else; or of a resampled picture whose last row is half one
            axes[length] = _put_together(self._whole.operations, length, axes) or rows[length]
        gives = tuple(
            (number, dim, one.shape[dim])
            for number, one, other in _pairs(self._whole.root.returned, self._taller.root.returned)
            for dim in varying(one, other)
        )
        if not gives:
            raise UnsupportedModelError("its result has no rows")
        takes = tuple((number, dim) for number, dim, _ in _places(self._whole.root, self._taller.root))
        return self._tried({"": Scope(takes, gives, axes)})

    def _tensors(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield each tensor of the call and of the taller one that differ, and the dimension."""
        given = (flatten(recording.root.arguments)[0] for recording in (self._whole, self._taller))
        for _, one, other in _pairs(*given):
            yield from ((one, other, dim) for dim in varying(one, other))
        for operation, taller in zip(self._whole.operations, self._taller.operations, strict=True):
            for one, other in zip(operation.makes, taller.makes, strict=True):
                yield from ((one, other, dim) for dim in varying(one, other))

    # -- by blocks ---------------------------------------------------------------------------------------------------

    def by_blocks(self) -> Bands:
        """Find bands of tokens."""
        blocks = self._blocks()
        if not blocks:
            raise UnsupportedModelError("no block takes tokens and hands them on")
        scopes, bands = {}, set[int]()  # tensors that are bands when they are passed
        for index, block in enumerate(blocks):
            leaves = flatten(block.call.arguments)[0]
            takes = tuple(place for place in block.takes if id(leaves[place[0]]) not in bands)
            gives = tuple(give for give in block.gives if self._read_whole(block.call.returned[give[0]], blocks[index:]))
            for give in block.gives:
                (bands.discard if give in gives else bands.add)(id(block.call.returned[give[0]]))
            scopes[block.call.name] = Scope(takes, gives, block.axes)
        return self._tried(scopes)

    def _blocks(self) -> list[_Block]:
        """Find the blocks that take tokens and return as many, and are worth what is gathered after them."""
        twins = {call.name: call for call in self._taller.calls}
        names, found = set(self._family.block_names(self._skeleton)), list[_Block]()
        prompts, tokens = set[int](), set[int]()  # tensors that blocks have returned
        for call in self._whole.calls:
            if call.name not in names:
                continue
            lengths = {length for *_, length in _places(call, twins[call.name])}
            returned = list(_pairs(call.returned, twins[call.name].returned))
            changed = [(number, one, varying(one, other)) for number, one, other in returned if varying(one, other)]
            if not changed or not all(len(dims) == 1 and one.shape[dims[0]] in lengths for _, one, dims in changed):
                continue
            passed = {id(leaf) for leaf in call.given} & tokens
            if not passed and call.macs < _LEAST_WORK * sum(one.nbytes for _, one, _ in changed):
                continue
            gives = [(number, dims[0], one.shape[dims[0]]) for number, one, dims in changed]
            tokens.update(id(one) for _, one, _ in changed)
            block = self._block(call, twins[call.name], gives, prompts)
            prompts.update(id(call.returned[number]) for number, *_ in block.gives[len(gives) :])
            found.append(block)
        return found

    def _block(self, call: ModuleCall, twin: ModuleCall, gives: list[tuple[int, int, int]], prompts: set[int]) -> _Block:
        """Find what is divided in a block that returns ``gives``; a prompt's tokens are, if it hands these on as well."""
        leaves = flatten(call.arguments)[0]
        operations = self._whole.operations[call.begins : call.ends]
        written = {memory_of(tensor) for operation in operations for tensor in operation.writes}
        axes = {length: Axis((self._bounds(length),)) for *_, length in gives}
        takes = list[Place]()
        for number, one, other in _pairs(leaves, flatten(twin.arguments)[0]):
            if one.ndim < 3 or varying(one, other):
                continue
            for place, result, _ in _pairs(call.returned, twin.returned):
                if result.shape == one.shape and (result is not one or memory_of(one) in written):
                    gives = [*gives, (place, 1, one.shape[1])]
                    break
            else:
                if id(one) not in prompts:
                    continue
            takes.append((number, 1))
            axes[one.shape[1]] = Axis((self._bounds(one.shape[1]),))
        places = [place for place in _places(call, twin) if memory_of(leaves[place[0]]) not in self._masks]
        for length in (*(length for *_, length in places), *(length for name, length in self._needs if name == call.name)):
            if length not in axes and (axis := _put_together(operations, length, axes)) is not None:
                axes[length] = axis
        if missing := next((length for *_, length in places if length not in axes), None):
            raise UnsupportedModelError(f"{call.name} takes {missing} tokens, which it does not hand on")
        return _Block(call, (*takes, *((number, dim) for number, dim, _ in places)), tuple(gives), axes)

    def _bounds(self, length: int) -> tuple[int, ...]:
        if length < self._ranks:
            raise UnsupportedModelError(f"{length} tokens are too few for {self._ranks} ranks")
        return tuple(length * rank // self._ranks for rank in range(self._ranks + 1))

    def _read_whole(self, tensor: torch.Tensor, blocks: Sequence[_Block]) -> bool:
        """Whether anything reads what the first of these blocks has returned but for later ones, which take bands."""
        memory, index = memory_of(tensor), blocks[0].call.ends
        for block in blocks[1:]:
            if self._reads(memory, index, block.call.begins):
                return True
            leaves = flatten(block.call.arguments)[0]
            at = {number for number, leaf in enumerate(leaves) if leaf is tensor}
            if not at <= {number for number, _ in block.takes}:
                return True
            if any(leaf is tensor for leaf in block.call.returned):  # which was changed in place, and is another's from now on
                return False
            index = block.call.ends
        whole = self._whole
        return self._reads(memory, index, len(whole.operations)) or any(leaf is tensor for leaf in whole.root.returned)

    def _reads(self, memory: int, begin: int, end: int) -> bool:
        operations = self._whole.operations[begin:end]
        return any(memory_of(tensor) == memory for operation in operations for tensor in operation.reads)


@dataclass(frozen=True)
class _Block:
    """A block that can compute in bands; ``takes``, ``gives`` and ``axes`` as if everything were whole around it."""

    call: ModuleCall
    takes: tuple[Place, ...]
    gives: tuple[tuple[int, int, int], ...]
    axes: Mapping[int, Axis]


def _put_together(operations: Sequence[Operation], length: int, axes: Mapping[int, Axis]) -> Axis | None:
    """Find the axis of so many tokens that are some of these axes, and others, one after the other."""
    for operation in operations:
        if operation.func._overloadpacket is not _cat:
            continue
        dim = operation.args[1] if len(operation.args) > 1 else 0
        sizes = [piece.shape[dim] for piece in operation.args[0]]
        if sum(sizes) == length and any(size in axes for size in sizes):
            return Axis(tuple(part for size in sizes for part in (axes[size].parts if size in axes else ((0, size),))))
    return None


def _places(call: ModuleCall, taller: ModuleCall) -> list[tuple[int, int, int]]:
    """Find the arguments of a module that have tokens or rows: their numbers, the one dimension of these, and how many."""
    given = (flatten(each.arguments)[0] for each in (call, taller))
    pairs = ((number, one, varying(one, other)) for number, one, other in _pairs(*given))
    return [(number, dims[0], one.shape[dims[0]]) for number, one, dims in pairs if len(dims) == 1]


def _pairs(leaves: Sequence[Any], others: Sequence[Any]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield the tensors among two equal lists of leaves, with their numbers."""
    for number, (one, other) in enumerate(zip(leaves, others, strict=True)):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            yield number, one, other


def _alike(one: Recording, other: Recording) -> bool:
    return [operation.func for operation in one.operations] == [operation.func for operation in other.operations]


def _heights(sample: Any) -> Iterator[tuple[int, int]]:
    """Yield which dimension of a picture or a sequence could have how many more rows or tokens; some may be too many."""
    first = next(leaf for leaf in flatten(sample)[0] if isinstance(leaf, torch.Tensor))
    dims = (-2,) if first.ndim > 3 else (-2, -1)
    yield from ((dim, _TALLER) for dim in dims)
    yield from ((dim, -(first.shape[dim] // 2)) for dim in dims if first.shape[dim] > 1)


def _grown(args: tuple[Any, ...], kwargs: dict[str, Any], place: tuple[int, str], dim: int, more: int) -> tuple[Any, Any]:
    """Make the same call for ``more`` rows of the sample at ``place``; all else that has its proportions grows with it."""
    sample = next(leaf for leaf in flatten(sample_of(args, kwargs, place))[0] if isinstance(leaf, torch.Tensor))
    height, width = sample.shape[dim], sample.shape[-1]

    def grown(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim < 2:
            return leaf
        if sample.ndim > 3:
            times = _times(leaf.shape[-2], height, leaf.shape[-1], width) if leaf.ndim > 2 else None
        else:
            times = Fraction(1) if leaf.shape[dim] == height else None
        return leaf if times is None else _sized(leaf.to("meta"), dim, leaf.shape[dim] + int(more * times))

    made: tuple[Any, Any] = tree_map(grown, (args, kwargs))
    return made


def _times(rows: int, height: int, columns: int, width: int) -> Fraction | None:
    """Say how many times larger, or smaller, a picture is than another of its proportions, by a power of two.

    >>> _times(128, 64, 96, 48), _times(5, 9, 4, 8), _times(77, 64, 768, 48)
    (Fraction(2, 1), Fraction(1, 2), None)
    """
    for power in range(-6, 4):
        times = Fraction(2) ** power
        if rows == math.ceil(height * times) and columns == math.ceil(width * times):
            return times
    return None
