"""Modules of other packs, by reference."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from dataclasses import dataclass
from typing import Any

# the host's keys for functions that it calls between a sampler's evaluation of the model and the network
_WRAPPERS = ("predict_noise", "calc_cond_batch", "apply_model", "diffusion_model")
_FUNCTIONS = ("model_function_wrapper", "sampler_calc_cond_batch_function", "sampler_cfg_function")
_LISTS = ("sampler_pre_cfg_function", "sampler_post_cfg_function")


@dataclass(frozen=True)
class PackModule:
    """A module of a pack that the host has loaded.

    Attributes:
        package: the host's name for the pack, made from its path.
        folder: the pack's folder.
        name: the name of the module within the pack.
    """

    package: str
    folder: str
    name: str

    @classmethod
    def of(cls, thing: Any) -> PackModule | None:
        """The module that defines ``thing``, a class or function; None if it is not in a package."""
        package, _, name = thing.__module__.rpartition(".")
        folders = getattr(sys.modules.get(package), "__path__", ())
        return cls(package, folders[0], name) if folders else None

    @property
    def pack(self) -> str:
        """The name of the pack's folder, in lower case, since some ways to install a pack change the case."""
        return self.package.replace("\\", "/").rpartition("/")[2].lower()

    @property
    def of_host(self) -> bool:
        """Whether the host itself has loaded the pack, as in ComfyUI's process, or only :meth:`load` this module."""
        return hasattr(sys.modules.get(self.package), "__file__")

    def load(self) -> types.ModuleType:
        """Import the module; in a rank, from the same file and under the same name.

        A rank does not run the pack's ``__init__``, which makes nodes and imports whatever they need.
        """
        if self.package not in sys.modules:
            package = types.ModuleType(self.package)
            package.__path__ = [self.folder]
            sys.modules[self.package] = package
        return importlib.import_module(f"{self.package}.{self.name}")


def code_name(function: Any) -> str:
    """Module and name of a function, or of an object that is called, as its author wrote them."""
    if isinstance(function, tuple):  # forward_timestep_embed_patch: (class, function)
        function = function[-1]
    named = function if hasattr(function, "__qualname__") else type(function)
    module = (named.__module__ or "").replace("\\", "/").rpartition("/")[2]  # packs are loaded under path-like names
    return f"{module}.{named.__qualname__.split('.<locals>')[0]}"


def origins_of(thing: Any) -> list[str]:
    """The modules whose code ``thing`` runs, outermost first: of a function's decorators and the function, or of an object."""
    if isinstance(thing, functools.partial):
        return origins_of(thing.func)
    function = getattr(thing, "__func__", thing)
    if not isinstance(function, types.FunctionType):
        return [(thing if isinstance(thing, type) else type(thing)).__module__]
    origins = [function.__globals__.get("__name__", "")]  # no decorator changes this
    inner = vars(function).get("__wrapped__")
    return origins if inner is None else origins + origins_of(inner)


def of_host(thing: Any, *packages: str) -> bool:
    """Whether the host or this pack, or one of ``packages`` if given, defines ``thing``; PyTorch may decorate it."""
    *outer, inner = (origin.partition(".")[0] for origin in origins_of(thing))
    own = packages or ("comfy", "comfy_api", "comfy_extras", "asyncdiff_nodes")
    return inner in own and all(each in (*own, "torch") for each in outer)


def around(model_options: dict[str, Any]) -> list[Any]:
    """Functions called between a sampler's evaluation of the model and the network; they may call that in any way."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    called = [each for kind in _WRAPPERS for hooks in wrappers.get(kind, {}).values() for each in hooks]
    called += [model_options[name] for name in _FUNCTIONS if name in model_options]
    return called + [each for name in _LISTS for each in model_options.get(name, ())]
