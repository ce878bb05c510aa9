"""The side that faces ComfyUI. Only this package imports ``comfy``; import its modules inside a running host only."""
