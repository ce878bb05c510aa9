"""Calls of the host's networks in bands. Ranks import this, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from asyncdiff_nodes.engine.bands import Attention, BandMode, Dims
from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.errors import UnsupportedModelError

# comfy_kitchen's: norms over channels, and rotary positions, of each token by itself
LOCAL = frozenset(
    f"comfy_kitchen.{norm}{rope}{half}{count}{in_place}"
    for norm, rope in (("apply_", "rope"), ("rms_", "rope"))
    for half in ("", "_split_half")
    for count in ("", "1")
    for in_place in ("", "_")
) | {"comfy_kitchen.adaln", "comfy_kitchen.rms_adaln", "comfy_kitchen.quantize_int8_rowwise", "comfy_kitchen.int8_linear"}
_PATCHES = ("patches", "patches_replace")
_OVERRIDE = "optimized_attention_override"


def obstacle(options: dict[str, Any]) -> str | None:
    """Why a call with these ``transformer_options``, as ranks get them, cannot be in bands, in words; None if it may be."""
    if any(options.get(kind) for kind in _PATCHES):
        return "other nodes have put patches into its layers, which may look at all rows or tokens at once"
    return None


def in_bands(args: tuple[Any, ...], kwargs: dict[str, Any], mode: BandMode) -> Arguments:
    """The same call, whose attentions gather keys and values, whichever of its attentions the host uses.

    Raises:
        UnsupportedModelError: see :func:`obstacle`.
    """
    options = kwargs.get("transformer_options")
    if options is None:
        return args, kwargs
    if reason := obstacle(options):
        raise UnsupportedModelError(reason)
    attention = partial(_attention, mode, options.get(_OVERRIDE))
    return args, {**kwargs, "transformer_options": {**options, _OVERRIDE: attention}}


def is_in_bands(options: dict[str, Any] | None) -> bool:
    """Whether a call with these ``transformer_options`` is one of :func:`in_bands`."""
    override = (options or {}).get(_OVERRIDE)
    return isinstance(override, partial) and override.func is _attention


def _attention(
    mode: BandMode,
    chosen: Callable[..., torch.Tensor] | None,
    func: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """An attention of the host, ``func``: [B, tokens, heads * D], or with ``skip_reshape`` [B, heads, tokens, D].

    Args:
        chosen: what another node has chosen in its place, which is called with it.
    """
    if chosen is not None:
        func = partial(chosen, func)

    def compute(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, heads: int) -> torch.Tensor:
        if q.is_meta:  # where some of them call kernels that do not run
            return _made_up(q, v, heads, skip_reshape, *args, **kwargs)
        with mode.as_is():
            return func(q, k, v, heads, mask, attn_precision, skip_reshape, *args, **kwargs)

    if not skip_reshape:
        q, k, v = (each.flatten(2) for each in (q, k, v))  # SD3 passes values as [B, tokens, heads, D]
    apart, together = Dims(tokens=2, heads=1), Dims(tokens=1, heads=2)
    result = apart if (args[0] if args else kwargs.get("skip_output_reshape")) else together
    dims = apart if skip_reshape else together
    return mode.attend(Attention(compute, q, k, v, mask, heads, dims, result, kwargs.get("scale")))


def _made_up(
    q: torch.Tensor, v: torch.Tensor, heads: int, skip_reshape: bool, skip_output_reshape: bool = False, **_: Any
) -> torch.Tensor:
    """What an attention returns for these, as far as shapes go."""
    items, tokens, width = q.shape[0], q.shape[2 if skip_reshape else 1], v.shape[-1] // (1 if skip_reshape else heads)
    return q.new_empty((items, heads, tokens, width) if skip_output_reshape else (items, tokens, heads * width))
