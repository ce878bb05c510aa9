"""Which operations give for a band what they give for the whole, seen from one operation on both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .recording import Operation

_aten = torch.ops.aten

# whatever its values, or none at all
_CONSTANT = {_aten.zeros, _aten.ones, _aten.full, _aten.empty, _aten.empty_strided, _aten.scalar_tensor}
# the same values, otherwise arranged; shapes alone show what is cut off or put together
_ARRANGED = {
    *(_aten.view, _aten._unsafe_view, _aten.reshape, _aten._reshape_alias, _aten.as_strided, _aten.transpose, _aten.t),
    *(_aten.permute, _aten.unsqueeze, _aten.squeeze, _aten.expand, _aten.detach, _aten.alias, _aten.clone, _aten._to_copy),
    *(_aten.copy_, _aten.unbind, _aten.select, _aten.slice, _aten.split, _aten.split_with_sizes, _aten.cat, _aten.stack),
    *(_aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.empty_like, _aten.zeros_like, _aten.ones_like),
    *(_aten.full_like, _aten.lift_fresh, _aten.contiguous, _aten.zero_, _aten.fill_, _aten.native_dropout, _aten.dropout),
    *(_aten.pixel_shuffle, _aten.pixel_unshuffle, _aten.upsample_nearest2d, _aten._upsample_nearest_exact2d),
    *(_aten.upsample_nearest3d, _aten.upsample_nearest1d, _aten.view_as_complex, _aten.view_as_real, _aten.unflatten),
}
_PICKED = {_aten.slice, _aten.split, _aten.split_with_sizes, _aten.cat, _aten.select, _aten.narrow}
_PRODUCTS = {_aten.mm: (0, 1), _aten.bmm: (0, 1), _aten.addmm: (1, 2), _aten.baddbmm: (1, 2), _aten.linear: (0, 1)}
_NORMS = {_aten.native_layer_norm, _aten.layer_norm, _aten.rms_norm, _aten._fused_rms_norm}
_OVER_ONE = {_aten._softmax, _aten.softmax, _aten._log_softmax}
_OVER_SOME = {
    *(_aten.mean, _aten.sum, _aten.amax, _aten.amin, _aten.var, _aten.std, _aten.var_mean, _aten.linalg_vector_norm),
    *(_aten.roll, _aten.flip, _aten.prod, _aten.norm),
}


def mixes(whole: Operation, band: Operation, known: Callable[[int, int], bool]) -> str | None:
    """Say what an operation on a band needs of other bands, given the same one on the whole; None if nothing.

    Args:
        known: whether so many of the whole, in a band so many, are an axis that is divided.
    """
    func = whole.func._overloadpacket
    reads = [varying(one, other) for one, other in zip(whole.reads, band.reads, strict=True)]
    makes = [varying(one, other) for one, other in zip(whole.makes, band.makes, strict=True)]
    if not any(reads):
        return f"{func} makes positions" if any(makes) and func not in _CONSTANT else None
    if not _is_local(func, whole, reads, makes):
        return f"{func} of all tokens or rows"
    if func in _PICKED:
        sizes = (
            (one.shape[dim], other.shape[dim])
            for one, other in zip(whole.makes, band.makes, strict=True)
            for dim in varying(one, other)
        )
        if not all(known(*size) for size in sizes) or len(makes) != sum(map(bool, makes)):
            return f"{func} takes some of the tokens or rows"
    return None


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
