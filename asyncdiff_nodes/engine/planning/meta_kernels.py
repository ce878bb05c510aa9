"""Operations on the meta device, where PyTorch's own kernels differ from those of devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

_CONVOLUTION, _CUDNN = torch.ops.aten.convolution.default, torch.ops.aten.cudnn_convolution.default
_VALUES: type[Iterable[Any]] = type({}.values())


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
