"""Modules of other packs, by reference."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from dataclasses import dataclass
from typing import Any

# where the host keeps what it calls between a sampler's evaluation of the model and the network
_WRAPPERS = ("predict_noise", "calc_cond_batch", "apply_model", "diffusion_model")
_FUNCTIONS = ("model_function_wrapper", "sampler_calc_cond_batch_function", "sampler_cfg_function")
_LISTS = ("sampler_pre_cfg_function", "sampler_post_cfg_function")


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


def code_name(function: Any) -> str:
    """Where a function, or an object that is called, comes from, as its author wrote it."""
    if isinstance(function, tuple):  # forward_timestep_embed_patch: (class, function)
        function = function[-1]
    named = function if hasattr(function, "__qualname__") else type(function)
    module = (named.__module__ or "").replace("\\", "/").rpartition("/")[2]  # packs are loaded under path-like names
    return f"{module}.{named.__qualname__.split('.<locals>')[0]}"


def origins_of(thing: Any) -> list[str]:
    """The modules whose code ``thing`` runs, the outermost first: a function under its decorators, or what is called as one."""
    if isinstance(thing, functools.partial):
        return origins_of(thing.func)
    function = getattr(thing, "__func__", thing)
    if not isinstance(function, types.FunctionType):
        return [(thing if isinstance(thing, type) else type(thing)).__module__]
    found = [function.__globals__.get("__name__", "")]  # which no decorator changes
    inner = vars(function).get("__wrapped__")
    return found if inner is None else found + origins_of(inner)


def of_host(thing: Any, *packages: str) -> bool:
    """Whether the host or this pack defines ``thing``, or one of the ``packages``, whatever PyTorch decorates it with."""
    *outer, inner = (origin.partition(".")[0] for origin in origins_of(thing))
    own = packages or ("comfy", "comfy_api", "comfy_extras", "asyncdiff_nodes")
    return inner in own and all(each in (*own, "torch") for each in outer)


def around(model_options: dict[str, Any]) -> list[Any]:
    """What is called between a sampler's evaluation of the model and the network, and may call that as it likes."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    found = [each for kind in _WRAPPERS for hooks in wrappers.get(kind, {}).values() for each in hooks]
    found += [model_options[name] for name in _FUNCTIONS if name in model_options]
    return found + [each for name in _LISTS for each in model_options.get(name, ())]
