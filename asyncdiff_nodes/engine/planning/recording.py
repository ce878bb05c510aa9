"""One forward on the meta device, written down: which module called which, and what each operation read and returned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from asyncdiff_nodes.engine.stub import runner
from asyncdiff_nodes.engine.tensors import tensors_of
from asyncdiff_nodes.engine.trees import flatten, unflatten

from .known_values import KnownValues
from .meta_kernels import operands


@dataclass(eq=False)
class ModuleCall:
    """One call of one module.

    Attributes:
        begins, ends: the operations within it are those from ``begins`` up to ``ends``.
        macs: multiply-accumulates of these.
        given: tensors among its arguments.
        arguments: ``(args, kwargs)``.
        output: what it returned; ``returned`` are its leaves, see :mod:`~asyncdiff_nodes.engine.trees`.
    """

    name: str
    module: nn.Module
    parent: ModuleCall | None
    begins: int
    given: list[torch.Tensor]
    arguments: tuple[Any, Any]
    ends: int = 0
    macs: int = 0
    output: Any = None
    returned: list[Any] = field(default_factory=list)
    children: list[ModuleCall] = field(default_factory=list)

    def walk(self) -> Iterator[ModuleCall]:
        """Yield this call and all within it, each before those within it."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of PyTorch.

    Attributes:
        call: the innermost module call that it was done in.
        reads, makes: the tensors that it was given, and returned.
        writes: those among ``reads`` that it wrote to.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: ModuleCall
    reads: tuple[torch.Tensor, ...]
    makes: tuple[torch.Tensor, ...]
    writes: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Recording:
    """A forward, as it ran on meta.

    Attributes:
        root: the model's own call.
        operations: in order. They hold every tensor, so that none takes another's identity.
        inputs: leaf of ``(args, kwargs)`` by position.
        weights: parameter or buffer by name.
        decisive: tensors whose values decided the path that it took; see :class:`~.known_values.KnownValues`.
    """

    root: ModuleCall
    operations: list[Operation]
    inputs: list[Any]
    weights: Mapping[str, torch.Tensor]
    decisive: Sequence[torch.Tensor] = ()

    @property
    def calls(self) -> Iterator[ModuleCall]:
        """All calls of modules but the model's own, in the order in which they begin."""
        return (call for call in self.root.walk() if call is not self.root)


def record(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], values: KnownValues, entry: str = "forward"
) -> Recording:
    """Run ``module``, which is on meta, by its method ``entry``, and write down what happens. Raises whatever that does.

    Args:
        values: what is known of values; entered.
    """
    given = unflatten(*flatten((args, kwargs)))  # a forward may empty the lists that it is given, as UNets do with residuals
    root = ModuleCall("", module, None, 0, _tensors(args, kwargs), given)
    recorder = _Recorder(root)
    with recorder.listening(module, values):
        result = runner(module, entry)(*args, **kwargs)
    root.ends, root.macs = len(recorder.operations), recorder.macs
    root.output, root.returned = result, flatten(result)[0]
    leaves = flatten((args, kwargs))[0]
    return Recording(root, recorder.operations, leaves, dict(tensors_of(module)), tuple(values.decisive))


class _Recorder:
    def __init__(self, root: ModuleCall) -> None:
        self.operations: list[Operation] = []
        self.macs = 0
        self._running = root

    @contextlib.contextmanager
    def listening(self, module: nn.Module, values: KnownValues) -> Iterator[None]:
        """Listen, while it lasts, to operations, and to when each module within ``module`` begins and ends."""
        values.listener = self._note
        with contextlib.ExitStack() as hooks:
            for name, child in module.named_modules():
                if name:
                    hooks.callback(child.register_forward_pre_hook(partial(self._begins, name), with_kwargs=True).remove)
                    hooks.callback(child.register_forward_hook(self._ends).remove)
            yield

    def _begins(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = _tensors(args, kwargs)
        call = ModuleCall(name, module, self._running, len(self.operations), given, (args, kwargs), macs=-self.macs)
        self._running.children.append(call)
        self._running = call

    def _ends(self, _: nn.Module, __: Any, output: Any) -> None:
        call = self._running
        call.ends, call.macs = len(self.operations), call.macs + self.macs
        call.output, call.returned = output, flatten(output)[0]
        assert call.parent is not None, "the model's own call has no hooks"
        self._running = call.parent

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func._overloadpacket in flop_registry:
            self.macs += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) // 2
        writes: tuple[torch.Tensor, ...] = ()
        if func._schema.is_mutable:
            pairs = zip(args, func._schema.arguments, strict=False)
            aliases = ((leaf, argument.alias_info) for leaf, argument in pairs if isinstance(leaf, torch.Tensor))
            writes = tuple(leaf for leaf, alias in aliases if alias is not None and alias.is_write)
        reads, makes = tuple(operands((args, kwargs.values()))), tuple(operands((out,)))
        self.operations.append(Operation(func, args, kwargs, self._running, reads, makes, writes))


def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
