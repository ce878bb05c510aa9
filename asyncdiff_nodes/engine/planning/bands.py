"""How a call of a model is computed in bands: found out from what its forward does on meta, and tried out there first.

Three forwards are recorded: of the call, of one for a taller picture, and of one rank's bands. The dimensions that differ between
the first two are of tokens or rows. Where the third does the same operations as the first, each on what a rank has of that, and
none of them would need what others have but for those that are exchanged, the result is the model's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine.bands import Axis, Bands, Place, Scope
from asyncdiff_nodes.engine.batch import batch_of, sample_of
from asyncdiff_nodes.engine.errors import UnsupportedModelError
from asyncdiff_nodes.engine.tensors import meta_copy
from asyncdiff_nodes.engine.trees import flatten

from .band_axes import chains, divisible, flattened, put_together, tensor_pairs
from .family import Family
from .local_operations import mixes, torn, varying
from .on_meta import on_meta, shapes_kept, to_meta
from .provenance import memory_of
from .recording import ModuleCall, Operation, Recording, record
from .rehearsal import Nobody, Rehearsal
from .taller_call import grown, heights

_LEAST_WORK = 30  # multiply-accumulates, without attention's, per byte that is gathered after a module, for which it is worth it
_MOST_FAULTS = 6  # kinds of modules that do not compute in bands, until nothing does


def find_bands(skeleton: nn.Module, family: Family, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: int) -> Bands:
    """Find out how a call of ``skeleton``, which is on meta, is computed by ``ranks`` ranks in bands.

    Where that works for the model as a whole, from the first operation to the last, these are bands of rows of the picture. Else
    they are bands of tokens, in modules that hand them on to each other; what is around these is computed by every rank.

    Raises:
        UnsupportedModelError: it cannot be; says why.
    """
    if family.keep_shape:
        raise UnsupportedModelError(
            f"{family.name} cannot be computed in bands: what {family.keep_shape[0]} does depends on values, and is not tried out"
        )
    try:
        return _found(_Finder(skeleton, family, args, kwargs, ranks), family.name)
    except UnsupportedModelError:
        raise
    except Exception as error:  # a network that nobody has thought of must not cost a picture
        raise UnsupportedModelError(f"{family.name} cannot be computed in bands: {_first_line(error)}") from error


def _found(finder: _Finder, name: str) -> Bands:
    whole, faults = None, []
    try:
        whole = finder.as_a_whole()
    except UnsupportedModelError as error:
        faults.append(f"as a whole: {error}")
    if whole is not None and all(axis.divided == axis.length for axis in whole.scopes[""].axes.values()):
        return whole
    try:  # a prompt's tokens may be divided there, too
        return finder.by_modules()
    except UnsupportedModelError as error:
        faults.append(f"by modules: {error}")
    if whole is None:
        raise UnsupportedModelError(f"{name} cannot be computed in bands ({'; '.join(faults)})")
    return whole


def _first_line(error: Exception) -> str:
    """Say what a forward has raised; one that was refused has a sentence for it."""
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: {first}"


class _ScopeError(UnsupportedModelError):
    """A scope does not compute in bands what it does as a whole."""

    def __init__(self, why: str, scope: str | None) -> None:
        super().__init__(why)
        self.scope = scope


class _FramesError(UnsupportedModelError):
    """Tokens are looked at in so many equal parts."""

    def __init__(self, frames: int, where: str) -> None:
        super().__init__(f"tokens are looked at in {frames} parts in {where}")
        self.frames = frames


class _Finder:
    """One call of a model."""

    def __init__(self, skeleton: nn.Module, family: Family, args: Any, kwargs: Any, ranks: int) -> None:
        self._skeleton, self._family, self._ranks, self._call = skeleton, family, ranks, (args, kwargs)
        self._items = batch_of(args, kwargs, family.sample)
        self._whole, mode = self._rehearse(self._call, Rehearsal(Nobody(0, ranks), {}), {})
        self._masks = mode.masks
        places = {id(made): index for index, each in enumerate(self._whole.operations) for made in each.makes}
        self._needs = [(places[id(tensor)], length) for tensor, length in mode.needs]  # at which operation
        self._taller, self._more = self._another()

    def _another(self) -> tuple[Recording, int]:
        """Record the same call for a picture of another height; returns by how many rows, or tokens, it is taller, too."""
        faults = []
        for dim, more in heights(sample_of(*self._call, self._family.sample)):
            call = grown(*self._call, self._family.sample, dim, more)
            try:
                recording, _ = self._rehearse(call, Rehearsal(Nobody(0, self._ranks), {}), {})
            except Exception as error:  # whatever a forward may raise
                faults.append(_first_line(error))
                continue
            if [call.name for call in recording.calls] == [call.name for call in self._whole.calls]:
                return recording, more
            faults.append("it takes another path there")
        why = f" ({faults[0]})" if faults else ""
        raise UnsupportedModelError(f"{self._family.name} cannot be tried with a picture of another height{why}")

    def _rehearse(self, call: tuple[Any, Any], mode: Rehearsal, scopes: Mapping[str, Scope]) -> tuple[Recording, Rehearsal]:
        """Run the model on meta."""
        module, family = meta_copy(self._skeleton), self._family
        (args, kwargs), known = to_meta(call)
        if family.trace_inputs is not None:
            args, kwargs = family.trace_inputs(args, kwargs)
        if family.banded is not None:
            args, kwargs = family.banded(args, kwargs, mode)
        kept = shapes_kept(module, family.keep_shape)
        with family.tracing(), on_meta(known) as values, kept, mode.scoped(module, Bands(scopes, 0)):
            if (root := scopes.get("")) is not None:
                args, kwargs = mode._begins(root, None, args, kwargs)
            recording = record(module, args, kwargs, values, family.entry)
            if root is not None:
                mode._ends(root, None, None, recording.root.output)
        return recording, mode

    def _needed_in(self, name: str) -> list[int]:
        """List the lengths of keys and rows that a module needs; "" for the model itself."""
        call = next((call for call in self._whole.calls if call.name == name), self._whole.root)
        return [length for place, length in self._needs if call.begins <= place < call.ends]

    def _tried(self, scopes: Mapping[str, Scope], further: Collection[int] = ()) -> Bands:
        """Run the first and the last rank's part, and look whether any operation would need more than that.

        Args:
            further: lengths of axes that nothing is exchanged of.

        Raises:
            _ScopeError: one does, or fails.
        """
        expected = {name: self._needed_in(name) for name in scopes}
        axes = [axis for scope in scopes.values() for axis in scope.axes.values()]
        parts = dict.fromkeys(further, 1) | {axis.length: len(axis.parts) for axis in axes}
        for rank in (0, self._ranks - 1):
            exchange = Nobody(rank, self._ranks)
            mode = Rehearsal(exchange, scopes, expected)
            try:
                band, _ = self._rehearse(self._call, mode, scopes)
            except Exception as error:  # whatever a forward may raise
                where = f" in {mode.running}" if mode.running else ""
                raise _ScopeError(f"{_first_line(error)}{where}", mode.running) from error
            if not _alike(self._whole, band):
                raise _ScopeError("it takes another path on bands", _first_other(self._whole, band, scopes))
            borders = {(axis.length, axis.band(rank)): axis.borders(rank) for axis in axes}
            for one, other in zip(self._whole.operations, band.operations, strict=True):
                if (frames := torn(one, other, parts, self._items)) is not None:
                    raise _FramesError(frames, one.call.name or "its own forward")
                if why := mixes(one, other, borders, self._family.local):
                    raise _ScopeError(f"{why} in {one.call.name or 'its own forward'}", _scope_of(one.call, scopes))
        return Bands(
            {name: replace(scope, exchanges=tuple(mode.exchanges[name])) for name, scope in scopes.items()}, exchange.nbytes
        )

    # -- as a whole --------------------------------------------------------------------------------------------------

    def as_a_whole(self) -> Bands:
        """Find bands of rows of the picture."""
        if not _alike(self._whole, self._taller):
            raise UnsupportedModelError("it takes another path for another height")
        shares = {one.shape[dim]: Fraction(other.shape[dim] - one.shape[dim], self._more) for one, other, dim in self._tensors()}
        height = next((length for length, share in shares.items() if share == 1), 0)
        unit = math.lcm(*(share.denominator for share in shares.values()))
        bounds = [unit * round(height / unit * rank / self._ranks) for rank in range(self._ranks)]
        if any(a >= b for a, b in pairwise([*bounds, height])):
            raise UnsupportedModelError(f"{height} rows in steps of {unit} are too few for {self._ranks} ranks")
        rows = {length: Axis(((*(int(share * bound) for bound in bounds), length),)) for length, share in shares.items()}
        axes = {length: axis for length, axis in rows.items() if math.ceil(shares[length] * height) == length}
        for length in rows.keys() - axes.keys():  # rows and something else; or of a resampled picture whose last row is half one
            axes[length] = put_together(self._whole.operations, length, axes) or rows[length]
        gives = tuple(
            (number, dim, one.shape[dim])
            for number, one, other in tensor_pairs(self._whole.root.returned, self._taller.root.returned)
            for dim in varying(one, other)
        )
        if not gives:
            raise UnsupportedModelError("its result has no rows")
        places = divisible(self._whole.root, self._taller.root)
        used = {length for *_, length in (*places, *gives)} | {length for _, length in self._needs}
        takes = tuple((number, dim) for number, dim, _ in places)
        items = self._items
        single = {length for length in shares if items == 1 or length % items or length // items not in shares}
        return self._tried({"": Scope(takes, gives, {length: axis for length, axis in axes.items() if length in used})}, single)

    def _tensors(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield each tensor of the call and of the taller one that differ, and the dimension."""
        given = (flatten(recording.root.arguments)[0] for recording in (self._whole, self._taller))
        for _, one, other in tensor_pairs(*given):
            yield from ((one, other, dim) for dim in varying(one, other))
        for operation, taller in zip(self._whole.operations, self._taller.operations, strict=True):
            for one, other in zip(operation.makes, taller.makes, strict=True):
                yield from ((one, other, dim) for dim in varying(one, other))

    # -- by modules --------------------------------------------------------------------------------------------------

    def by_modules(self) -> Bands:
        """Find bands of tokens, in modules that take them and return as many."""
        avoided, faults = set[type](), list[str]()
        self._frames = 1
        while len(faults) < _MOST_FAULTS:
            blocks = self._blocks(avoided)
            if not blocks:
                faults.append("nothing takes tokens and returns as many")
                break
            try:
                return self._tried(self._chained(blocks))
            except _FramesError as error:  # each frame is looked at by itself: bands are of rows of all of them
                if self._frames != 1:
                    raise
                self._frames = error.frames
            except _ScopeError as error:
                faults.append(str(error))
                if error.scope is None:
                    break
                avoided.add(type(self._skeleton.get_submodule(error.scope)))
        raise UnsupportedModelError(faults[0])

    def _chained(self, blocks: Sequence[_Block]) -> dict[str, Scope]:
        """Make the scopes of these blocks, which hand bands on to each other where nobody else reads them."""
        scopes, bands = {}, set[int]()  # tensors that are bands when they are passed
        for index, block in enumerate(blocks):
            leaves = flatten(block.call.arguments)[0]
            takes = tuple(place for place in block.takes if id(leaves[place[0]]) not in bands)
            gives = tuple(give for give in block.gives if self._read_whole(block.call.returned[give[0]], blocks[index:]))
            for give in block.gives:
                (bands.discard if give in gives else bands.add)(id(block.call.returned[give[0]]))
            scopes[block.call.name] = Scope(takes, gives, block.axes, block.borders)
        return scopes

    def _blocks(self, avoided: Collection[type]) -> list[_Block]:
        """Find the largest modules, of none of these classes, that take tokens, return as many, and are worth gathering these."""
        twins = {call.name: call for call in self._taller.calls}
        times = Counter(call.name for call in self._whole.calls)
        found, prompts, tokens = list[_Block](), set[int](), set[int]()  # tensors that blocks have returned

        def walk(outer: ModuleCall) -> None:
            for call in outer.children:
                block = None
                if times[call.name] == 1 and type(call.module) not in avoided:
                    block = self._block(call, twins[call.name], prompts, tokens)
                if block is None:
                    walk(call)
                else:
                    found.append(block)

        walk(self._whole.root)
        return found

    def _block(self, call: ModuleCall, twin: ModuleCall, prompts: set[int], tokens: set[int]) -> _Block | None:
        """Find what is divided in a module; a prompt's tokens are, if it hands these on as well. None if it is none.

        Args:
            prompts, tokens: tensors that such modules before it have returned; those of this one are added.
        """
        lengths = {length for *_, length in divisible(call, twin)}
        returned = [(number, one, varying(one, other)) for number, one, other in tensor_pairs(call.returned, twin.returned)]
        changed = [(number, one, dims) for number, one, dims in returned if dims]
        if not changed or not all(len(dims) == 1 and one.shape[dims[0]] in lengths for _, one, dims in changed):
            return None
        passed = {id(leaf) for leaf in call.given} & tokens
        if not passed and call.macs < _LEAST_WORK * sum(one.nbytes for _, one, _ in changed):
            return None
        gives = [(number, dims[0], one.shape[dims[0]]) for number, one, dims in changed]
        leaves = flatten(call.arguments)[0]
        operations = self._whole.operations[call.begins : call.ends]
        written = {memory_of(tensor) for operation in operations for tensor in operation.writes}
        axes = {length: self._axis(length) for *_, length in gives}
        for number, dim, length in gives:
            axes |= flattened(call.returned[number].shape, dim, axes[length])
        borders = list[tuple[int, int]]()
        for length in list(axes):
            for numbers, sizes in chains(call.arguments, length):
                axes |= {size: self._axis(size) for size in sizes if size >= self._ranks}
                axes[length] = Axis(
                    tuple(part for size in sizes for part in (axes[size].parts if size in axes else ((0, size),)))
                )
                borders += [(number, length) for number in numbers]
        takes = list[Place]()
        for number, one, other in tensor_pairs(leaves, flatten(twin.arguments)[0]):
            if one.ndim < 3 or varying(one, other):
                continue
            for place, result, dims in returned:
                if not dims and result.shape == one.shape and (result is not one or memory_of(one) in written):
                    gives.append((place, 1, one.shape[1]))
                    break
            else:
                if id(one) not in prompts:
                    continue
            takes.append((number, 1))
            axes[one.shape[1]] = self._axis(one.shape[1])
        places = [place for place in divisible(call, twin) if memory_of(leaves[place[0]]) not in self._masks]
        for length in (*(length for *_, length in places), *self._needed_in(call.name)):
            if length not in axes and (axis := put_together(operations, length, axes)) is not None:
                axes[length] = axis
        if any(length not in axes for *_, length in places):
            return None
        tokens.update(id(one) for _, one, _ in changed)
        prompts.update(id(call.returned[number]) for number, *_ in gives[len(changed) :])
        return _Block(call, (*takes, *((number, dim) for number, dim, _ in places)), tuple(gives), axes, tuple(borders))

    def _bounds(self, length: int) -> tuple[int, ...]:
        if length < self._ranks:
            raise UnsupportedModelError(f"{length} tokens are too few for {self._ranks} ranks")
        return tuple(length * rank // self._ranks for rank in range(self._ranks + 1))

    def _axis(self, length: int) -> Axis:
        """Return the axis of so many tokens."""
        frames = 1 if length % self._frames else self._frames
        return Axis((self._bounds(length // frames),) * frames)

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
    """A block that can compute in bands; ``takes`` and ``gives`` as if everything were whole around it."""

    call: ModuleCall
    takes: tuple[Place, ...]
    gives: tuple[tuple[int, int, int], ...]
    axes: Mapping[int, Axis]
    borders: tuple[tuple[int, int], ...]


def _scope_of(call: ModuleCall | None, scopes: Collection[str]) -> str | None:
    """Find the scope that a call is in."""
    while call is not None:
        if call.name in scopes:
            return call.name
        call = call.parent
    return None


def _first_other(whole: Recording, band: Recording, scopes: Collection[str]) -> str | None:
    """Find the scope in which the first operation is that only one of the two has."""
    for one, other in zip(whole.operations, band.operations, strict=False):
        if _kind(one) != _kind(other):
            return _scope_of(one.call, scopes)
    return None


def _alike(one: Recording, other: Recording) -> bool:
    return list(map(_kind, one.operations)) == list(map(_kind, other.operations))


def _kind(operation: Operation) -> tuple[Any, int, int]:
    return operation.func, len(operation.reads), len(operation.makes)
