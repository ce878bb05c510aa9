"""Model patches that can run in a rank: named by module and place in its source, rebuilt there by import.

A patch is a function that another node made, mostly a closure over that node's settings. No code is sent: a rank imports the
module and finds the function's code in it, and only the settings, plain data, travel.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from dataclasses import dataclass
from typing import Any

import torch

# Patches that look at nothing but what a block is given, so that they do the same wherever the block is; see the tests.
_ALWAYS: dict[str, int] = {}
# Module -> the greatest values of settings with which its patches are such. HyperTile draws the first of one or two sizes.
STATELESS = {
    "comfy_extras.nodes_freelunch": _ALWAYS,
    "comfy_extras.nodes_nag": _ALWAYS,
    "comfy_extras.nodes_pag": _ALWAYS,
    "comfy_extras.nodes_hypertile": {"swap_size": 2},
    "comfy_extras.nodes_sag": _ALWAYS,  # see sag.py for what the sampler reads of it
    "comfy_extras.nodes_tomesd": _ALWAYS,  # see tome.py for what it draws
    "comfy.model_patcher": _ALWAYS,  # which has one of the host's attentions take the place of another
}
# (module, variable): what its patches write before they read it
_SCRATCH = {("comfy_extras.nodes_sag", "attn_scores"), ("comfy_extras.nodes_tomesd", "u")}
_ATTENTIONS = "comfy.ldm.modules.attention"


class Variable:
    """What one or more patches close over. It pickles as its value; patches of one message still share it."""

    def __init__(self, value: Any) -> None:
        self.cell = types.CellType(value)

    def __reduce__(self) -> tuple[Any, ...]:
        return Variable, (self.cell.cell_contents,)

    def __repr__(self) -> str:
        return repr(self.cell.cell_contents)


class Scratch(Variable):
    """One of :data:`_SCRATCH`: what it is now is of no interest, and does not travel."""

    def __init__(self) -> None:
        super().__init__(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scratch, ()

    def __repr__(self) -> str:
        return "scratch"


@dataclass(frozen=True)
class ShippedPatch:
    """A patch by reference; called like the function it stands for.

    Attributes:
        module, qualname, line: where its source is.
        settings: (name, variable) of those that it closes over.
        defaults: of its arguments.
    """

    module: str
    qualname: str
    line: int
    settings: tuple[tuple[str, Variable], ...]
    defaults: tuple[Any, ...]

    @classmethod
    def of(cls, patch: Any, variables: dict[int, Variable]) -> ShippedPatch | None:
        """The reference to ``patch``; None if it cannot run in a rank.

        Args:
            variables: of the patches of the same call, by the identity of their cells; its own are added.
        """
        if not isinstance(patch, types.FunctionType) or patch.__module__ not in STATELESS or patch.__kwdefaults__ or vars(patch):
            return None
        code, cells, defaults = patch.__code__, patch.__closure__ or (), patch.__defaults__ or ()
        found = {
            name: (cell, Scratch() if (patch.__module__, name) in _SCRATCH else Variable(cell.cell_contents))
            for name, cell in zip(code.co_freevars, cells, strict=True)
        }
        values = {name: variable.cell.cell_contents for name, (_, variable) in found.items()}
        greatest = STATELESS[patch.__module__]
        if not all(is_plain(value) or _is_attention(value) for value in (*values.values(), *defaults)):
            return None
        if any(values[name] > greatest[name] for name in values.keys() & greatest):
            return None
        settings = tuple((name, variables.setdefault(id(cell), variable)) for name, (cell, variable) in found.items())
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
        cells = tuple(settings[name].cell for name in code.co_freevars)
        return types.FunctionType(code, vars(module), code.co_name, self.defaults, cells)(*args, **kwargs)


def _is_attention(value: Any) -> bool:
    """Whether ``value`` is a function of the host's that is pickled by its name."""
    named = isinstance(value, types.FunctionType) and value.__module__ == _ATTENTIONS
    return named and getattr(sys.modules[_ATTENTIONS], value.__qualname__, None) is value


def is_plain(value: Any) -> bool:
    """Whether ``value`` is data without any code."""
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor | torch.dtype)
