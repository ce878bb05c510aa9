"""Operations on the meta device, where PyTorch's own kernels differ from those of devices."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cache
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

_CONVOLUTION, _CUDNN = torch.ops.aten.convolution.default, torch.ops.aten.cudnn_convolution.default
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_VALUES: type[Iterable[Any]] = type({}.values())


class MetaKernels:
    """Runs operations on meta, those that make new tensors once for each layout of what they are given.

    PyTorch's own kernels for meta are in Python, and most of what a forward takes there. Blocks are alike: what one of them did
    says what the others will make.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, list[tuple[torch.Size, tuple[int, ...], torch.dtype]]] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation; see :func:`run`."""
        if not _makes_new(func):
            return run(func, args, kwargs)
        try:
            key = func, torch.get_default_dtype(), _layout(args), tuple(kwargs), _layout(kwargs.values())
            known = self._made.get(key)
        except TypeError:
            return run(func, args, kwargs)
        if known is not None:
            made = tuple(torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in known)
            return made if len(func._schema.returns) > 1 else made[0]
        out = run(func, args, kwargs)
        made = (out,) if isinstance(out, torch.Tensor) else out
        if all(type(tensor) is torch.Tensor and tensor.is_meta for tensor in made) and not _shares_memory(made, args, kwargs):
            self._made[key] = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in made]
        return out


@cache
def _makes_new(func: Any) -> bool:
    """Whether an operation says that it writes to nothing, and returns nothing but tensors that are no views."""
    returns = func._schema.returns
    tensors = all(str(each.type) == "Tensor" and each.alias_info is None for each in returns)
    return bool(returns) and tensors and not func._schema.is_mutable


def _layout(given: Iterable[Any]) -> Hashable:
    """Return all that the result's layout can depend on. Raises TypeError where more than layouts may count."""
    found: list[Hashable] = []
    for value in given:
        if isinstance(value, torch.Tensor):
            if type(value) not in _PLAIN or not value.is_meta or value.is_complex():
                raise TypeError
            found.append((value.shape, value.stride(), value.dtype))
        else:
            found.append(_layout(value) if isinstance(value, list | tuple) else (type(value), value))
    return tuple(found)


def _shares_memory(made: Iterable[torch.Tensor], args: Any, kwargs: Any) -> bool:
    """Whether one of these is a view of what was given, or of another, though its operation does not say so."""
    made = list(made)
    memory = [tensor.untyped_storage()._cdata for tensor in (*made, *operands((args, kwargs.values())))]
    return bool(set(memory[: len(made)]) & set(memory[len(made) :])) or len(set(memory[: len(made)])) < len(made)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on meta, with a result as devices give it.

    cuDNN's convolution has no meta kernel, so it runs as the usual one. (ComfyUI calls it for 3D convolutions on NVIDIA's GPUs,
    since the usual one takes too much memory in some versions of PyTorch.) And torch's meta kernel of 2D convolutions leaves the
    memory format open. Values cross in the traced layouts, and other kernels serve another layout, with other rounding.
    """
    if func is _CUDNN:
        value, weight, padding, stride, dilation, groups = args[:6]
        return torch.ops.aten.convolution(value, weight, None, stride, padding, dilation, False, [0] * len(padding), groups)
    out = func(*args, **kwargs)
    if func is not _CONVOLUTION or out.ndim != 4:
        return out
    last = torch.channels_last in map(suggest_memory_format, args[:2])
    return torch.empty_like(out, memory_format=torch.channels_last) if last else out


def operands(given: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors among the arguments of an operation; at most lists of them are nested there.

    >>> len(operands(([torch.ones(1), [torch.ones(1), None]], {"dim": 1}.values())))
    2
    """
    found: list[torch.Tensor] = []
    for value in given:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple | _VALUES):
            found += operands(value)
    return found
