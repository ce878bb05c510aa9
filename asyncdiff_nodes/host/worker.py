"""What a rank does before it imports any class of the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HostSettings:
    """The host's command line, for a worker process.

    A worker finds the parent's modules but starts with default flags, and these choose the attention, the precisions and the
    memory policy at import.
    """

    flags: dict[str, Any]

    @classmethod
    def current(cls) -> HostSettings:
        """Those of this process."""
        from comfy.cli_args import args

        return cls(dict(vars(args)))

    def __call__(self) -> None:
        """Apply them, before ``comfy.model_management`` is imported."""
        from comfy.cli_args import args

        vars(args).update(self.flags)
