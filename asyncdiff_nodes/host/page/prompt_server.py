"""The host's web server, found without importing it."""

import sys
from typing import Any


def prompt_server() -> Any:
    """ComfyUI's ``PromptServer``; None where its code runs without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
