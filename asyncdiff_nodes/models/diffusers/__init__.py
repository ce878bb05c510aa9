"""The denoisers of diffusers."""
