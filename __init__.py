"""ComfyUI-AsyncDiff as ComfyUI loads it: from ``custom_nodes/``, under whatever name the folder has."""

import sys
from pathlib import Path

# Worker processes import the package by its own name, and the host loads packs under the names of their folders.
_ROOT = str(Path(__file__).resolve().parent)
if _ROOT not in sys.path:
    sys.path.append(_ROOT)

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():  # noqa: ANN201  (its class belongs to the host)
    """Called by ComfyUI to learn the pack's nodes."""
    from asyncdiff_nodes.host.page.prompt_server import prompt_server
    from asyncdiff_nodes.nodes import AsyncDiffExtension

    if server := prompt_server():
        from asyncdiff_nodes.host.page.routes import register

        register(server)
    return AsyncDiffExtension()
