"""Hidden states of a transformer, which every rank makes itself: what crosses is how blocks changed them."""

from __future__ import annotations

import torch


def add_states(leaf: torch.Tensor, states: torch.Tensor) -> None:
    """Add hidden ``states`` [B, T, ...] to the last T tokens of ``leaf``, in place.

    >>> leaf = torch.zeros(1, 3, 1)
    >>> add_states(leaf, torch.tensor([[[5.0], [7.0]]]))
    >>> leaf.flatten().tolist()
    [0.0, 5.0, 7.0]
    """
    _last_tokens(leaf, states).add_(states)


def take_states(leaf: torch.Tensor, states: torch.Tensor) -> None:
    """Take hidden ``states`` away again; see :func:`add_states`."""
    _last_tokens(leaf, states).add_(states, alpha=-1)


def _last_tokens(leaf: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return leaf[:, leaf.shape[1] - states.shape[1] :]
