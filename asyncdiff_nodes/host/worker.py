"""What a rank does before it imports any class of the host."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HostSettings:
    """The host's command line, for a worker process.

    A worker starts with the parent's ``sys.path`` but with default flags, and these choose the attention, the precisions and
    the memory policy at import.
    """

    path: tuple[str, ...]
    flags: dict[str, Any]

    @classmethod
    def current(cls) -> HostSettings:
        """Those of this process."""
        from comfy.cli_args import args

        return cls(tuple(sys.path), dict(vars(args)))

    def __call__(self) -> None:
        """Apply them, before ``comfy.model_management`` is imported."""
        sys.path[:] = self.path
        from comfy.cli_args import args

        vars(args).update(self.flags)
