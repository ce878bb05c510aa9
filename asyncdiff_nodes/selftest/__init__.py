"""The truth about a machine: whether its devices work together exactly, and how fast. Needs PyTorch only, and no download."""
