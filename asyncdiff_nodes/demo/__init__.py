"""Small text-to-emoji diffusion model shipped with the package, for tests and demonstrations."""

from .pipeline import DemoPipeline

__all__ = ["DemoPipeline"]
