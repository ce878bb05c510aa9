"""Model patches that can run in a rank: named by module and place in its source, and rebuilt there by import.

A patch is a function that another node made, usually a closure over that node's settings. No code is sent: a rank imports the
module and finds the function's code in it. Only the settings are sent, and these are plain data.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .protocol import RoutedPatch

# Patches that read nothing but a block's inputs, so that they do the same wherever the block is; see the tests.
_ALWAYS: Mapping[str, int] = {}
# Module -> the greatest values of settings for which that is so. HyperTile's random choice has one outcome up to 2.
STATELESS = {
    "comfy_extras.nodes_freelunch": _ALWAYS,
    "comfy_extras.nodes_nag": _ALWAYS,
    "comfy_extras.nodes_pag": _ALWAYS,
    "comfy_extras.nodes_hypertile": {"swap_size": 2},
    "comfy.model_patcher": _ALWAYS,  # it replaces one of the host's attentions by another
}
_ATTENTIONS = "comfy.ldm.modules.attention"


class Variable:
    """A variable that one or more patches close over. It pickles as its value; patches of one message still share it."""

    def __init__(self, value: Any) -> None:
        self.cell = types.CellType(value)

    def __reduce__(self) -> tuple[Any, ...]:
        return Variable, (self.cell.cell_contents,)

    def __repr__(self) -> str:
        return repr(self.cell.cell_contents)


class Scratch(Variable):
    """A variable that its patches write before they read it: its current value does not matter, and is not sent."""

    def __init__(self) -> None:
        super().__init__(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scratch, ()

    def __repr__(self) -> str:
        return "scratch"


@dataclass(frozen=True)
class ShippedPatch:
    """A patch by reference; it is called like the function that it stands for.

    Attributes:
        module, qualname, line: where its source is.
        settings: name and variable of everything that it closes over.
        defaults: the defaults of its arguments.
    """

    module: str
    qualname: str
    line: int
    settings: tuple[tuple[str, Variable], ...]
    defaults: tuple[Any, ...]

    @classmethod
    def of(
        cls, patch: Any, variables: dict[int, Variable], greatest: Mapping[str, int] = _ALWAYS, scratch: str = ""
    ) -> ShippedPatch | None:
        """The reference to ``patch``; None if it is not a function, or a setting is not plain data, or too great.

        Args:
            variables: those of the patches of the same call, by the identity of their cells; its own are added.
            greatest: the greatest values of settings with which a rank can run it.
            scratch: the name of the setting that it writes before it reads it.
        """
        if not isinstance(patch, types.FunctionType) or patch.__kwdefaults__ or vars(patch):
            return None
        code, cells, defaults = patch.__code__, patch.__closure__ or (), patch.__defaults__ or ()
        cells_of = {
            name: (cell, Scratch() if name == scratch else Variable(cell.cell_contents))
            for name, cell in zip(code.co_freevars, cells, strict=True)
        }
        values = {name: variable.cell.cell_contents for name, (_, variable) in cells_of.items()}
        if not all(is_plain(value) or _is_attention(value) for value in (*values.values(), *defaults)):
            return None
        if any(values[name] > greatest[name] for name in values.keys() & greatest):
            return None
        settings = tuple((name, variables.setdefault(id(cell), variable)) for name, (cell, variable) in cells_of.items())
        return cls(patch.__module__, patch.__qualname__, code.co_firstlineno, settings, defaults)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the patch."""
        module = importlib.import_module(self.module)
        path, *inner = self.qualname.split(".<locals>.")
        owner = functools.reduce(getattr, path.split("."), module)
        code = inspect.unwrap(getattr(owner, "__func__", owner)).__code__
        for name in inner:
            nested = [c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name]
            code = min(nested, key=lambda c: abs(c.co_firstlineno - self.line))
        settings = dict(self.settings)
        cells = tuple(settings[name].cell for name in code.co_freevars)
        return types.FunctionType(code, vars(module), code.co_name, self.defaults, cells)(*args, **kwargs)


class ByReference(RoutedPatch):
    """Patches that need nothing but their settings: FreeU, PAG, NAG, HyperTile."""

    def shipped(self, patch: Any, options: dict[str, Any], variables: dict[int, Variable]) -> Callable[..., Any] | None:
        """See :class:`RoutedPatch`."""
        greatest = STATELESS.get(getattr(patch, "__module__", None))
        return None if greatest is None else ShippedPatch.of(patch, variables, greatest)


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
