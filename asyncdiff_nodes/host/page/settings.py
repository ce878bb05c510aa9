"""What the user chose in ComfyUI's settings, under AsyncDiff; the page stores it, and every run reads it again."""

from __future__ import annotations

from typing import Any

from comfy.cli_args import args

from asyncdiff_nodes.engine import PlanError
from asyncdiff_nodes.host.values import shown

from .prompt_server import prompt_server

_DEFAULTS: dict[str, Any] = {"Preset": "Balanced", "Devices": "auto", "KeepMinutes": 0, "Verify": "auto"}
_CHOICES = {"Verify": ("auto", "off", "first", "always")}


def setting(name: str) -> Any:
    """The value of ``AsyncDiff.{name}``; its default without a server, and with --multi-user: a run does not say whose it is.

    Raises:
        PlanError: what is stored is of another type than the default, or none of its choices.
    """
    server, default = prompt_server(), _DEFAULTS[name]
    if server is None or args.multi_user:
        return default
    value = server.user_manager.settings.get_settings(None).get(f"AsyncDiff.{name}", default)
    kind = str if isinstance(default, str) else (int, float)
    if not isinstance(value, kind) or isinstance(value, bool) or value not in _CHOICES.get(name, (value,)):
        raise PlanError(
            f"Settings, AsyncDiff, {name} is {shown(value)}: set it again in ComfyUI's settings; its default is {default!r}"
        )
    return value


def fingerprint() -> str:
    """Changes whenever a setting changes that changes pictures: the host must then not reuse what it has computed before."""
    return f"{setting('Preset')}, {setting('Devices')}"
