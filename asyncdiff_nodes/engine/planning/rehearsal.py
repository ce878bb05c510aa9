"""A forward on the meta device as one of several ranks runs it, in bands; or as a whole, to be compared with that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from asyncdiff_nodes.engine.bands import ATTENTION, REPLACED, Attention, Axis, BandMode, Scope
from asyncdiff_nodes.engine.errors import UnsupportedModelError
from asyncdiff_nodes.engine.trees import flatten

from .provenance import memory_of


class Nobody:
    """Stands for the other ranks, on meta.

    Attributes:
        nbytes: what all ranks together would have sent.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.nbytes = rank, ranks, 0

    def trade(self, outgoing: Sequence[Sequence[torch.Tensor]], dim: int, lengths: Sequence[int]) -> list[list[torch.Tensor]]:
        """Make up what comes."""
        came = [[sized(one, dim, length) for one, length in zip(row, lengths, strict=True)] for row in outgoing]
        for row, incoming in zip(outgoing, came, strict=True):
            all_bands = row if len({one.numel() for one in row}) > 1 else incoming
            self.nbytes += sum(one.nbytes for one in all_bands) * (self.ranks - 1)
        return came

    def neighbours(self, band: torch.Tensor, dim: int, above: int, below: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Make up rows."""
        first, last = sized(band, dim, above), sized(band, dim, below)
        self.nbytes += (first.nbytes + last.nbytes) * (self.ranks - 1)
        return first if above and self.rank else None, last if below and self.rank < self.ranks - 1 else None


def sized(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """Make a tensor like this one, but for how long it is on ``dim``."""
    shape = [*tensor.shape]
    shape[dim] = length
    return tensor.new_empty(shape)


class Rehearsal(BandMode):
    """Runs on meta. Of what is replaced or exchanged nothing is recorded but one operation before it, see :meth:`_mark`.

    Args:
        scopes: those that run in bands, by name.
        expected: by name of a scope, what the same call of the whole needed in it; None for that one itself.

    Attributes:
        needs: what may be exchanged, in order: the tensor that was made before it, and the length of its keys or rows.
        masks: memory of the masks of attentions.
        exchanges: by name of a scope: as of a scope.
        running: name of the scope that runs, or has failed; None outside of them.
    """

    def __init__(
        self, exchange: Nobody, scopes: Mapping[str, Scope], expected: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        super().__init__(exchange)
        self._expected, self._names = expected, {id(scope): name for name, scope in scopes.items()}
        self._unseen = False
        self._made = torch.empty(0, device="meta")
        self.needs: list[tuple[torch.Tensor, int]] = []
        self.masks: set[int] = set()
        self.exchanges: dict[str, list[int | None]] = {}
        self.running: str | None = None

    @contextmanager
    def _hidden(self) -> Iterator[None]:
        if self._unseen:
            yield
            return
        self._unseen = True
        try:
            with _disable_current_modes():
                yield
        finally:
            self._unseen = False

    def _begins(self, scope: Scope, module: Any, args: Any, kwargs: Any) -> Any:
        self.running = self._names[id(scope)]
        self.exchanges[self.running] = []
        with self._hidden():
            return super()._begins(scope, module, args, kwargs)

    def _ends(self, scope: Scope, module: Any, args: Any, output: Any) -> Any:
        leaves = flatten(output)[0]
        for number, dim, length in scope.gives:
            if leaves[number].shape[dim] != scope.axes[length].band(self._exchange.rank):
                raise UnsupportedModelError(
                    f"{self.running or 'it'} returns {leaves[number].shape[dim]} of {length} tokens or rows"
                )
        with self._hidden():
            made = super()._ends(scope, module, args, output)
        self.running = None
        return made

    def _needed(self, length: int) -> Axis | None:
        if self._expected is None or self._scope is None:
            self.needs.append((self._made, length))
            return None
        assert self.running is not None, "within a scope"
        done = self.exchanges[self.running]
        whole = self._expected[self.running][len(done)]
        done.append(None if whole == length else whole)
        if whole == length:
            return None
        axis = self._scope.axes.get(whole)
        if axis is None or axis.band(self._exchange.rank) != length:
            raise UnsupportedModelError(f"{self.running or 'it'} looks at {length} of {whole} tokens or rows, which are no band")
        return axis

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replaced = None if self._as_is else REPLACED.get(func)
        if replaced is None:
            return func(*args, **(kwargs or {}))
        self._mark((kwargs or {}).get("scale"))
        with self._hidden():
            return getattr(self, replaced)(func, args, kwargs or {})

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make its result up: PyTorch would go through every operation of it."""
        given = dict(zip(ATTENTION, args, strict=False)) | kwargs
        if given.get("is_causal"):
            raise UnsupportedModelError("each token attends to those before it")

        def made_up(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
            return query.new_empty(*query.shape[:-1], value.shape[-1])

        return super()._attention(made_up, args, kwargs)

    @contextmanager
    def as_is(self) -> Iterator[None]:
        """As of :class:`BandMode`."""
        with super().as_is(), self._hidden():
            yield

    def attend(self, attention: Attention) -> torch.Tensor:
        """As of :class:`BandMode`; notes the mask, and looks whether it fits."""
        tokens = attention.dims.tokens

        def fitting(query: Any, key: Any, value: Any, mask: Any, heads: int) -> Any:
            queries, keys = query.shape[tokens], key.shape[tokens]
            if mask is not None and (mask.shape[-1] not in (1, keys) or (mask.ndim > 1 and mask.shape[-2] not in (1, queries))):
                raise UnsupportedModelError(f"a mask {tuple(mask.shape)} is not for {queries} and {keys} tokens")
            return attention.compute(query, key, value, mask, heads)

        if attention.mask is not None:
            self.masks.add(memory_of(attention.mask))
        if not self._unseen:
            self._mark(attention.scale)
        with self._hidden():
            return super().attend(replace(attention, compute=fitting))

    def _mark(self, number: float | None) -> None:
        """Have an operation recorded that says that something follows which is not, and with which number."""
        self._made = torch.full((0,), number or 0.0, device="meta")
