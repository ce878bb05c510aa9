"""Small text-to-emoji diffusion model shipped with the package, for tests and demonstrations."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import DemoPipeline

__all__ = ["DemoPipeline"]


def __getattr__(name: str) -> type[DemoPipeline]:
    """Import the pipeline when it is first asked for: it needs diffusers, the tokenizer and the text encoder do not."""
    if name == "DemoPipeline":
        from .pipeline import DemoPipeline

        return DemoPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
