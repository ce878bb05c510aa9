"""Parts that diffusion transformers have in common: embedders, one or two lists of alike blocks, and a head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from asyncdiff_nodes.models.network import Network


def stacked(stem: Sequence[str], lists: Sequence[str], head: Sequence[str]) -> Callable[[Network], list[str]]:
    """``block_names`` of a family: the modules ``stem``, every item of ``lists``, and the modules ``head``.

    Embeddings that every block reads (of time, of a prompt that no block changes, of positions) are better left out: each rank
    computes them, and none of them crosses a cut.
    """

    def block_names(transformer: Network) -> list[str]:
        items = (f"{name}.{index}" for name in lists for index in range(len(getattr(transformer, name))))
        return [*stem, *items, *head]

    return block_names


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make an input of this shape for a trace."""
    return torch.empty(shape, dtype=dtype, device="meta")
