"""Bands: one call that several ranks compute at once, each with a part of the tokens, or of the rows, of everything.

Each rank runs the model's own forward. Within a **scope**, a module that was seen to work so, the tensors on a rank are its
**band**. Nothing there is stale. What needs the others is exchanged, and nothing else is: attention gathers keys and values, or
heads, convolutions the rows beyond the edge, group norms their sums. The result is the model's up to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .errors import UnsupportedModelError
from .trees import flatten, unflatten

Place = tuple[int, int]  # number of a leaf among a module's arguments or results, and its dimension


@dataclass(frozen=True)
class Axis:
    """A dimension that is divided into bands: of tokens, or of rows.

    Attributes:
        parts: what follows each other on it, such as the prompt's tokens and the picture's: for each part where every rank's band
            begins, and the end. A part of two numbers, begin and end, is not divided: every rank has all of it.

    Two ranks; three tokens that both have, and six of a picture:

    >>> axis, whole = Axis(((0, 3), (0, 3, 6))), torch.arange(9)
    >>> axis.length, axis.band(1), axis.share(1)
    (9, 6, 3)
    >>> bands = [axis.cut(whole, 0, rank) for rank in range(2)]
    >>> bands[1], axis.own(bands[1], 0, 1)
    (tensor([0, 1, 2, 6, 7, 8]), tensor([6, 7, 8]))
    >>> axis.joined(bands[1], 1, [axis.own(band, 0, rank) for rank, band in enumerate(bands)], 0)
    tensor([0, 1, 2, 3, 4, 5, 6, 7, 8])
    """

    parts: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Number of tokens or rows of the whole."""
        return sum(bounds[-1] for bounds in self.parts)

    @property
    def divided(self) -> int:
        """How many of them are divided."""
        return sum(bounds[-1] for bounds in self.parts if len(bounds) > 2)

    def _pieces(self, rank: int) -> Iterator[tuple[int, int, int, int, bool]]:
        """Yield for each part: begin and end of the band of ``rank``, in the whole and in the band; whether it is divided."""
        whole = band = 0
        for bounds in self.parts:
            divided = len(bounds) > 2
            begin, end = bounds[rank : rank + 2] if divided else bounds
            yield whole + begin, whole + end, band, band + end - begin, divided
            whole, band = whole + bounds[-1], band + end - begin

    def band(self, rank: int) -> int:
        """Return how many of them ``rank`` has."""
        return sum(end - begin for begin, end, *_ in self._pieces(rank))

    def share(self, rank: int) -> int:
        """Return how many of them ``rank`` alone has."""
        return sum(end - begin for begin, end, _, _, divided in self._pieces(rank) if divided)

    def borders(self, rank: int) -> list[tuple[int, int]]:
        """Return where parts end, in the whole and in the band of ``rank``."""
        ends = list(itertools.accumulate(bounds[-1] for bounds in self.parts))
        return list(zip(ends, (end for _, _, _, end, _ in self._pieces(rank)), strict=True))

    def cut(self, whole: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
        """Take the band of ``rank`` out of the whole; a view where it is in one piece."""
        return _joined([whole.narrow(dim, begin, end - begin) for begin, end, *_ in self._pieces(rank)], dim)

    def own(self, band: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
        """Take out of the band of ``rank`` what no other rank has."""
        return _joined([band.narrow(dim, begin, end - begin) for *_, begin, end, divided in self._pieces(rank) if divided], dim)

    def joined(self, band: torch.Tensor, rank: int, owns: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """Put the whole together from what each rank alone has, and what is not divided from the ``band`` of ``rank``."""
        pieces, starts = [], [0] * len(owns)
        for bounds, (_, _, begin, end, divided) in zip(self.parts, self._pieces(rank), strict=True):
            if not divided:
                pieces.append(band.narrow(dim, begin, end - begin))
                continue
            for other, (first, last) in enumerate(pairwise(bounds)):
                pieces.append(owns[other].narrow(dim, starts[other], last - first))
                starts[other] += last - first
        return torch.cat(pieces, dim)


def _joined(pieces: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)


@dataclass(frozen=True)
class Scope:
    """A module that computes in bands.

    Attributes:
        takes: what is whole before it, among its arguments: its band is passed instead.
        gives: what is gathered after it, among its results, and the whole's length; the rest is handed on as a band.
        axes: by length of the whole.
        borders: numbers of the leaves among its arguments that say where parts of an axis begin and end, and its length.
        exchanges: for each attention, convolution, group norm and interpolation in it, in order: the whole's length of its keys
            or rows, or None where every rank has the whole of them.
    """

    takes: tuple[Place, ...]
    gives: tuple[tuple[int, int, int], ...]
    axes: Mapping[int, Axis]
    borders: tuple[tuple[int, int], ...] = ()
    exchanges: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Bands:
    """How one call of a model is computed in bands.

    Attributes:
        scopes: by name of the module; "" for the model itself, which is then the only one.
        bytes_per_call: what all ranks together send.
    """

    scopes: Mapping[str, Scope]
    bytes_per_call: int


class Dims(NamedTuple):
    """Where tokens and heads are in a tensor of an attention; heads may be parts of its channels."""

    tokens: int
    heads: int


@dataclass(frozen=True)
class Attention:
    """One attention of a band's queries, whatever computes it.

    Attributes:
        compute: ``(query, key, value, mask, heads) -> result``.
        query, key, value: of the band.
        mask: [..., queries or 1, keys], of all queries and keys.
        dims, result: where tokens and heads are, in what it is given and in its result.
        scale: of the products of queries and keys, where it is given.
    """

    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, int], torch.Tensor]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    heads: int
    dims: Dims
    result: Dims
    scale: float | None = None

    def trades_heads(self, axis: Axis, ranks: int) -> bool:
        """Whether ranks can trade heads for tokens of ``axis``, and that is fewer bytes than all keys and values."""
        query, key, value = self.query, self.key, self.value
        alike = query.shape[self.dims.heads] == key.shape[self.dims.heads] == value.shape[self.dims.heads]
        divides = alike and self.heads % ranks == 0 and query.shape[self.dims.tokens] == key.shape[self.dims.tokens]
        whole = axis.divided == axis.length and (self.mask is None or self.mask.ndim < 3 or self.mask.shape[-3] == 1)
        return divides and whole and 2 * query.numel() + key.numel() + value.numel() < ranks * (key.numel() + value.numel())


class Exchange(Protocol):
    """What a rank needs of those that it shares a call with.

    Attributes:
        rank, ranks: which one it is, of how many.
    """

    rank: int
    ranks: int

    def trade(self, outgoing: Sequence[Sequence[torch.Tensor]], dim: int, lengths: Sequence[int]) -> list[list[torch.Tensor]]:
        """Give each rank one of each row of ``outgoing``; return for each row what came of every rank, itself included.

        Args:
            lengths: of what comes from each rank, on ``dim``; else it is as what goes there.
        """

    def neighbours(self, band: torch.Tensor, dim: int, above: int, below: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the last ``above`` rows of the rank before, and the first ``below`` ones of the rank after this one.

        None where there is no such rank, or no such row is asked for.
        """


class BandMode(TorchFunctionMode):
    """Computes in bands what runs in scopes while it is entered; see :meth:`scoped` and :meth:`run`."""

    def __init__(self, exchange: Exchange, prepare: Callable[[Any, Any, BandMode], Any] | None = None) -> None:
        """``prepare`` is ``banded`` of the model's :class:`~.planning.family.Family`."""
        super().__init__()
        self._exchange, self._prepare = exchange, prepare
        self._scope: Scope | None = None  # which runs
        self._next = 0  # of what is exchanged in it
        self._as_is = False

    # -- scopes ------------------------------------------------------------------------------------------------------

    @contextmanager
    def scoped(self, module: nn.Module, bands: Bands) -> Iterator[None]:
        """Enter, and have the scopes within ``module`` computed in bands."""
        self._scope = None  # a call before may have failed within one
        with ExitStack() as hooks, self:
            for name, scope in bands.scopes.items():
                if name:
                    child = module.get_submodule(name)
                    hooks.callback(child.register_forward_pre_hook(partial(self._begins, scope), with_kwargs=True).remove)
                    hooks.callback(child.register_forward_hook(partial(self._ends, scope)).remove)
            yield

    def run(self, bands: Bands, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``function``, the model itself, which may be a scope, too."""
        if self._prepare is not None:
            args, kwargs = self._prepare(args, kwargs, self)
        scope = bands.scopes.get("")
        if scope is None:
            return function(*args, **kwargs)
        args, kwargs = self._begins(scope, None, args, kwargs)
        return self._ends(scope, None, None, function(*args, **kwargs))

    def _begins(self, scope: Scope, _: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        leaves, structure = flatten((args, kwargs))
        for number, dim in scope.takes:
            leaf = leaves[number]
            # laid out as the whole is, so that the same kernels serve it
            leaves[number] = scope.axes[leaf.shape[dim]].cut(leaf, dim, self._exchange.rank).contiguous()
        for number, length in scope.borders:
            here = {0: 0} | dict(scope.axes[length].borders(self._exchange.rank))
            self._check(leaves[number] in here)
            leaves[number] = here[leaves[number]]
        self._scope, self._next = scope, 0
        made: tuple[Any, Any] = unflatten(leaves, structure)
        return made

    def _ends(self, scope: Scope, _: Any, __: Any, output: Any) -> Any:
        self._check(self._next == len(scope.exchanges))
        self._scope = None
        leaves, structure = flatten(output)
        for number, dim, length in scope.gives:
            (leaves[number],) = self._gathered([leaves[number]], dim, scope.axes[length])
        return unflatten(leaves, structure)

    def _gathered(self, bands: Sequence[torch.Tensor], dim: int, axis: Axis) -> list[torch.Tensor]:
        rank, ranks = self._exchange.rank, range(self._exchange.ranks)
        own = [axis.own(band, dim, rank) for band in bands]
        owns = self._exchange.trade([[each for _ in ranks] for each in own], dim, [axis.share(other) for other in ranks])
        return [axis.joined(band, rank, every, dim) for band, every in zip(bands, owns, strict=True)]

    def _needed(self, length: int) -> Axis | None:
        """Return the axis of what is exchanged next, of which this rank has ``length``; None where that is the whole."""
        if self._scope is None:
            return None
        self._check(self._next < len(self._scope.exchanges))
        whole = self._scope.exchanges[self._next]
        self._next += 1
        if whole is None:
            return None
        axis = self._scope.axes[whole]
        self._check(length == axis.band(self._exchange.rank))
        return axis

    def _check(self, planned: bool) -> None:
        if not planned:
            raise UnsupportedModelError("a call in bands exchanges something else than was found out, as if it took another path")

    # -- what is exchanged -------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replaced = None if self._as_is or self._scope is None else REPLACED.get(func)
        return func(*args, **(kwargs or {})) if replaced is None else getattr(self, replaced)(func, args, kwargs or {})

    @contextmanager
    def as_is(self) -> Iterator[None]:
        """While this lasts, compute what runs as it is: it has all that it needs."""
        self._as_is = True
        try:
            yield
        finally:
            self._as_is = False

    def attend(self, attention: Attention) -> torch.Tensor:
        """Return what the queries of this band see, of all tokens.

        Either every rank gathers all keys and values, or each attends with some of the heads, for all queries: whatever is fewer
        bytes (Ulysses, Jacobs et al. 2023, arXiv 2309.14509).
        """
        key, value, mask, tokens = attention.key, attention.value, attention.mask, attention.dims.tokens
        axis = self._needed(key.shape[tokens])
        if axis is not None and attention.trades_heads(axis, self._exchange.ranks):
            return self._by_heads(attention, axis)
        queries = attention.query.shape[tokens]
        if self._scope is not None and mask is not None and mask.ndim > 1 and mask.shape[-2] not in (1, queries):
            mask = self._scope.axes[mask.shape[-2]].cut(mask, -2, self._exchange.rank)
        if axis is not None:
            key, value = self._gathered([key, value], tokens, axis)
        return attention.compute(attention.query, key, value, mask, attention.heads)

    def _by_heads(self, attention: Attention, axis: Axis) -> torch.Tensor:
        rank, ranks, dims, result = self._exchange.rank, self._exchange.ranks, attention.dims, attention.result
        shares = [axis.share(other) for other in range(ranks)]
        bands = attention.query, attention.key, attention.value
        some = self._exchange.trade([band.chunk(ranks, dims.heads) for band in bands], dims.tokens, shares)
        query, key, value = (axis.joined(band, rank, every, dims.tokens) for band, every in zip(bands, some, strict=True))
        seen = attention.compute(query, key, value, attention.mask, attention.heads // ranks)
        pieces = [axis.cut(seen, result.tokens, other) for other in range(ranks)]
        (back,) = self._exchange.trade([pieces], result.tokens, [axis.share(rank)] * ranks)
        return torch.cat(back, result.heads)

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = dict(zip(ATTENTION, args, strict=False)) | kwargs
        query, key, value = (given[name] for name in ATTENTION[:3])

        def compute(query: Any, key: Any, value: Any, mask: Any, _: int) -> Any:
            return func(**given | {"query": query, "key": key, "value": value, "attn_mask": mask})

        heads = query.shape[-3] if query.ndim > 3 else 1
        dims = Dims(tokens=-2, heads=-3 if query.ndim > 3 else -1)
        return self.attend(Attention(compute, query, key, value, given.get("attn_mask"), heads, dims, dims, given.get("scale")))

    def _convolution(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, args, strict=False)) | kwargs
        band, weight = given["input"], given["weight"]
        dim, ranks = rows_of(band), range(self._exchange.ranks)
        axis = self._needed(band.shape[dim])
        if axis is None:
            return func(*args, **kwargs)
        stride, padding, dilation = (_each(given.get(name, usual), weight.ndim - 2) for name, usual in _USUAL.items())
        edge = padding[dim]
        below = max(0, dilation[dim] * (weight.shape[dim] - 1) + 1 - stride[dim] - edge)
        if not edge and not below:
            return func(*args, **kwargs)
        if (least := min(map(axis.band, ranks))) < max(edge, below):
            raise UnsupportedModelError(f"a convolution reaches {max(edge, below)} rows far, and a band has {least}")
        first, last = self._exchange.neighbours(band, dim, edge, below)
        shape = [*band.shape]
        shape[dim] = edge
        beyond = band.new_zeros(shape)  # of the picture
        if first is None:
            first = beyond
        if last is None and self._exchange.rank == ranks[-1]:
            last = beyond
        padding[dim] = 0
        given["input"] = torch.cat([rows for rows in (first, band, last) if rows is not None], dim)
        return func(**given | {"padding": tuple(padding)})

    def _interpolation(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = ("input", "size", "scale_factor", "mode")
        given = dict(zip(names, args, strict=False)) | kwargs
        rows = given["input"].shape[rows_of(given["input"])]
        if self._needed(rows) is not None and not given.get("mode", "nearest").startswith("nearest"):
            raise UnsupportedModelError(f"it interpolates between rows ({given['mode']})")
        return func(*args, **kwargs)

    def _group_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = ("input", "num_groups", "weight", "bias", "eps")
        given = {"weight": None, "bias": None, "eps": 1e-5} | dict(zip(names, args, strict=False)) | kwargs
        band, groups = given["input"], given["num_groups"]
        axis = self._needed(band.shape[rows_of(band)])
        if axis is None:
            return func(*args, **kwargs)
        items, channels = band.shape[:2]
        variance, mean = torch.var_mean(band.reshape(items, groups, -1).float(), -1, correction=0)
        own, ranks = torch.stack([mean, variance]), self._exchange.ranks
        (parts,) = self._exchange.trade([[own] * ranks], 0, [2] * ranks)
        shares = [axis.share(rank) / axis.length for rank in range(ranks)]  # numbers, which no device is sent
        mean = sum(share * each for share, (each, _) in zip(shares, parts, strict=True))
        variance = sum(share * (other + (each - mean).square()) for share, (each, other) in zip(shares, parts, strict=True))
        # as a norm over the batch whose sums are known: one pass over the values, in the precision of a group norm
        each = channels // groups
        flat = band.reshape(1, items * channels, *band.shape[2:])
        mean, variance = (value.reshape(-1).repeat_interleave(each) for value in (mean, variance))
        weight, bias = (None if value is None else value.float().repeat(items) for value in (given["weight"], given["bias"]))
        return F.batch_norm(flat, mean, variance, weight, bias, eps=given["eps"]).reshape(band.shape)


ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_USUAL = {"stride": 1, "padding": 0, "dilation": 1}
REPLACED = {  # functions, and the methods that stand in for them
    F.scaled_dot_product_attention: "_attention",
    F.conv1d: "_convolution",
    F.conv2d: "_convolution",
    F.conv3d: "_convolution",
    F.group_norm: "_group_norm",
    F.interpolate: "_interpolation",
}


def rows_of(tensor: torch.Tensor) -> int:
    """Return the dimension of rows of a tensor with channels: the last but one; of a sequence the only one."""
    return -2 if tensor.ndim > 3 else -1


def _each(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value)
