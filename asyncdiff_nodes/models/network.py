"""What a network is to this package."""

from typing import Any, TypeAlias

# Of a class of ComfyUI's or diffusers', who alone know of what types its attributes are, such as ``config``. Of nn.Module, a type
# checker takes each for a tensor or a module.
Network: TypeAlias = Any
