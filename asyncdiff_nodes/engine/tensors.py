"""Tensors without what computes with them: their layouts, their memory, and those that a module holds."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedModelError


@dataclass(frozen=True)
class TensorMeta:
    """Shape, stride (in elements) and dtype of one tensor; what a receiver needs to allocate it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def __reduce__(self) -> tuple[Any, ...]:
        """Name the dtype: pickle would look for the module that it comes from, among all, each time."""
        return _meta, (self.shape, self.stride, str(self.dtype).removeprefix("torch."))

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorMeta:
        """Return the layout of ``tensor``; a tensor with gaps or overlaps (an expanded view) gets the contiguous one.

        Strides of dimensions of one element place nothing, but kernels are chosen by them. They are kept:

        >>> TensorMeta.of(torch.empty_strided((1, 3, 2, 2), (3, 1, 6, 3), device="meta")).stride
        (3, 1, 6, 3)
        """
        # on meta, empty_like would choose other strides for such dimensions
        dense = tensor if tensor.is_contiguous() or _is_dense(tensor) else torch.empty_like(tensor, device="meta")
        return cls(tuple(tensor.shape), dense.stride(), tensor.dtype)

    def divides(self, batch: int) -> bool:
        """Whether the first dimension can be that of a batch of so many items, each of which is in one piece."""
        return bool(self.shape) and self.shape[0] % batch == 0 and self.stride[0] * self.shape[0] == self.numel

    def part(self, items: int, batch: int) -> TensorMeta:
        """Return the layout for ``items`` of the ``batch`` items; see :meth:`divides`."""
        return TensorMeta((self.shape[0] // batch * items, *self.shape[1:]), self.stride, self.dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the elements."""
        return self.numel * self.dtype.itemsize


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie one after the other, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _meta(shape: tuple[int, ...], stride: tuple[int, ...], dtype: str) -> TensorMeta:
    return TensorMeta(shape, stride, getattr(torch, dtype))


def empty(meta: TensorMeta, device: torch.device | str = "cpu") -> torch.Tensor:
    """Allocate an uninitialised tensor of this layout."""
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=device)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """View the elements of a dense tensor in memory order, without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def memory(tensor: torch.Tensor) -> memoryview:
    """View the bytes of a dense tensor on the CPU with at least one element; they are there for as long as the tensor is."""
    # ctypes rather than numpy: the engine needs torch and the standard library only, and numpy has no bfloat16
    nbytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


def dense_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Move ``tensor`` to the CPU, without gaps; returns it itself where it already is."""
    tensor = _as_in_memory(tensor)
    if tensor.is_cpu and tensor.is_contiguous():
        return tensor
    tensor = tensor.detach().to("cpu")
    meta = TensorMeta.of(tensor)
    return tensor if tensor.stride() == meta.stride else empty(meta).copy_(tensor)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """Make a dense copy on the CPU.

    Where the tensor is dense and there, this thread alone makes it: to wake others takes longer, the more so where ranks use all
    cores.
    """
    tensor = _as_in_memory(tensor.detach())
    dense = empty(TensorMeta.of(tensor))
    if tensor.is_cpu and tensor.stride() == dense.stride() and tensor.numel():
        memory(dense)[:] = memory(tensor)
        return dense
    return dense.copy_(tensor)


def _as_in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return it, but where PyTorch conjugates or negates only as it reads: then a tensor whose memory holds the values."""
    return tensor.resolve_conj().resolve_neg()


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and values of all parameters and buffers, shared ones under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def meta_copy(module: nn.Module, hollow: Iterable[nn.Module] = ()) -> nn.Module:
    """Copy ``module`` with its parameters and buffers on the meta device; no weight is copied on the way.

    Args:
        hollow: modules within it whose copies have no weights and no children.

    Raises:
        UnsupportedModelError: the module tree holds tensors in other places, or cannot be copied.
    """
    memo: dict[int, Any] = {id(members): {} for each in hollow for members in (each._parameters, each._buffers, each._modules)}
    for _, tensor in tensors_of(module):
        shape_only = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(shape_only, requires_grad=False) if isinstance(tensor, nn.Parameter) else shape_only
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"the module tree of this {type(module).__name__} cannot be copied without its weights ({error}); remove hooks "
            "and quantised layers that hold tensors of their own"
        ) from error
