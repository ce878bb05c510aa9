"""What ComfyUI imports to see whether there are devices of this kind: with it, the simulated ones are there."""

import sim  # noqa: F401
