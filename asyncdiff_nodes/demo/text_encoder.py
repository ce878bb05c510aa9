"""Tiny transformer text encoder of the demo model."""

from __future__ import annotations

import torch
from torch import nn


class TextEncoder(nn.Module):
    """Token and position embeddings followed by pre-norm transformer layers.

    Padding is not masked: as with CLIP in Stable Diffusion, the padded positions are part of the context.
    """

    def __init__(self, vocab_size: int, length: int = 8, dim: int = 96, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.config = {"vocab_size": vocab_size, "length": length, "dim": dim, "layers": layers, "heads": heads}
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Parameter(torch.randn(length, dim) * 0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, dim * 2, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, length] -> context [B, length, dim]."""
        hidden = self.tokens(ids) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)
