"""Settings that a rank applies before it imports any class of the host."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"


@dataclass(frozen=True)
class HostSettings:
    """The host's command line, for a worker process.

    A worker finds the parent's modules but starts with default flags. These flags choose the attention, the precisions and the
    memory policy at import.
    """

    flags: dict[str, Any]

    @classmethod
    def current(cls) -> HostSettings:
        """The settings of this process."""
        from comfy.cli_args import args

        return cls(dict(vars(args)))

    def __call__(self) -> None:
        """Apply them, before ``comfy.model_management`` is imported."""
        # the host's kernels import it without using it, which takes two fifths of a rank's start
        sys.modules.setdefault(_COMPILER, _Later(_COMPILER))
        from comfy.cli_args import args

        vars(args).update(self.flags)


class _Later(ModuleType):
    """A module that is imported once something of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # code that goes through all modules looks for these, and uses none
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)
