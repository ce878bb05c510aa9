"""What a network, and its input, are to this package."""

from typing import Any, TypeAlias

import torch

# Of a class of ComfyUI's or diffusers', who alone know of what types its attributes are, such as ``config``. Of nn.Module, a type
# checker takes each for a tensor or a module.
Network: TypeAlias = Any


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make an input of this shape for a trace."""
    return torch.empty(shape, dtype=dtype, device="meta")
