"""Foreign code on a live network. A rank builds the network from the files of its classes, so it does not have such code.

It is found on the objects (functions among a module's attributes, forward hooks, other children), on their classes (methods
defined elsewhere), and among the functions that these classes' modules call by name.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
import sysconfig
import types
from collections.abc import Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import comfy
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .packs import code_name, origins_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
# modules that all classes of the host use; they are searched like the modules of a network's own classes
_SHARED = ("comfy.ops", "comfy.ldm.modules.attention", "torch.nn.functional")
_NETWORKS = ("comfy.ldm.", "comfy.cldm.")  # the host's modules of networks
_OWN = vars(nn.Module()).keys()  # attributes that every module has, so not a network's own
_HOST = os.path.dirname(os.path.abspath(next(iter(comfy.__path__))))
_LIBRARIES = tuple({os.path.dirname(os.path.dirname(torch.__file__)), *map(sysconfig.get_path, ("purelib", "platlib"))})

# class or module -> its functions when they were last seen to be its own
_known: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


def functions_of(network: nn.Module) -> dict[str, Any]:
    """Attributes of ``network`` and its modules that can be called, by place, in a form to compare with another network's."""
    functions = {}
    for name, module in network.named_modules():
        attributes = vars(module)
        for attribute in attributes.keys() - _OWN:
            if callable(attributes[attribute]):
                functions[_place(name, attribute)] = _comparable(attributes[attribute])
        for hooks in _HOOKS:
            functions |= {_place(name, f"forward hook {code_name(hook)}"): hook for hook in attributes[hooks].values()}
    return functions


def foreign_classes(network: nn.Module) -> list[str]:
    """Names of foreign functions, on the classes of ``network`` and its modules or in the Python modules of these classes.

    A function is foreign if it is not from the class's own module, the host, PyTorch or the standard library.
    """
    return _foreign(_owners(network))


class Watched:
    """The code of a live network as it was at first, so that every call can check quickly whether it has changed."""

    def __init__(self, network: nn.Module) -> None:
        self._network, self._owners = network, _owners(network)
        self._look()

    def _look(self) -> None:
        self._modules = list(self._network.modules())
        self._attributes = list(map(vars, self._modules))
        self._children = [each["_modules"] for each in self._attributes]
        self._hooks = [each[name] for each in self._attributes for name in _HOOKS]
        self._kept = [
            (each, name, each[name]) for each in self._attributes for name in each.keys() - _OWN if callable(each[name])
        ]
        self._functions = functions_of(self._network)
        self._before = self._outline()

    def _outline(self) -> tuple[list[Any], ...]:
        """Lists that are equal as long as nobody adds or replaces anything. They compare fast, as most objects are identical."""
        children = list(chain.from_iterable(each.values() for each in self._children))
        return list(map(len, self._attributes)), children, list(map(len, self._hooks)), list(map(type, self._modules))

    def changes(self) -> list[str]:
        """Names of the functions, hooks and modules that others have put there since."""
        changed = _foreign(self._owners)
        if self._outline() == self._before and all(each.get(name) is value for each, name, value in self._kept):
            return changed
        functions = functions_of(self._network)
        changed += [place for place, value in functions.items() if self._functions.get(place) != value]
        changed += self._functions.keys() - functions.keys()
        before = dict(zip(map(id, self._modules), self._before[-1], strict=True))
        changed += [
            name or "the network" for name, each in self._network.named_modules() if before.get(id(each)) is not type(each)
        ]
        if not changed:  # only the host's own loader has changed something
            self._look()
        return changed


def _place(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute


def _comparable(value: Any) -> Any:
    """A value that is equal for one function in two networks of a class, even if ``__init__`` makes a new one for each."""
    if isinstance(value, functools.partial):
        return _comparable(value.func), repr(value.keywords)
    if isinstance(value, types.MethodType):
        return _comparable(value.__func__), type(value.__self__)
    if isinstance(value, types.FunctionType):
        return value.__code__
    if isinstance(value, type) and "<locals>" in value.__qualname__:
        return value.__module__, value.__qualname__
    return value if isinstance(value, types.BuiltinFunctionType | type) else type(value)


def _owners(network: nn.Module) -> list[tuple[Any, str, str]]:
    """The classes and Python modules whose functions ``network`` runs, each with its module's name and its own name."""
    classes = dict.fromkeys(cls for module in network.modules() for cls in type(module).__mro__ if cls is not object)
    modules = dict.fromkeys((*_SHARED, *(cls.__module__ for cls in classes if cls.__module__.startswith(_NETWORKS))))
    reached = list(modules)
    for name in reached:  # the list grows meanwhile
        if name.startswith(_NETWORKS):
            named = {getattr(value, "__module__", None) or "" for value in vars(sys.modules[name]).values()}
            new = sorted(each for each in named if each.startswith(_NETWORKS) and each not in modules and each in sys.modules)
            modules |= dict.fromkeys(new)
            reached += new
    return [(cls, cls.__module__, cls.__qualname__) for cls in classes] + [(sys.modules[name], name, name) for name in modules]


def _foreign(owners: Sequence[tuple[Any, str, str]]) -> list[str]:
    """Names of the foreign functions among the members of ``owners``; quick for owners that are known to have none."""
    foreign_code = [f"forward hook {code_name(hook)} on all modules" for hooks in _GLOBAL_HOOKS for hook in hooks.values()]
    for owner, module, place in owners:
        members = vars(owner)
        now, before = list(members.values()), _known.get(owner, ())
        if len(before) == len(now) and all(map(operator.is_, before, now)):
            continue
        strange = [
            f"{place}.{name} ({code_name(function)})"
            for name, value in list(members.items())
            for function in _functions_in(value)
            if (isinstance(owner, type) or not name.startswith("__"))  # where PyTorch's compiler puts its own
            and not all(_is_at_home(origin, module, imports=not isinstance(owner, type)) for origin in origins_of(function))
        ]
        if strange:
            foreign_code += strange
        else:
            _known[owner] = now
    return foreign_code


def _functions_in(value: Any) -> list[Any]:
    """The functions, or objects called like functions, behind a member of a class or module."""
    if isinstance(value, property):
        return [each for each in (value.fget, value.fset) if each is not None]
    return [value] if isinstance(value, staticmethod | classmethod) or (callable(value) and not isinstance(value, type)) else []


def _is_at_home(origin: str, module: str, imports: bool) -> bool:
    """Whether ``module`` may have code of the module ``origin`` even in a process that has loaded no packs.

    Args:
        imports: whether it may be code of a library.
    """
    top, home = origin.partition(".")[0], module.partition(".")[0]
    if origin == module or top in sys.stdlib_module_names or top == "torch":
        return True
    if home == "torch":
        return False
    if home == "comfy" and not imports:
        return top.startswith("comfy") and _is_installed(top)
    return origin.rpartition(".")[0] == module.rpartition(".")[0] or _is_installed(top)


def _is_installed(package: str) -> bool:
    """Whether a package is the host's own, or a library: neither a pack nor a script."""
    loaded = sys.modules.get(package)
    file = os.path.abspath(getattr(loaded, "__file__", None) or next(iter(getattr(loaded, "__path__", ())), ""))
    if any(file.startswith(folder + os.sep) for folder in _LIBRARIES):
        return True
    inside = os.path.relpath(file, _HOST) if file.startswith(_HOST + os.sep) else ""
    return inside.startswith("comfy")
