"""Modules of other packs, by reference."""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PackModule:
    """A module of a pack that the host has loaded.

    Attributes:
        package: the host's name for the pack, which is made of its path.
        folder: where it is.
        name: of the module within it.
    """

    package: str
    folder: str
    name: str

    @classmethod
    def of(cls, thing: Any) -> PackModule | None:
        """The module that defines ``thing``, a class or function; None if it is none within a package."""
        package, _, name = thing.__module__.rpartition(".")
        folders = getattr(sys.modules.get(package), "__path__", ())
        return cls(package, folders[0], name) if folders else None

    @property
    def pack(self) -> str:
        """The name of the pack's folder, in lower case: some ways of installing one change that."""
        return self.package.replace("\\", "/").rpartition("/")[2].lower()

    @property
    def of_host(self) -> bool:
        """Whether the host itself has loaded the pack, as in ComfyUI's process, and not :meth:`load` this module alone."""
        return hasattr(sys.modules.get(self.package), "__file__")

    def load(self) -> types.ModuleType:
        """The module, imported in a rank from the same file and under the same name.

        The pack's ``__init__`` is not run there: it makes nodes, and imports whatever they need.
        """
        if self.package not in sys.modules:
            package = types.ModuleType(self.package)
            package.__path__ = [self.folder]
            sys.modules[self.package] = package
        return importlib.import_module(f"{self.package}.{self.name}")
