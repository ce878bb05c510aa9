"""ComfyUI-AsyncDiff: all of an artist's GPUs denoise one image together (AsyncDiff, arXiv 2406.06911)."""

__version__ = "0.1.0"
