"""Operations that give for a band what they give for the whole: told by one operation on both."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .recording import Operation

_aten = torch.ops.aten

Borders = Sequence[tuple[int, int]]  # of the parts of an axis: in the whole, and in a band

# whatever its values, or none at all
_CONSTANT = {_aten.zeros, _aten.ones, _aten.full, _aten.empty, _aten.empty_strided, _aten.scalar_tensor, _aten.expand}
# the same values, otherwise arranged; shapes alone show what is cut off or put together
_ARRANGED = {
    *(_aten.view, _aten._unsafe_view, _aten.reshape, _aten._reshape_alias, _aten.transpose, _aten.t),
    *(_aten.permute, _aten.unsqueeze, _aten.squeeze, _aten.expand, _aten.detach, _aten.alias, _aten.clone, _aten._to_copy),
    *(_aten.copy_, _aten.unbind, _aten.select, _aten.slice, _aten.split, _aten.split_with_sizes, _aten.cat, _aten.stack),
    *(_aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.empty_like, _aten.zeros_like, _aten.ones_like),
    *(_aten.full_like, _aten.lift_fresh, _aten.contiguous, _aten.zero_, _aten.fill_, _aten.native_dropout, _aten.dropout),
    *(_aten.pixel_shuffle, _aten.pixel_unshuffle, _aten.view_as_complex, _aten.view_as_real, _aten.unflatten),
}
_VIEWS = {_aten.view, _aten._unsafe_view, _aten.reshape}
_DIMS = {_aten.slice: 1, _aten.split: 2, _aten.split_with_sizes: 2, _aten.cat: 1, _aten.select: 1}  # place of the dimension
_PICKED = _DIMS.keys()
_PRODUCTS = {_aten.mm: (0, 1), _aten.bmm: (0, 1), _aten.addmm: (1, 2), _aten.baddbmm: (1, 2), _aten.linear: (0, 1)}
_NORMS = {_aten.native_layer_norm, _aten.layer_norm, _aten.rms_norm, _aten._fused_rms_norm}
_OVER_ONE = {_aten._softmax, _aten.softmax, _aten._log_softmax}
_OVER_SOME = {
    *(_aten.mean, _aten.sum, _aten.amax, _aten.amin, _aten.var, _aten.std, _aten.var_mean, _aten.linalg_vector_norm),
    *(_aten.roll, _aten.flip, _aten.prod, _aten.norm),
}


def mixes(whole: Operation, band: Operation, axes: Mapping[tuple[int, int], Borders], local: Collection[str]) -> str | None:
    """Say what an operation on a band needs of other bands, given the same one on the whole; None if nothing.

    Args:
        axes: by length of the whole and of the band.
        local: as of :class:`~.family.Family`.
    """
    func = whole.func._overloadpacket
    reads = [varying(one, other) for one, other in zip(whole.reads, band.reads, strict=True)]
    makes = [varying(one, other) for one, other in zip(whole.makes, band.makes, strict=True)]
    if _numbers(whole) != _numbers(band):
        return f"{func} with a number that depends on how many tokens or rows there are"
    if not any(reads):
        same = func in _CONSTANT or (func is _aten.repeat and _repeats_one(whole, makes[0]))
        return f"{func} makes positions" if any(makes) and not same else None
    if str(func) in local:  # whose shapes are not checked
        lengths = {one.shape[dim] for one, dims in zip(whole.reads, reads, strict=True) for dim in dims}
        if any(not dims and lengths & set(one.shape[:-1]) for one, dims in zip(whole.reads, reads, strict=True)):
            return f"{func} of all tokens or rows"
        return None
    if not _is_local(func, whole, reads, makes):
        return f"{func} of all tokens or rows"
    if func in _PICKED and not _between_parts(func, whole, band, reads[0], axes):
        return f"{func} takes some of the tokens or rows"
    return None


def _numbers(operation: Operation) -> list[Any]:
    """List the numbers among what an operation is given that are no sizes or places."""
    every = torch.Tag.pointwise in operation.func.tags
    leaves = tree_leaves((operation.args, operation.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, float) or (every and type(leaf) is int)]


def _between_parts(
    func: Any, whole: Operation, band: Operation, dims: Sequence[int], axes: Mapping[tuple[int, int], Borders]
) -> bool:
    """Whether what is picked of an axis, or put together, is whole parts of it."""
    source, ends = whole.reads[0], [(0, 0)]
    dim = (whole.args[_DIMS[func]] if len(whole.args) > _DIMS[func] else 0) % source.ndim
    if func is _aten.cat:
        sizes = whole.makes[0].shape[dim], band.makes[0].shape[dim]
        return (
            sizes[0] == sizes[1]
            or sizes in axes
            or not any(dim in varying(*pair) for pair in zip(whole.reads, band.reads, strict=True))
        )
    if dim not in dims:
        return True
    if func is _aten.select:
        return False
    sizes = source.shape[dim], band.reads[0].shape[dim]
    if func is _aten.slice:
        ends = list(zip(_slice_of(whole, dim), _slice_of(band, dim), strict=True))
    else:
        for one, other in zip(whole.makes, band.makes, strict=True):
            ends.append((ends[-1][0] + one.shape[dim], ends[-1][1] + other.shape[dim]))
    return set(ends) <= {(0, 0), sizes, *axes.get(sizes, ())}


def _slice_of(operation: Operation, dim: int) -> tuple[int, int]:
    """Return where a slice begins and ends."""
    start, end = (*operation.args[2:4], None, None)[:2]
    begin, stop, _ = slice(start, end).indices(operation.reads[0].shape[dim])
    return begin, stop


def torn(whole: Operation, band: Operation, axes: Mapping[int, int], items: int = 1) -> int | None:
    """Return of how many parts a view takes tokens to be that are an axis of fewer: bands of it are other tokens than it says.

    Args:
        axes: length of each axis -> of how many parts it is.
        items: how many each tensor has; the tokens of all of them in one row may be as many as those of another axis.

    Twelve tokens of three frames; a band is the first six of them, or the first two of each frame:

    >>> from types import SimpleNamespace
    >>> view = [SimpleNamespace(func=_aten.view.default, reads=[torch.empty(n)], makes=[torch.empty(3, n // 3)]) for n in (12, 6)]
    >>> torn(*view, {12: 1}), torn(*view, {12: 3}), torn(*view, {12: 1}, items=3)
    (3, None, None)
    """
    if whole.func._overloadpacket not in _VIEWS:
        return None
    source, made = (whole.reads[0], band.reads[0]), (whole.makes[0], band.makes[0])
    return _parted(source, made, axes, items) or _parted(made, source, axes, items)


def _parted(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor], axes: Mapping[int, int], items: int
) -> int | None:
    """Find an axis of ``one``, whole and band, that is several equal parts in ``other``."""
    here, there = ({each[0].shape[dim]: dim for dim in varying(*each)} for each in (one, other))
    for length in here.keys() & axes.keys() - there.keys():
        for part, dim in there.items():
            parts = other[0].shape[dim - 1] if dim else 1
            if here[length] == 0 and dim == 1 and parts == items:  # the tokens of all items, one after the other
                continue
            if parts > 1 and part * parts == length and parts != axes[length]:
                return parts
    return None


def _repeats_one(whole: Operation, dims: Sequence[int]) -> bool:
    """Whether what a tensor is repeated along is one value on each of ``dims``."""
    source, made = whole.reads[0], whole.makes[0]
    return all(dim < made.ndim - source.ndim or source.shape[dim - made.ndim] == 1 for dim in dims)


def varying(whole: torch.Tensor, band: torch.Tensor) -> list[int]:
    """Return the dimensions in which two tensors differ.

    >>> varying(torch.empty(2, 8, 4), torch.empty(2, 4, 4))
    [1]
    """
    if whole.ndim != band.ndim:
        return list(range(max(whole.ndim, band.ndim)))
    return [dim for dim, (one, other) in enumerate(zip(whole.shape, band.shape, strict=True)) if one != other]


def _is_local(func: Any, whole: Operation, reads: Sequence[Sequence[int]], makes: Sequence[Sequence[int]]) -> bool:
    if func in _PRODUCTS:
        return _multiplies_alone(*_PRODUCTS[func], whole, reads)
    tensor, dims = whole.reads[0], reads[0]
    if func in _NORMS:
        return all(dim < tensor.ndim - len(whole.args[1]) for dim in dims) and not any(reads[1:])
    if func in _OVER_ONE or func in _OVER_SOME:
        over = whole.args[1] if len(whole.args) > 1 else whole.kwargs.get("dim")
        if func in {_aten.linalg_vector_norm, _aten.norm}:
            over = whole.args[2] if len(whole.args) > 2 else whole.kwargs.get("dim")
        if func in {_aten.roll}:
            over = whole.args[2] if len(whole.args) > 2 else None
        over = [over] if isinstance(over, int) else list(over or ())
        return bool(over) and not {dim % tensor.ndim for dim in over}.intersection(dims)
    if func is _aten.repeat:
        return all(whole.args[1][dim - tensor.ndim] == 1 for dim in dims)
    if func is _aten.embedding:
        return not reads[0]
    if func is _aten.constant_pad_nd:
        padded = {tensor.ndim - 1 - place // 2 for place, pad in enumerate(whole.args[1]) if pad}
        return not padded.intersection(dims)
    if func is _aten.avg_pool2d:
        return list(whole.args[1]) == list(whole.args[2] or whole.args[1]) and not any(whole.args[3:4] and whole.args[3])
    if func is _aten.convolution:  # those that exchange rows are not seen here
        transposed, apart = whole.args[6], list(whole.args[3]) == list(whole.args[1].shape[2:])
        return transposed and apart and not any(whole.args[4]) and not any(reads[1:])
    return func in _ARRANGED or torch.Tag.pointwise in whole.func.tags


def _multiplies_alone(left: int, right: int, whole: Operation, reads: Sequence[Sequence[int]]) -> bool:
    """Whether rows of the band are multiplied with what every rank has as a whole."""
    tensors = [leaf for leaf in whole.args if isinstance(leaf, torch.Tensor)]
    first = tensors[left]
    inner = first.ndim - 1
    others = reads[right]
    return inner not in reads[left] and all(dim == 0 and first.ndim == 3 and 0 in reads[left] for dim in others)
