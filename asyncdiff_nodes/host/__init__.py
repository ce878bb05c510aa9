"""The part that faces ComfyUI. Import its modules only where ComfyUI runs, as ``nodes/`` and this package do."""

OURS = "asyncdiff"  # marks what this pack adds to the host's objects: hooks, and entries in dictionaries
