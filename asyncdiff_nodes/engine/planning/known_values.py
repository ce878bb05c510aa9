"""Values on the meta device, as far as they follow from small inputs alone: masks, lengths, positions, timesteps.

A forward may read such values and take its path by them. On meta it could not, though nothing large would have to be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from .meta_kernels import MetaKernels, operands

_SMALL = 2**14  # elements of a value that is kept
_aten = torch.ops.aten
_READS = frozenset({_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default})
_SELECTS = frozenset({_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default})


class KnownValues(TorchDispatchMode):
    """Lets a forward on meta read the values that follow from ``known`` ones, while it is entered.

    Args:
        known: tensor on meta -> the same with its values, on any device.

    Attributes:
        decisive: tensors whose values the forward has read: its path may depend on them.
        listener: called after each operation, with its function, arguments, keyword arguments and result.

    >>> mask, net = torch.tensor([True, True, False]), torch.nn.Linear(4, 4, device="meta")
    >>> on_meta = mask.to("meta")
    >>> with KnownValues({on_meta: mask}) as values:
    ...     net(torch.empty(int(on_meta.sum()), 4, device="meta")).shape, len(values.decisive)
    (torch.Size([2, 4]), 1)
    """

    def __init__(self, known: Mapping[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        # id of a tensor on meta -> that tensor, so that no other takes its identity; the address of its memory; its values
        self._values: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._kernels = MetaKernels()
        for meta, real in known.items():
            if real.numel() <= _SMALL:
                self.keep(meta, real.detach().to("cpu", copy=True))
        self.decisive: list[torch.Tensor] = []
        self.listener: Callable[[Any, Any, Any, Any], None] | None = None
        self._functions = _Functions(self)

    def __enter__(self) -> KnownValues:
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def read(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the values of ``tensor``, which is on meta; None if they are not known."""
        if id(tensor) not in self._values:
            return None
        self.decisive.append(tensor)
        return self._values[id(tensor)][2]

    def keep(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Note the values of ``tensor``, which is on meta."""
        if value.numel() <= _SMALL:
            self._values[id(tensor)] = tensor, _address(tensor), value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._overloadpacket not in flop_registry:  # else torch has done so before
            with torch._C.DisableTorchFunction(), self:  # which would run the operation itself again
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = self._run(func, args, kwargs)
        if self.listener is not None:
            self.listener(func, args, kwargs, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = operands((args, kwargs.values()))
        metas = [tensor for tensor in tensors if tensor.is_meta]
        if not metas and str(kwargs.get("device", "")) != "meta":
            return func(*args, **kwargs)
        if all(id(tensor) in self._values for tensor in metas) and self._is_small(func, args, tensors):
            return self._computed(func, args, kwargs)
        if func in _SELECTS:
            args = (args[0], self._places(args[1]), *args[2:])
        if func._schema.is_mutable and metas:
            self._forget(args[0])
        return self._kernels.run(func, args, kwargs)

    @staticmethod
    def _is_small(func: Any, args: Any, tensors: list[torch.Tensor]) -> bool:
        """Whether what ``func`` returns, of known values, can be computed."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        sizes = [tensor.numel() for tensor in tensors]
        if not tensors:  # makes a new tensor
            shape = next((leaf for leaf in args if isinstance(leaf, list | tuple)), ())
            sizes.append(torch.Size(shape).numel() if all(isinstance(size, int) for size in shape) else 1)
        return max(sizes, default=1) <= _SMALL

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute with the values. The result is on meta, with these values, unless the forward reads it."""
        real = func(*tree_map(self._real, args), **tree_map(self._real, kwargs))
        leaves = [leaf for leaf in tree_leaves(real) if isinstance(leaf, torch.Tensor)]
        to_host = func is _aten._to_copy.default and str(kwargs.get("device") or "meta") != "meta"
        if to_host or not leaves:
            if to_host or func in _READS:
                self.decisive += operands(args)
            return real
        try:
            out = func(*args, **kwargs)
        except (NotImplementedError, RuntimeError):  # its shape depends on values (nonzero)
            out = None
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if [leaf.shape for leaf in made] != [leaf.shape for leaf in leaves]:
            self.decisive += operands(args)
            out = tree_map(lambda leaf: torch.empty_like(leaf, device="meta") if isinstance(leaf, torch.Tensor) else leaf, real)
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor, value in zip(made, leaves, strict=True):
            self.keep(tensor, value)
        return out

    def _places(self, indices: Any) -> list[Any]:
        """Replace known masks among ``indices`` by as many places as they select: meta cannot count these."""
        found: list[Any] = []
        for index in indices:
            mask = isinstance(index, torch.Tensor) and index.is_meta and index.dtype in (torch.bool, torch.uint8)
            if mask and (value := self.read(index)) is not None:
                found += [torch.empty_like(place, device="meta") for place in value.nonzero(as_tuple=True)]
            else:
                found.append(index)
        return found

    def _forget(self, tensor: torch.Tensor) -> None:
        """Forget the values in the memory of ``tensor``: unknown ones are written there."""
        address = _address(tensor)
        for key in [key for key, (_, held_at, _) in self._values.items() if held_at == address]:
            del self._values[key]

    def _real(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.is_meta:
            return self._values[id(leaf)][2]
        return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf


def _address(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


class _Functions(TorchFunctionMode):
    """What does not dispatch: ``tolist``, ``numpy``, and tensors that are made of Python's numbers."""

    def __init__(self, values: KnownValues) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and args[0].is_meta:
            value = self._values.read(args[0])
            return func(args[0] if value is None else value)
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if made and str(kwargs.get("device")) == "meta":
            value = func(*args, **{**kwargs, "device": "cpu"})
            tensor = torch.empty_like(value, device="meta")
            self._values.keep(tensor, value)
            return tensor
        return func(*args, **kwargs)
