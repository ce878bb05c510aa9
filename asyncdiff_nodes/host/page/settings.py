"""The user's choices in ComfyUI's settings, under AsyncDiff. The page stores them, and every run reads them again."""

from __future__ import annotations

from typing import Any

from comfy.cli_args import args

from asyncdiff_nodes.engine import PlanError
from asyncdiff_nodes.host.choices import SETTING_CHOICES, SETTINGS
from asyncdiff_nodes.host.values import shown

from .prompt_server import prompt_server


def setting(name: str) -> Any:
    """The value of ``AsyncDiff.{name}``. Its default without a server, and with --multi-user, where a run does not name its user.

    Raises:
        PlanError: the stored value is of another type than the default, or is not one of its choices.
    """
    server, default = prompt_server(), SETTINGS[name]
    if server is None or args.multi_user:
        return default
    value = server.user_manager.settings.get_settings(None).get(f"AsyncDiff.{name}", default)
    kind = str if isinstance(default, str) else (int, float)
    if not isinstance(value, kind) or isinstance(value, bool) or value not in SETTING_CHOICES.get(name, (value,)):
        raise PlanError(
            f"Settings, AsyncDiff, {name} is {shown(value)}: set it again in ComfyUI's settings; its default is {default!r}"
        )
    return value


def fingerprint() -> str:
    """A text that changes with every setting that affects pictures, so that the host does not reuse older results."""
    return f"{setting('Preset')}, {setting('Devices')}"
