"""Model patches that can run in a rank: named by module and place in its source, rebuilt there by import.

A patch is a function that another node made, mostly a closure over that node's settings. No code is sent: a rank imports the
module and finds the function's code in it, and only the settings, plain data, travel.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch

# Patches that look at nothing but what a block is given, so that they do the same wherever the block is; see the tests.
# (Counter-examples: SAG reads in the sampler what its patch saw, HyperTile and ToMe draw random numbers.)
STATELESS = frozenset({"comfy_extras.nodes_freelunch", "comfy_extras.nodes_nag", "comfy_extras.nodes_pag"})


@dataclass(frozen=True)
class ShippedPatch:
    """A patch by reference; called like the function it stands for.

    Attributes:
        module, qualname, line: where its source is.
        settings: (name, value) of the variables that it closes over.
        defaults: of its arguments.
    """

    module: str
    qualname: str
    line: int
    settings: tuple[tuple[str, Any], ...]
    defaults: tuple[Any, ...]

    @classmethod
    def of(cls, patch: Any) -> ShippedPatch | None:
        """The reference to ``patch``; None if it cannot run in a rank."""
        if not isinstance(patch, types.FunctionType) or patch.__module__ not in STATELESS or patch.__kwdefaults__:
            return None
        values, defaults = [cell.cell_contents for cell in patch.__closure__ or ()], patch.__defaults__ or ()
        if not is_plain([*values, *defaults]):
            return None
        code = patch.__code__
        settings = tuple(zip(code.co_freevars, values, strict=True))
        return cls(patch.__module__, patch.__qualname__, code.co_firstlineno, settings, defaults)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the patch."""
        module = importlib.import_module(self.module)
        path, *inner = self.qualname.split(".<locals>.")
        found = functools.reduce(getattr, path.split("."), module)
        code = inspect.unwrap(getattr(found, "__func__", found)).__code__
        for name in inner:
            nested = [c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name]
            code = min(nested, key=lambda c: abs(c.co_firstlineno - self.line))
        settings = dict(self.settings)
        cells = tuple(types.CellType(settings[name]) for name in code.co_freevars)
        return types.FunctionType(code, vars(module), code.co_name, self.defaults, cells)(*args, **kwargs)


def is_plain(value: Any) -> bool:
    """Whether ``value`` is data without any code."""
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor | torch.dtype)
